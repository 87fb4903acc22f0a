"""The ColBERT encoder: backbone, head of dense layers, mask, L2 normalisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax import runtime
from colbert_jax.config import require, require_types
from colbert_jax.models.activations import ACTIVATIONS
from colbert_jax.models.backbones import make_backbone
from colbert_jax.models.config import BackboneConfig
from colbert_jax.models.int8 import quantize_modules, quantize_params
from colbert_jax.models.layers import TrainMode, matmul_precision

QUANTIZATIONS = (None, "int8", "int8-documents")

# torch module class -> function, for the activations of heads.
HEAD_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "GELU": ACTIVATIONS["gelu"],
    "ReLU": jax.nn.relu,
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
}


@dataclass(frozen=True)
class DenseConfig:
    """One layer of a head: activation(x W + b), plus x (or x R where widths differ) if residual."""

    in_features: int
    out_features: int
    bias: bool = False
    activation: str = "Identity"
    residual: bool = False

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("in_features", "out_features"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        require(
            self.activation in HEAD_ACTIVATIONS,
            f"activation {self.activation!r} of a dense layer is not supported; supported: "
            f"{', '.join(HEAD_ACTIVATIONS)}",
        )


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of a token encoder. With an empty head, embeddings have the backbone's width.

    normalized: whether they have unit length.
    """

    backbone: BackboneConfig
    head: tuple[DenseConfig, ...] = ()
    normalized: bool = True

    def __post_init__(self) -> None:
        require_types(self)
        width = self.backbone.hidden_size
        for i, layer in enumerate(self.head):
            require(
                layer.in_features == width,
                f"dense layer {i + 1} of the head takes {layer.in_features} features, but "
                f"{'the layer' if i else 'the backbone'} before it gives {width}",
            )
            width = layer.out_features

    @classmethod
    def projecting(cls, backbone: BackboneConfig, dim: int | None) -> EncoderConfig:
        """Add the head of ColBERT: one layer to `dim` without bias. If `dim` is None, no head."""
        return cls(backbone, () if dim is None else (DenseConfig(backbone.hidden_size, dim),))

    @property
    def dim(self) -> int:
        """Width of the token embeddings."""
        return self.head[-1].out_features if self.head else self.backbone.hidden_size


class Dense(nnx.Module):
    """One layer of a head, see `DenseConfig`."""

    def __init__(self, config: DenseConfig, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        def linear(use_bias: bool) -> nnx.Linear:
            return nnx.Linear(
                config.in_features,
                config.out_features,
                use_bias=use_bias,
                kernel_init=nnx.initializers.normal(std),
                dtype=dtype,
                precision=matmul_precision(dtype),
                rngs=rngs,
            )

        self.activation = HEAD_ACTIVATIONS[config.activation]
        self.linear = linear(config.bias)
        self.add_input = config.residual
        widths_differ = config.in_features != config.out_features
        self.residual = linear(False) if config.residual and widths_differ else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.activation(self.linear(x))
        if self.add_input:
            y = y + (x if self.residual is None else self.residual(x))
        return y


def unit_length(x: jax.Array) -> jax.Array:
    """Divide rows [..., D] by their length; rows of zeros stay, and their gradient is 0."""
    # The root of at least 1e-24, so that the gradient of a row of zeros is not NaN.
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squares, 1e-24))


class TokenEncoder(nnx.Module):
    """Token ids to token embeddings of unit length (Khattab and Zaharia, 2020, section 3.2).

    Args:
      config: backbone and head.
      dtype: what the dense layers compute in; parameters are float32.
      rngs: for the initial parameters.
    """

    def __init__(self, config: EncoderConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.backbone = make_backbone(config.backbone, dtype=dtype, rngs=rngs)
        self.normalized = config.normalized
        std = config.backbone.initializer_range
        self.head = nnx.List(
            [Dense(layer, std=std, dtype=dtype, rngs=rngs) for layer in config.head]
        )

    def __call__(
        self,
        ids: jax.Array,
        attended: jax.Array,
        kept: jax.Array,
        train: TrainMode | None = None,
    ) -> jax.Array:
        """Compute token embeddings.

        Args:
          ids: int32[B, L].
          attended: int32[B], how many leading tokens take part in attention.
          kept: bool[B, L], the rows that are embeddings; the others become zeros.
          train: dropout and recomputation in the backbone. If None, the model is not being trained.

        Returns:
          float32[B, L, D], rows of unit length if the model normalises them.
        """
        x = self.hidden(ids, attended, train) * kept[..., None]
        return unit_length(x) if self.normalized else x

    def hidden(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Compute the head's output, before masking and normalisation: float32[B, L, D]."""
        return self.project(self.states(ids, attended, train))

    def states(
        self, ids: jax.Array, attended: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Compute the backbone's last states, [B, L, hidden_size]."""
        return self.backbone(ids, jnp.arange(ids.shape[1]) < attended[:, None], train)

    def project(self, states: jax.Array) -> jax.Array:
        """Apply the head to states [B, L, hidden_size]: float32[B, L, D]."""
        for layer in self.head:
            states = layer(states)
        return states.astype(jnp.float32)


class OneKey:
    """In place of `nnx.Rngs` where values do not matter: counting keys takes most of the time."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


@cache
def _structure(
    config: EncoderConfig, dtype: jnp.dtype, quantized: bool = False
) -> tuple[nnx.GraphDef, nnx.State]:
    """Split an encoder as `nnx.split` does, with shapes in place of parameters."""

    def make() -> TokenEncoder:
        model = TokenEncoder(config, dtype=dtype, rngs=OneKey())  # type: ignore
        if quantized:
            quantize_modules(model.backbone)
        return model

    return nnx.split(nnx.eval_shape(make))


def make_encoder(
    config: EncoderConfig,
    params: dict,
    dtype: Any = jnp.float32,
) -> TokenEncoder:
    """Make an encoder from its parameters, inside a function that is jitted over them.

    Args:
      params: nested dict, also one that `quantize` returned.
      dtype: as for `colbert.ColBERT`.
    """
    leaves = jax.tree.leaves(params["backbone"])
    quantized = any(leaf.dtype == jnp.int8 for leaf in leaves)
    return merged(_structure(config, jnp.dtype(dtype), quantized), params)


def merged(structure: tuple[nnx.GraphDef, nnx.State], params: dict) -> Any:
    """Make a module of a structure, which stays as it is, from nested parameters."""
    graphdef, state = structure
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def resolve_quantization(quantization: str | None) -> str | None:
    """Return one of `QUANTIZATIONS`: for "auto" the one that is fast on this machine.

    Raises:
      ValueError: neither "auto" nor one of `QUANTIZATIONS`.
    """
    if quantization == "auto":
        return "int8-documents" if runtime.multiplies_int8() else None
    if quantization not in QUANTIZATIONS:
        known = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(f"quantization must be 'auto' or one of {known}, got {quantization!r}")
    return quantization


def quantize(params: dict, quantization: str | None) -> dict:
    """Quantise the dense layers of an encoder's backbone; the head stays.

    Args:
      params: nested dict of float32 arrays.
      quantization: one of `QUANTIZATIONS`. If None, the parameters are returned as they are.
    """
    if quantization is None:
        return params
    return params | {"backbone": quantize_params(params["backbone"])}


@cache
def param_shapes(config: EncoderConfig) -> dict[tuple, tuple[int, ...]]:
    """Map paths in the nested dict of an encoder's parameters to shapes.

    Where layers are alike from the second on, only two are made: a deep encoder would take a
    second.
    """
    backbone = config.backbone
    last = backbone.num_hidden_layers - 1
    last = min(last, 1) if backbone.layers_alike else last
    few = dataclasses.replace(config, backbone=backbone.with_layers(last + 1))
    shapes = {}
    for path, leaf in nnx.to_flat_state(_structure(few, jnp.dtype(jnp.float32))[1]):
        shapes[path] = tuple(leaf.shape)
        if path[:3] == ("backbone", "layers", last):
            for i in range(last + 1, backbone.num_hidden_layers):
                shapes[*path[:2], i, *path[3:]] = tuple(leaf.shape)
    return shapes
