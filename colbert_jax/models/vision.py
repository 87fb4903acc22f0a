"""CLIP's vision transformer (Dosovitskiy et al., 2021; Radford et al., 2021): images to states.

A class token and the patches of an image, learned positions, pre-layer-norm layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require, require_types
from colbert_jax.models.activations import activation
from colbert_jax.models.config import MAX_LAYERS, LayerConfig, named_tensors
from colbert_jax.models.layers import Attention, dense, layer_norm, matmul_precision

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The architecture, by the names of transformers' `CLIPVisionConfig`.

    image_size, patch_size: pixels along one side; what a last patch would lack is cut off.

    Raises ValueError for values that do not fit together.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    initializer_range: float

    def __post_init__(self) -> None:
        require_types(self)
        for name in _SIZES:
            require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        require(
            self.num_hidden_layers <= MAX_LAYERS,
            f"num_hidden_layers must be <= {MAX_LAYERS}, got {self.num_hidden_layers}",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
            f"{self.num_attention_heads}",
        )
        require(
            self.patch_size <= self.image_size,
            f"patch_size {self.patch_size} is larger than image_size {self.image_size}",
        )
        activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.num_channels, self.image_size, self.image_size)


class PatchEmbedding(nnx.Module):
    """One dense layer without bias over the pixels of each patch; a convolution in CLIP's words.

    The kernel is [patch width, patch height, channels, features], the transpose of torch's.
    """

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        size = config.patch_size
        shape = (size, size, config.num_channels, config.hidden_size)
        init = nnx.initializers.normal(config.initializer_range)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.dtype = dtype

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Embed pixels [B, channels, height, width]: [B, patches, features], row by row."""
        kernel = self.kernel[...]
        size, *_, features = kernel.shape
        batch, channels, height, width = pixels.shape
        rows, columns = height // size, width // size
        x = pixels[:, :, : rows * size, : columns * size]
        x = x.reshape(batch, channels, rows, size, columns, size)
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        matrix = kernel.transpose(2, 1, 0, 3).reshape(-1, features)
        precision = matmul_precision(self.dtype)
        return jnp.matmul(x.astype(self.dtype), matrix.astype(self.dtype), precision=precision)


class PreNormLayer(nnx.Module):
    """A transformer layer that normalises the input of each block and adds the block to it."""

    def __init__(self, config: LayerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        settings = dense(config, dtype, rngs)
        self.attention_norm = layer_norm(config, width, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.output_norm = layer_norm(config, width, rngs=rngs)
        self.intermediate = nnx.Linear(width, inner, **settings)
        self.output = nnx.Linear(inner, width, **settings)
        self.activation = activation(config.hidden_act)

    def __call__(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Apply the layer to x [B, L, H], attended as for `attend`: float32[B, L, H]."""
        x = x + self.attention(self.attention_norm(x), attended, None)
        return x + self.output(self.activation(self.intermediate(self.output_norm(x))))


class Vision(nnx.Module):
    """CLIP's vision transformer: images to the states of a class token and of patches.

    Args:
      config: the architecture.
      dtype: what the dense layers compute in; parameters are float32.
      rngs: for the initial parameters.
    """

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        width = config.hidden_size
        init = nnx.initializers.normal(config.initializer_range)
        self.config = config
        self.class_token = nnx.Param(init(rngs.params(), (width,), jnp.float32))
        self.patches = PatchEmbedding(config, dtype=dtype, rngs=rngs)
        self.position = nnx.Embed(config.patches + 1, width, embedding_init=init, rngs=rngs)
        self.pre_norm = layer_norm(config, width, rngs=rngs)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([PreNormLayer(config, dtype=dtype, rngs=rngs) for _ in layers])
        # Over the class token, for CLIP's own use. FLMR takes states from before it; it is here so
        # that a checkpoint is written whole.
        self.post_norm = layer_norm(config, width, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, ...]:
        """Compute the states before the first and after every layer.

        Args:
          pixels: float32[B, channels, height, width], normalised, of the configuration's size.

        Returns:
          float32[B, 1 + patches, hidden_size] each, the class token first. The last is what
          transformers calls last_hidden_state: `post_norm` is not applied.

        Raises:
          ValueError: images of another size.
        """
        if pixels.shape[1:] != self.config.image_shape:
            raise ValueError(
                f"images are {list(pixels.shape[1:])}, the vision encoder takes "
                f"{list(self.config.image_shape)} (channels, height, width)"
            )
        x = self.patches(pixels).astype(jnp.float32)
        first = jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[-1]))
        x = self.pre_norm(jnp.concatenate([first, x], axis=1) + self.position.embedding[...])
        attended = jnp.ones(x.shape[:2], bool)
        states = [x]
        for layer in self.layers:
            x = layer(x, attended)
            states.append(x)
        return tuple(states)


_TENSORS = {
    "patches": "embeddings.patch_embedding",
    "position": "embeddings.position_embedding",
    "pre_norm": "pre_layrnorm",  # as it is spelt there
    "layers.*.attention_norm": "encoder.layers.*.layer_norm1",
    "layers.*.attention.query": "encoder.layers.*.self_attn.q_proj",
    "layers.*.attention.key": "encoder.layers.*.self_attn.k_proj",
    "layers.*.attention.value": "encoder.layers.*.self_attn.v_proj",
    "layers.*.attention.output": "encoder.layers.*.self_attn.out_proj",
    "layers.*.output_norm": "encoder.layers.*.layer_norm2",
    "layers.*.intermediate": "encoder.layers.*.mlp.fc1",
    "layers.*.output": "encoder.layers.*.mlp.fc2",
    "post_norm": "post_layernorm",
}


def vision_names(config: VisionConfig, prefix: str = "") -> dict[tuple, str]:
    """Map paths in the NNX state of `Vision` to names of transformers' tensors, after `prefix`.

    A `kernel` is the transpose of its tensor, all axes in reverse order.
    """
    names = named_tensors(_TENSORS, config.num_hidden_layers, _leaves, prefix)
    return names | {("class_token",): f"{prefix}embeddings.class_embedding"}


def _leaves(module: str) -> Mapping[str, str]:
    if module == "patches":
        return {"kernel": "weight"}
    if module == "position":
        return {"embedding": "weight"}
    return {("scale" if module.endswith("norm") else "kernel"): "weight", "bias": "bias"}


def vision_config(fields: Mapping[str, Any]) -> VisionConfig:
    """Read the architecture from the fields of a `CLIPVisionConfig`, all of which are there.

    Raises ValueError, naming the field.
    """
    return VisionConfig(**{name: fields[name] for name in VisionConfig.__dataclass_fields__})


def image_size_of(positions: int, patch_size: int) -> int | None:
    """The size of square images that have so many positions, or None if there is none."""
    side = math.isqrt(max(positions - 1, 0))
    return side * patch_size if side and side * side == positions - 1 else None
