"""FLMR's image side (Lin et al., 2023) and PreFLMR's (2024): images to token embeddings.

Three stages, each to be called alone: the vision encoder; a perceptron from the state of its class
token; a small transformer from the states of its patches, which attends to the query's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from colbert_jax.config import require, require_types
from colbert_jax.models.bert import BertConfig
from colbert_jax.models.colbert import OneKey, TokenEncoder, merged, unit_length
from colbert_jax.models.config import named_tensors
from colbert_jax.models.layers import (
    Attention,
    PostNormLayer,
    TrainMode,
    dense,
    dropped,
    layer_norm,
)
from colbert_jax.models.vision import Vision, VisionConfig, vision_names


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """The architecture of the image side.

    vision: the vision encoder.
    dim: width of the token embeddings.
    prefix_length: token embeddings made of one class token.
    mapping: the transformer over patches, of whose fields those of layers count. Its width is that
      of the text encoder. If None, patches give no token embeddings (FLMR).
    cross_length: how many tokens of the text patches attend to, at most.

    Raises ValueError for values that do not fit together.
    """

    vision: VisionConfig
    dim: int
    prefix_length: int = 32
    mapping: BertConfig | None = None
    cross_length: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("dim", "prefix_length", "cross_length"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")

    def rows(self, regions: int = 1) -> int:
        """Number of token embeddings of an image with so many regions."""
        patches = 0 if self.mapping is None else self.vision.patches
        return regions * (self.prefix_length + patches)


class Seen(NamedTuple):
    """What the vision encoder gives of N images.

    class_token: float32[N, hidden_size], its last state.
    patches: float32[N, patches, hidden_size], their second-last states.
    states: all of the states, see `Vision`; attentions: float32[N, heads, 1 + patches, 1 + patches]
      of every layer. None where they were not asked for.
    """

    class_token: jax.Array
    patches: jax.Array
    states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class Perceptron(nnx.Module):
    """Two dense layers with tanh between them: one vector to `prefix_length` token embeddings."""

    def __init__(self, config: ImageEncoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.dim * config.prefix_length
        settings = dense(config.vision, dtype, rngs)
        self.inner = nnx.Linear(config.vision.hidden_size, width // 2, **settings)
        self.output = nnx.Linear(width // 2, width, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(jnp.tanh(self.inner(x))).astype(jnp.float32)


class CrossLayer(PostNormLayer):
    """A post-layer-norm layer that attends to its own sequence, then to another one."""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.cross = Attention(config, dtype=dtype, rngs=rngs)
        self.cross_norm = layer_norm(config, config.hidden_size, rngs=rngs)

    def attend_to(
        self, x: jax.Array, other: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Apply the layer to x [B, L, H] and `other` [B, L of it, H]: float32[B, L, H].

        train: dropout. If None, the model is not being trained.
        """

        def every(y: jax.Array) -> jax.Array:
            return jnp.ones(y.shape[:2], bool)

        y = self.attention(x, every(x), None, train)
        x = self.attention_norm(x + dropped(y, train, 1))
        own = None if train is None else train.at(3)  # other random keys than the first's
        y = self.cross(x, every(other), None, own, other=other)
        x = self.cross_norm(x + dropped(y, train, 4))
        y = self.output(self.activation(self.intermediate(x)))
        return self.output_norm(x + dropped(y, train, 2))


class Mapping(nnx.Module):
    """PreFLMR's transformer over patches: they attend to each other and to the text, both ways."""

    def __init__(self, config: ImageEncoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        assert config.mapping is not None
        width = config.mapping.hidden_size
        settings = dense(config.mapping, dtype, rngs)
        self.input = nnx.Linear(config.vision.hidden_size, width, **settings)
        layers = range(config.mapping.num_hidden_layers)
        self.layers = nnx.List([CrossLayer(config.mapping, dtype=dtype, rngs=rngs) for _ in layers])
        self.output = nnx.Linear(width, config.dim, **settings)

    def __call__(
        self, patches: jax.Array, text: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        x = self.input(patches).astype(jnp.float32)
        for i, layer in enumerate(self.layers):
            x = layer.attend_to(x, text, None if train is None else train.at(i + 1))
        return self.output(x).astype(jnp.float32)


class ImageEncoder(nnx.Module):
    """Images to token embeddings, before they are normalised.

    Args:
      config: the architecture.
      dtype: what the dense layers compute in; parameters are float32.
      rngs: for the initial parameters.
    """

    def __init__(
        self, config: ImageEncoderConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.vision = Vision(config.vision, dtype=dtype, rngs=rngs)
        self.projection = Perceptron(config, dtype=dtype, rngs=rngs)
        self.mapping = None if config.mapping is None else Mapping(config, dtype=dtype, rngs=rngs)

    def see(self, pixels: jax.Array) -> Seen:
        """Run the vision encoder over N images; arguments and errors as for `Vision`."""
        states = self.vision(pixels)
        return Seen(states[-1][:, 0], states[-2][:, 1:], states)

    def project(self, class_tokens: jax.Array) -> jax.Array:
        """Turn class tokens float32[B, regions, hidden_size] into token embeddings.

        Returns:
          float32[B, regions * prefix_length, D].
        """
        rows = self.projection(class_tokens)
        return rows.reshape(len(rows), -1, self.config.dim)

    def rows(
        self,
        class_tokens: jax.Array,
        patches: jax.Array | None,
        text: jax.Array | None,
        train: TrainMode | None = None,
    ) -> jax.Array:
        """Turn what the vision encoder gave into token embeddings: of class tokens, of patches.

        Args:
          class_tokens: as for `project`.
          patches, text, train: as for `map_patches`; no patches and text where patches give no
            token embeddings.

        Returns:
          float32[B, rows, D].
        """
        rows = self.project(class_tokens)
        if patches is None:
            return rows
        assert text is not None
        return jnp.concatenate([rows, self.map_patches(patches, text, train)], axis=1)

    def map_patches(
        self, patches: jax.Array, text: jax.Array, train: TrainMode | None = None
    ) -> jax.Array:
        """Turn states of patches into token embeddings; the regions of an image do not meet.

        Args:
          patches: float32[B, regions, patches, hidden_size].
          text: float32[B, L, H], the text encoder's last states of the queries. All of the first
            `cross_length` are attended to: instructions and [MASK]s too, as in the original.
          train: dropout, with a key for each region. If None, the model is not being trained.

        Returns:
          float32[B, regions * patches, D].
        """
        assert self.mapping is not None
        batch, regions = patches.shape[:2]
        text = jnp.repeat(text[:, : self.config.cross_length], regions, axis=0)
        rows = self.mapping(patches.reshape(batch * regions, *patches.shape[2:]), text, train)
        return rows.reshape(batch, -1, self.config.dim)


def query_rows(
    text: TokenEncoder,
    images: ImageEncoder,
    ids: jax.Array,
    attended: jax.Array,
    kept: jax.Array,
    pixels: jax.Array,
) -> jax.Array:
    """Compute the token embeddings of queries with an image each.

    Args:
      ids, attended, kept: as of `TokenEncoder`, int32[B, L], int32[B], bool[B, L].
      pixels: as of `Vision`, of B images.

    Returns:
      float32[B, L + rows, D], rows of unit length: of the text, of the image.
    """
    states = text.states(ids, attended)
    seen = images.see(pixels)
    patches = None if images.mapping is None else seen.patches[:, None]
    seen_rows = images.rows(seen.class_token[:, None], patches, states)
    words = text.project(states) * kept[..., None]
    return unit_length(jnp.concatenate([words, seen_rows], axis=1))


def image_rows(images: ImageEncoder, pixels: jax.Array) -> jax.Array:
    """Compute the token embeddings of documents' images, which are those of class tokens.

    Args:
      pixels: as of `Vision`, of B images.

    Returns:
      float32[B, prefix_length, D], rows of unit length.
    """
    return unit_length(images.rows(images.see(pixels).class_token[:, None], None, None))


@cache
def _structure(config: ImageEncoderConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    make = partial(ImageEncoder, config, dtype=dtype)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=OneKey())))  # type: ignore


def make_image_encoder(
    config: ImageEncoderConfig, params: dict, dtype: Any = jnp.float32
) -> ImageEncoder:
    """Make an image encoder from its parameters, inside a function that is jitted over them."""
    return merged(_structure(config, jnp.dtype(dtype)), params)


@cache
def image_shapes(config: ImageEncoderConfig) -> dict[tuple, tuple[int, ...]]:
    """Map paths in the nested dict of an image encoder's parameters to shapes."""
    flat = nnx.to_flat_state(_structure(config, jnp.dtype(jnp.float32))[1])
    return {path: tuple(leaf.shape) for path, leaf in flat}


_PROJECTION = {
    "projection.inner": "_vision_projection.model.0",
    "projection.output": "_vision_projection.model.2",
}
_LAYER = "transformer_mapping_network.layer.*"
_MAPPING = {
    "mapping.input": "transformer_mapping_input_linear",
    **{
        f"mapping.layers.*.{ours}{part}": f"{_LAYER}.{theirs}.{name}"
        for ours, theirs in (("attention", "attention"), ("cross", "crossattention"))
        for part, name in (
            (".query", "self.query"),
            (".key", "self.key"),
            (".value", "self.value"),
            (".output", "output.dense"),
            ("_norm", "output.LayerNorm"),
        )
    },
    "mapping.layers.*.intermediate": f"{_LAYER}.intermediate.dense",
    "mapping.layers.*.output": f"{_LAYER}.output.dense",
    "mapping.layers.*.output_norm": f"{_LAYER}.output.LayerNorm",
    "mapping.output": "transformer_mapping_output_linear",
}


def image_names(config: ImageEncoderConfig, side: str) -> dict[tuple, str]:
    """Map paths in the state of an `ImageEncoder` to tensor names of FLMR.

    side: "query" or "context", which these names begin with; the mapping network has none.
    """
    prefix = f"{side}_vision_encoder.vision_model.vision_model."
    names = {("vision", *path): name for path, name in vision_names(config.vision, prefix).items()}
    names |= named_tensors(_PROJECTION, 1, _leaves, side)
    if config.mapping is not None:
        names |= named_tensors(_MAPPING, config.mapping.num_hidden_layers, _leaves, "")
    return names


def _leaves(module: str) -> dict[str, str]:
    return {("scale" if module.endswith("norm") else "kernel"): "weight", "bias": "bias"}
