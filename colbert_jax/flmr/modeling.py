"""`FLMRModelForRetrieval`, its text part: BERT, projection, masks, late interaction, loss.

Every method is a pure function of `params` (by default the model's own), so that gradients are
`jax.grad(lambda params: model(..., params=params).loss)(model.params)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from colbert_jax import runtime
from colbert_jax.checkpoints import carried, flmr, hub, read_checkpoint
from colbert_jax.checkpoints.common import Checkpoint
from colbert_jax.colbert import ColBERT
from colbert_jax.config import ColBERTConfig
from colbert_jax.files import replacing_files, write_json
from colbert_jax.flmr.configuration import FLMRConfig
from colbert_jax.flmr.outputs import (
    FLMRContextEncoderOutput,
    FLMRModelForRetrievalOutput,
    FLMRQueryEncoderOutput,
)
from colbert_jax.flmr.tokenization import (
    FLMRContextEncoderTokenizer,
    FLMRQueryEncoderTokenizer,
    model_tokenizer,
    text_settings,
)
from colbert_jax.models.bert import BertConfig
from colbert_jax.models.colbert import EncoderConfig, TokenEncoder, make_encoder
from colbert_jax.models.layers import MASKED
from colbert_jax.search.arrays import Hits
from colbert_jax.text import outside_instruction

_MASKED_SCORE = -9999.0  # of a document position that is no token, upstream's number


class _Encoded(NamedTuple):
    """projected [B, L, D], and what was asked for beside."""

    projected: jax.Array
    attentions: tuple[jax.Array, ...] | None
    hidden_states: tuple[jax.Array, ...] | None


class FLMRModelForRetrieval:
    """Late interaction of text queries and text documents.

    Attributes:
      config: FLMRConfig.
      params: {"context": ..., "query": ...}; only "context" where one encoder serves both.
      query_tokenizer, context_tokenizer: as given, or the checkpoint's own.
    """

    def __init__(
        self,
        config: FLMRConfig,
        query_tokenizer: FLMRQueryEncoderTokenizer | None = None,
        context_tokenizer: FLMRContextEncoderTokenizer | None = None,
        *,
        seed: int = 0,
        dtype: Any = None,
        checkpoint: Checkpoint | None = None,
    ):
        """A model with random weights drawn from `seed`; see `from_pretrained` for trained ones.

        Args:
          query_tokenizer, context_tokenizer: one of them is needed unless a checkpoint is given:
            its vocabulary has the punctuation and the instruction token.
          dtype: of the dense layers' computation. If None, bfloat16 on accelerators and float32 on
            a CPU.
        """
        if config.query_mask_input_ids_skip_list:
            raise ValueError("query_mask_input_ids_skip_list is not supported; leave it out")
        runtime.check_process()
        self.config, self._dtype = config, dtype
        self.query_tokenizer, self.context_tokenizer = query_tokenizer, context_tokenizer
        if checkpoint is None:
            tokenizer = model_tokenizer(context_tokenizer, query_tokenizer)
            if tokenizer is None:
                raise ValueError(
                    "pass query_tokenizer or context_tokenizer: the model needs its vocabulary"
                )
            checkpoint = _random_checkpoint(config, tokenizer, seed)
        settings = text_settings(query_tokenizer, context_tokenizer)
        settings["mask_punctuation"] = config.mask_punctuation
        settings["mask_instruction_token"] = flmr.instruction_token(
            vars(config), checkpoint.tokenizer
        )
        text = dataclasses.replace(checkpoint.config.text, **settings)
        # Arguments that load the same model again, for an index to remember.
        self._load = {"name_or_path": str(checkpoint.folder.resolve())} | {
            name: value
            for name, value in settings.items()
            if value != getattr(checkpoint.config.text, name)
        }
        self._checkpoint = dataclasses.replace(
            checkpoint.with_text_config(text), params={}, query_params=None
        )
        texts = self._checkpoint.text_tokenizer()
        # [V] True for the ids that give no embedding in documents.
        self._context_skip = texts.skiplist
        self._instruction = texts.special.instruction
        self._positions = checkpoint.encoder.backbone.max_length
        compute = runtime.compute_dtype() if dtype is None else jnp.dtype(dtype)
        self._make_encoder = partial(make_encoder, checkpoint.encoder, dtype=compute)
        params = {"context": checkpoint.params}
        if checkpoint.query_params is not None:
            params["query"] = checkpoint.query_params
        self.params = jax.device_put(params, may_alias=True)
        self._encode = jax.jit(self._encode_ids, static_argnames="details")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        query_tokenizer: FLMRQueryEncoderTokenizer | None = None,
        context_tokenizer: FLMRContextEncoderTokenizer | None = None,
        *,
        config: FLMRConfig | None = None,
        dtype: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> FLMRModelForRetrieval:
        """Load a folder or a hub id in the layout of FLMR or of Stanford ColBERT.

        Raises FileNotFoundError and ValueError as `ColBERT.from_pretrained`.
        """
        folder = hub.resolve(name_or_path, revision=revision, token=token)
        checkpoint = read_checkpoint(folder)
        if not isinstance(checkpoint.encoder.backbone, BertConfig) or not checkpoint.encoder.head:
            raise ValueError(f"{folder}: not a BERT encoder with a projection; use ColBERT instead")
        if config is None:
            config = _config_of(folder, checkpoint)
        text = checkpoint.config.text
        if query_tokenizer is None:
            settings = {
                "query_maxlen": text.query_maxlen,
                "attend_to_mask_tokens": text.attend_to_mask_tokens,
            }
            query_tokenizer = FLMRQueryEncoderTokenizer(checkpoint.tokenizer, settings)
        if context_tokenizer is None:
            context_tokenizer = FLMRContextEncoderTokenizer(
                checkpoint.tokenizer, {"doc_maxlen": text.doc_maxlen}
            )
        return cls(config, query_tokenizer, context_tokenizer, dtype=dtype, checkpoint=checkpoint)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint and both tokenizers; files of the same names are replaced."""
        with replacing_files(Path(folder)) as draft:
            checkpoint = self.checkpoint()
            flmr.write(checkpoint, draft)
            carried.write(checkpoint.config, flmr.kept(checkpoint.config), draft)
            fields = self.config.to_diff_dict() | {
                "architectures": ["FLMRModelForRetrieval"],
                "separate_query_and_context_text_encoder": "query" in self.params,
            }
            write_json(draft / "config.json", fields | _TEXT_ONLY)

    def checkpoint(self) -> Checkpoint:
        """The model with its present parameters, for `checkpoints.write_checkpoint`."""
        params = jax.tree.map(np.asarray, self.params)
        return dataclasses.replace(
            self._checkpoint, params=params["context"], query_params=params.get("query")
        )

    def colbert(self, **text_settings: Any) -> ColBERT:
        """The same model as a `ColBERT`, which batches, indexes and ranks.

        Args:
          **text_settings: fields of `TextConfig` to change, such as `doc_maxlen=300`.
        """
        checkpoint = self.checkpoint().with_text(**text_settings)
        return ColBERT(checkpoint, load=self._load | text_settings, dtype=self._dtype)

    def rank(self, query: str, documents: Sequence[str], k: int | None = None) -> Hits:
        """Order documents for one query, without an index: see `ColBERT.rank`."""
        return self.colbert().rank(query, documents, k)

    def query(
        self,
        input_ids: Any,
        attention_mask: Any,
        pixel_values: Any = None,
        image_features: Any = None,
        concat_output_from_vision_encoder: Any = None,
        concat_output_from_text_encoder: Any = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        params: dict | None = None,
    ) -> FLMRQueryEncoderOutput:
        """Encode queries to token embeddings.

        Args:
          input_ids, attention_mask: int[B, L], from FLMRQueryEncoderTokenizer.
          concat_output_from_text_encoder: True, or a list of one bool per query; False zeroes the
            rows of its text.

        Raises:
          NotImplementedError: images, which are the vision part.
        """
        _no_images(pixel_values, image_features, concat_output_from_vision_encoder)
        ids, attended = self._ids(input_ids, attention_mask)
        details = (bool(output_attentions), bool(output_hidden_states))
        encoded = self._encode(self._side("query", params), ids, attended, details)
        kept = ids != 0
        if self._instruction is not None:
            kept &= outside_instruction(ids, self._instruction)
        with_text = _with_text(concat_output_from_text_encoder, len(ids))
        rows = encoded.projected * kept[..., None] * with_text
        return FLMRQueryEncoderOutput(
            rows[:, 0], _unit(rows), encoded.attentions, encoded.hidden_states
        )

    def doc(
        self,
        input_ids: Any,
        attention_mask: Any,
        pixel_values: Any = None,
        image_features: Any = None,
        concat_output_from_vision_encoder: Any = None,
        concat_output_from_text_encoder: Any = None,
        keep_dims: bool = True,
        return_mask: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        params: dict | None = None,
    ) -> FLMRContextEncoderOutput:
        """Encode documents to token embeddings, float32.

        Args:
          keep_dims: False gives a list of [tokens, D] on the host, without masked rows.
          return_mask: whether to give context_mask.
        """
        _no_images(pixel_values, image_features, concat_output_from_vision_encoder)
        ids, attended = self._ids(input_ids, attention_mask)
        details = (bool(output_attentions), bool(output_hidden_states))
        encoded = self._encode(self._side("context", params), ids, attended, details)
        kept = ~jnp.asarray(self._context_skip)[ids] & (ids != 0)
        kept = kept[..., None] & _with_text(concat_output_from_text_encoder, len(ids))
        rows = _unit(encoded.projected * kept)
        late: Any = rows
        if not keep_dims:
            flags = np.asarray(kept)[..., 0]
            late = [row[flag] for row, flag in zip(np.asarray(rows), flags, strict=True)]
        return FLMRContextEncoderOutput(
            rows[:, 0],
            late,
            kept if return_mask else None,
            encoded.attentions,
            encoded.hidden_states,
        )

    def score(self, Q: Any, D_padded: Any, D_mask: Any) -> jax.Array:
        """Score each query with its document by MaxSim; masked positions have -9999, as upstream.

        Args:
          Q: [B, Lq, D] or [1, Lq, D]; D_padded [B, Ld, D]; D_mask bool[B, Ld, 1].

        Returns:
          float32[B].
        """
        Q, D_padded, D_mask = map(jnp.asarray, (Q, D_padded, D_mask))
        if Q.shape[0] not in (1, D_padded.shape[0]):
            raise ValueError(
                f"{Q.shape[0]} queries and {D_padded.shape[0]} documents; pass one query, or one "
                "for each document"
            )
        similarity = jnp.einsum(
            "bqd,bkd->bqk",
            jnp.broadcast_to(Q, (len(D_padded), *Q.shape[1:])),
            D_padded,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        masked = jnp.where(D_mask[..., 0][:, None], similarity, _MASKED_SCORE)
        return masked.max(axis=-1).sum(axis=-1)

    def score_matrix(self, Q: Any, D_padded: Any, D_mask: Any) -> jax.Array:
        """Score every query with every document by MaxSim: float32[B, N]."""
        every = jax.vmap(lambda q: self.score(q[None], D_padded, D_mask))
        return every(jnp.asarray(Q))

    def forward(
        self,
        query_input_ids: Any = None,
        query_attention_mask: Any = None,
        query_pixel_values: Any = None,
        query_image_features: Any = None,
        context_input_ids: Any = None,
        context_attention_mask: Any = None,
        context_pixel_values: Any = None,
        context_image_features: Any = None,
        use_in_batch_negatives: bool = True,
        in_batch_negatives_from_all_gpus: bool = False,
        num_negative_examples: int = 1,
        query_concat_output_from_vision_encoder: Any = None,
        query_concat_output_from_text_encoder: Any = None,
        context_concat_output_from_vision_encoder: Any = None,
        context_concat_output_from_text_encoder: Any = None,
        return_dict: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        own_documents_loss: bool = False,
        params: dict | None = None,
    ) -> Any:
        """Compute scores and losses of queries and their documents.

        Args:
          context_input_ids: of B (n + 1) documents: positive and n negatives of query 1, of 2, ...
          num_negative_examples: n; 0 for positives alone.
          use_in_batch_negatives: whether `loss` contrasts each positive with the documents of all
            queries. If False, with its query's documents only, and in_batch_negative_loss is None.
          in_batch_negatives_from_all_gpus: ignored: a batch is global over a JAX mesh.
          return_dict: False gives a plain tuple.
          own_documents_loss: whether `loss` is always over the query's own documents, as upstream
            had it before May 2024.

        Returns:
          FLMRModelForRetrievalOutput.

        Raises:
          ValueError: the number of documents is not B (n + 1).
        """
        del in_batch_negatives_from_all_gpus
        shared: dict[str, Any] = dict(
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            params=params,
        )
        if query_input_ids is None or context_input_ids is None:
            raise ValueError(
                "forward takes query_input_ids and context_input_ids; see query and doc"
            )
        batch, documents = len(query_input_ids), len(context_input_ids)
        ways = num_negative_examples + 1
        if documents != batch * ways:
            raise ValueError(
                f"{batch} queries with num_negative_examples={num_negative_examples} need "
                f"{batch * ways} documents, got {documents}; to score any number of documents use "
                "rank or score_matrix"
            )
        query = self.query(
            query_input_ids,
            query_attention_mask,
            query_pixel_values,
            query_image_features,
            query_concat_output_from_vision_encoder,
            query_concat_output_from_text_encoder,
            **shared,
        )
        context = self.doc(
            context_input_ids,
            context_attention_mask,
            context_pixel_values,
            context_image_features,
            context_concat_output_from_vision_encoder,
            context_concat_output_from_text_encoder,
            **shared,
        )
        every = self.score_matrix(
            query.late_interaction_output, context.late_interaction_output, context.context_mask
        )
        scores, own_loss, in_batch_loss = losses(every, ways)
        loss = in_batch_loss if use_in_batch_negatives and not own_documents_loss else own_loss
        output = FLMRModelForRetrievalOutput(
            loss,
            scores,
            in_batch_loss if use_in_batch_negatives else None,
            query.late_interaction_output,
            context.late_interaction_output,
            query.text_encoder_attentions,
            query.text_encoder_hidden_states,
            context.text_encoder_attentions,
            context.text_encoder_hidden_states,
        )
        if return_dict is not False:
            return output
        extras = 2 * (bool(output_attentions) + bool(output_hidden_states))
        return tuple(output)[:5] + tuple(v for v in output[5:] if v is not None)[:extras]

    __call__ = forward

    def eval(self) -> FLMRModelForRetrieval:
        """Return the model: it has no dropout to switch off."""
        return self

    def _ids(self, input_ids: Any, attention_mask: Any) -> tuple[jax.Array, jax.Array]:
        runtime.check_process()
        vocab_size = self._checkpoint.encoder.backbone.vocab_size
        ids, mask = (
            x if isinstance(x, jax.Array) else np.asarray(x) for x in (input_ids, attention_mask)
        )
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ValueError(
                f"input_ids and attention_mask must both be [B, L], got {list(ids.shape)} and "
                f"{list(mask.shape)}"
            )
        if ids.shape[1] > self._positions:
            raise ValueError(
                f"input_ids have {ids.shape[1]} tokens, the encoder {self._positions} positions"
            )
        if (
            isinstance(ids, np.ndarray)
            and ids.size
            and not 0 <= ids.min() <= ids.max() < vocab_size
        ):
            raise ValueError(
                f"input_ids lie in {ids.min()}..{ids.max()}, the vocabulary in 0..{vocab_size - 1}"
            )
        return jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool)

    def _side(self, side: str, params: dict | None) -> dict:
        params = self.params if params is None else params
        return params.get(side, params["context"])

    def _encode_ids(
        self, params: dict, ids: jax.Array, attended: jax.Array, details: tuple[bool, bool]
    ) -> _Encoded:
        encoder = self._make_encoder(params)
        bert: Any = encoder.backbone
        x = bert.embeddings(ids, jnp.arange(ids.shape[1]))
        hidden, attentions = [x], []
        for layer in bert.layers:
            if details[0]:
                attentions.append(_attention_weights(layer.attention, x, attended))
            x = layer(x, attended)
            hidden.append(x)
        for layer in encoder.head:
            x = layer(x)
        return _Encoded(
            x.astype(jnp.float32),
            tuple(attentions) if details[0] else None,
            tuple(hidden) if details[1] else None,
        )


# What of config.json is the vision part, as it stands in a text-only checkpoint.
_TEXT_ONLY = {
    "use_vision_encoder": False,
    "use_transformer_mapping_network": False,
    "query_concat_output_from_vision_encoder": False,
    "context_concat_output_from_vision_encoder": False,
}


def losses(every: jax.Array, ways: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores and the two losses of a score matrix.

    Args:
      every: [B, B * ways], of every query with every document; query i's own documents, its
        positive first, begin at column i * ways.

    Returns:
      scores [B, ways], of each query with its own documents; the mean cross-entropy over those;
      and over all documents.
    """
    batch = len(every)
    positives = jnp.arange(batch) * ways
    own = jnp.take_along_axis(every, positives[:, None] + jnp.arange(ways), axis=1)
    own_loss = -jax.nn.log_softmax(own, axis=-1)[:, 0].mean()
    in_batch = -jax.nn.log_softmax(every, axis=-1)[jnp.arange(batch), positives].mean()
    return own, own_loss, in_batch


def _attention_weights(attention: Any, x: jax.Array, attended: jax.Array) -> jax.Array:
    """[B, heads, L, L], the softmax that the layer computes."""

    def split(y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], attention.heads, attention.head_dim)

    scores = jnp.einsum(
        "bqhd,bkhd->bhqk",
        split(attention.query(x)),
        split(attention.key(x)),
        preferred_element_type=jnp.float32,
    )
    bias = jnp.where(attended, 0.0, MASKED)[:, None, None]
    return jax.nn.softmax(scores * attention.head_dim**-0.5 + bias, axis=-1)


def _unit(rows: jax.Array) -> jax.Array:
    """Rows of unit length; zeros stay zeros, and their gradient finite."""
    squares = (rows**2).sum(axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return rows / jnp.maximum(norm, 1e-12)


def _with_text(flag: Any, batch: int) -> Any:
    """[B, 1, 1] whether a row's text counts."""
    if flag is None or flag is True:
        return jnp.ones((batch, 1, 1), bool)
    if flag is False:
        raise ValueError(
            "concat_output_from_text_encoder=False leaves nothing of a text-only query or document"
        )
    if len(flag) != batch:
        raise ValueError(f"concat_output_from_text_encoder has {len(flag)} flags for {batch} rows")
    return jnp.asarray(flag, bool)[:, None, None]


def _no_images(pixel_values: Any, image_features: Any, flag: Any) -> None:
    asked = flag is not None and np.any(flag)
    if pixel_values is not None or image_features is not None or asked:
        raise NotImplementedError(
            "images are not supported, only FLMR's text part is: leave out pixel_values and "
            "image_features, and leave concat_output_from_vision_encoder False"
        )


def _config_of(folder: Path, checkpoint: Checkpoint) -> FLMRConfig:
    """The checkpoint's FLMRConfig; for Stanford's layout, made from its settings."""
    if flmr.detect(folder):
        return FLMRConfig.from_pretrained(folder)
    return FLMRConfig(**flmr.config_fields(checkpoint, checkpoint.query_params is not None))


def _random_checkpoint(config: FLMRConfig, tokenizer: Any, seed: int) -> Checkpoint:
    backbone = flmr.text_backbone({"text_config": vars(config.text_config)}, Path("FLMRConfig"))
    encoder = EncoderConfig.projecting(backbone, config.dim)

    def draw(seed: int) -> dict:
        make = partial(TokenEncoder, encoder)
        return nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(seed)), nnx.Param))

    separate = config.separate_query_and_context_text_encoder
    params = draw(seed)
    return Checkpoint(
        Path("."),
        encoder,
        ColBERTConfig(),
        tokenizer,
        params,
        # Upstream copies the one encoder when there are two.
        query_params=params if separate else None,
    )
