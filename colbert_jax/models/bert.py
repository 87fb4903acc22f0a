"""BERT (Devlin et al., 2019) and its kin: learned positions, post-layer-norm.

RoBERTa (Liu et al., 2019) and XLM-RoBERTa (Conneau et al., 2020): positions count the tokens that
are not padding, from `pad_token_id` + 1 on. DistilBERT (Sanh et al., 2019): no token types.
ELECTRA (Clark et al., 2020): embeddings may be narrower than the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require
from colbert_jax.models.config import Architecture, BackboneConfig
from colbert_jax.models.layers import (
    Embeddings,
    TrainMode,
    check_length,
    dense,
    positions_after_padding,
    post_norm_layers,
    run_post_norm_layers,
)


@dataclass(frozen=True, kw_only=True)
class _TokenTypesConfig(BackboneConfig):
    type_vocab_size: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("type_vocab_size")

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        # Other architectures ignore the field: ModernBERT checkpoints carry several values of it.
        positions = fields.get("position_embedding_type") or "absolute"
        require(
            positions == "absolute",
            f"position_embedding_type {positions!r} is not supported; supported: 'absolute'",
        )
        return {}


@dataclass(frozen=True, kw_only=True)
class BertConfig(_TokenTypesConfig):
    """BERT's configuration."""

    model_type: str = "bert"

    model_types: ClassVar[tuple[str, ...]] = ("bert",)


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(_TokenTypesConfig):
    """The configuration of RoBERTa and XLM-RoBERTa."""

    model_type: str = "roberta"
    pad_token_id: int = 1

    model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta")

    @property
    def first_position(self) -> int:
        return self.pad_token_id + 1


@dataclass(frozen=True, kw_only=True)
class ElectraConfig(_TokenTypesConfig):
    """ELECTRA's configuration. `embedding_size` is the width of the embeddings."""

    model_type: str = "electra"
    embedding_size: int = 128

    model_types: ClassVar[tuple[str, ...]] = ("electra",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("embedding_size")

    def has_module(self, path: str) -> bool:
        return path != "projection" or self.embedding_size != self.hidden_size


@dataclass(frozen=True, kw_only=True)
class DistilBertConfig(BackboneConfig):
    """DistilBERT's configuration."""

    model_type: str = "distilbert"

    model_types: ClassVar[tuple[str, ...]] = ("distilbert",)
    renamed: ClassVar[Mapping[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    }
    fixed: ClassVar[frozenset[str]] = frozenset({"layer_norm_eps"})


class Bert(nnx.Module):
    """BERT's encoder: token ids to hidden states.

    Args:
      config: the architecture.
      dtype: what the dense layers compute in; parameters are float32.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        config: BertConfig | RobertaConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.embeddings = Embeddings(config, token_types=config.type_vocab_size, rngs=rngs)
        self.layers = post_norm_layers(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        ids: jax.Array,
        attended: jax.Array,
        train: TrainMode | None = None,
        *,
        types: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the last layer's output.

        Args:
          ids: int32[B, L], L at most `config.max_length`.
          attended: bool[B, L], the tokens that others may attend to.
          train: dropout and recomputation. If None, the model is not being trained.
          types: int32[B, L], the token types. If None, all are 0.

        Returns:
          float32[B, L, hidden_size].

        Raises:
          ValueError: a sequence is longer than the model's positions.
        """
        check_length(ids, self.config.max_length)
        x = self.embeddings(ids, self._positions(ids), types)
        return run_post_norm_layers(self.layers, x, attended, train=train)

    def _positions(self, ids: jax.Array) -> jax.Array:
        return jnp.arange(ids.shape[1])


class Roberta(Bert):
    """RoBERTa's and XLM-RoBERTa's encoder; arguments as for `Bert`."""

    def _positions(self, ids: jax.Array) -> jax.Array:
        return positions_after_padding(ids, self.config.pad_token_id)


class DistilBert(nnx.Module):
    """DistilBERT's encoder; arguments as for `Bert`."""

    def __init__(self, config: DistilBertConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = post_norm_layers(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Compute the last layer's output, arguments as for `Bert`: float32[B, L, hidden_size]."""
        check_length(ids, self.config.max_length)
        x = self.embeddings(ids, jnp.arange(ids.shape[1]))
        return run_post_norm_layers(self.layers, x, attended, train=train)


class Electra(nnx.Module):
    """ELECTRA's encoder; arguments as for `Bert`."""

    def __init__(self, config: ElectraConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        narrow, width = config.embedding_size, config.hidden_size
        self.embeddings = Embeddings(
            config, token_types=config.type_vocab_size, width=narrow, rngs=rngs
        )
        self.projection = (
            None if narrow == width else nnx.Linear(narrow, width, **dense(config, dtype, rngs))
        )
        self.layers = post_norm_layers(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Compute the last layer's output, arguments as for `Bert`: float32[B, L, hidden_size]."""
        check_length(ids, self.config.max_length)
        x = self.embeddings(ids, jnp.arange(ids.shape[1]))
        if self.projection is not None:
            x = self.projection(x).astype(jnp.float32)
        return run_post_norm_layers(self.layers, x, attended, train=train)


WORD_POSITION = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
BERT_TENSORS = {
    **WORD_POSITION,
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "layers.*.attention.query": "encoder.layer.*.attention.self.query",
    "layers.*.attention.key": "encoder.layer.*.attention.self.key",
    "layers.*.attention.value": "encoder.layer.*.attention.self.value",
    "layers.*.attention.output": "encoder.layer.*.attention.output.dense",
    "layers.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.intermediate": "encoder.layer.*.intermediate.dense",
    "layers.*.output": "encoder.layer.*.output.dense",
    "layers.*.output_norm": "encoder.layer.*.output.LayerNorm",
}
_ELECTRA = BERT_TENSORS | {"projection": "embeddings_project"}
_DISTILBERT = {
    **WORD_POSITION,
    "layers.*.attention.query": "transformer.layer.*.attention.q_lin",
    "layers.*.attention.key": "transformer.layer.*.attention.k_lin",
    "layers.*.attention.value": "transformer.layer.*.attention.v_lin",
    "layers.*.attention.output": "transformer.layer.*.attention.out_lin",
    "layers.*.attention_norm": "transformer.layer.*.sa_layer_norm",
    "layers.*.intermediate": "transformer.layer.*.ffn.lin1",
    "layers.*.output": "transformer.layer.*.ffn.lin2",
    "layers.*.output_norm": "transformer.layer.*.output_layer_norm",
}

ARCHITECTURES = (
    Architecture(
        "bert",
        BertConfig,
        Bert,
        BERT_TENSORS,
        prefix="bert.",
        model_class="BertModel",
        unused=(".cls.",),
        pooler=True,
        token_types=True,
    ),
    Architecture(
        "roberta",
        RobertaConfig,
        Roberta,
        BERT_TENSORS,
        prefix="roberta.",
        model_class="RobertaModel",
        unused=(".lm_head.",),
        pooler=True,
    ),
    Architecture(
        "xlm-roberta",
        RobertaConfig,
        Roberta,
        BERT_TENSORS,
        prefix="roberta.",
        model_class="XLMRobertaModel",
        unused=(".lm_head.",),
        pooler=True,
    ),
    Architecture(
        "distilbert",
        DistilBertConfig,
        DistilBert,
        _DISTILBERT,
        prefix="distilbert.",
        model_class="DistilBertModel",
        unused=(".vocab_", ".pre_classifier."),
    ),
    Architecture(
        "electra",
        ElectraConfig,
        Electra,
        _ELECTRA,
        prefix="electra.",
        model_class="ElectraModel",
        unused=(".discriminator_", ".generator_", ".sequence_summary."),
        token_types=True,
    ),
)
