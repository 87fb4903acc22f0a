"""X-MOD (Pfeiffer et al., 2022): XLM-RoBERTa with a small adapter for each language in every layer.

One language is read; the adapters of the others are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require
from colbert_jax.models.bert import BERT_TENSORS, Roberta, RobertaConfig
from colbert_jax.models.config import Architecture
from colbert_jax.models.layers import PostNormLayer, TrainMode, dense, dropped
from colbert_jax.models.rotary import Rotation

_FIXED = {
    "pre_norm": False,
    "adapter_layer_norm": False,
    "adapter_reuse_layer_norm": True,
    "ln_before_adapter": True,
}


@dataclass(frozen=True, kw_only=True)
class XmodConfig(RobertaConfig):
    """The configuration; `default_language` is the one that is read."""

    model_type: str = "xmod"
    adapter_reduction_factor: int = 2
    default_language: str = "en_XX"

    model_types: ClassVar[tuple[str, ...]] = ("xmod",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("adapter_reduction_factor")
        require(
            self.adapter_width >= 1,
            f"adapter_reduction_factor {self.adapter_reduction_factor} leaves adapters no width",
        )

    @property
    def adapter_width(self) -> int:
        """The width of an adapter."""
        return self.hidden_size // self.adapter_reduction_factor

    def tensor(self, name: str) -> str:
        return name.replace("LANGUAGE", self.default_language)

    def is_unused(self, tensor: str) -> bool:
        own = f".adapter_modules.{self.default_language}."
        return ".adapter_modules." in tensor and own not in tensor

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        for name, only in _FIXED.items():
            given = fields.get(name)
            require(
                given in (None, only), f"{name} {given!r} is not supported; supported: {only!r}"
            )
        languages, chosen = fields.get("languages"), fields.get("default_language")
        languages = ["en_XX"] if languages is None else languages
        require(
            isinstance(languages, list | tuple) and all(isinstance(n, str) for n in languages),
            f"languages must be a list of strings, got {languages!r:.80}",
        )
        if chosen is None and len(languages) == 1:
            chosen = languages[0]
        require(
            chosen is not None,
            f"a model of {len(languages)} languages: choose one with language=, of "
            f"{', '.join(languages)}",
        )
        require(
            chosen in languages,
            f"language {chosen!r} is not one of the model's: {', '.join(languages)}",
        )
        return super().read_fields(fields) | {"default_language": chosen}

    def written_fields(self) -> dict[str, Any]:
        return {"languages": [self.default_language]} | _FIXED


class XmodLayer(PostNormLayer):
    """A post-layer-norm layer with an adapter at its end; the last normalisation comes twice."""

    def __init__(self, config: XmodConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        width, narrow, settings = (
            config.hidden_size,
            config.adapter_width,
            dense(config, dtype, rngs),
        )
        self.adapter_down = nnx.Linear(width, narrow, **settings)
        self.adapter_up = nnx.Linear(narrow, width, **settings)

    def __call__(
        self,
        x: jax.Array,
        attended: jax.Array,
        position_bias: jax.Array | None = None,
        train: TrainMode | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Apply the layer; arguments as for `layers.PostNormLayer`."""
        x = super().__call__(x, attended, position_bias, train, rotation)
        y = self.adapter_up(self.activation(self.adapter_down(x)))
        return self.output_norm(x + dropped(y, train, 3))


class Xmod(Roberta):
    """The encoder; arguments as for `bert.Bert`."""

    def __init__(self, config: XmodConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([XmodLayer(config, dtype=dtype, rngs=rngs) for _ in layers])


_ADAPTER = "encoder.layer.*.output.adapter_modules.LANGUAGE"

ARCHITECTURES = (
    Architecture(
        "xmod",
        XmodConfig,
        Xmod,
        BERT_TENSORS
        | {
            "layers.*.adapter_down": f"{_ADAPTER}.dense1",
            "layers.*.adapter_up": f"{_ADAPTER}.dense2",
        },
        prefix="roberta.",
        model_class="XmodModel",
        unused=(".lm_head.",),
        pooler=True,
    ),
)
