"""Parts that backbones share: attention, the post-layer-norm transformer layer, embeddings.

Parameters are float32; `dtype` is what the dense layers compute in. Layer normalisation and the
softmax are always float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from colbert_jax.models.activations import activation
from colbert_jax.models.config import BackboneConfig, LayerConfig
from colbert_jax.models.rotary import Rotation, rotate

# Added to the attention score of a token that must not be attended to. It is finite, so that a row
# with nothing to attend to gives an average and not NaN; nothing but the score may be added to it.
MASKED = float(jnp.finfo(jnp.float32).min)


# How many positions before and after its own a token may look; None: all.
Reach = tuple[int | None, int | None]

# Longer sequences are attended in blocks of rows, so that memory grows with the length and not with
# its square; a block's scores have about so many numbers.
_WHOLE = 1024
_BLOCK = 1 << 24


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Return the precision of matrix products of a type.

    For float32 it is the highest: by default accelerators round to bfloat16 or TF32.
    """
    highest = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if highest else jax.lax.Precision.DEFAULT


def dense(config: LayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, Any]:
    """Return the keyword arguments for every `nnx.Linear` of a backbone."""
    return dict(
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dtype=dtype,
        precision=matmul_precision(dtype),
        dot_general=rows_product,
        rngs=rngs,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows_product(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision)


def _rows_product_forward(x: jax.Array, kernel: jax.Array, precision: Any) -> Any:
    return _rows_product(x, kernel, precision), (x, kernel)


def _rows_product_backward(precision: Any, kept: Any, gradient: jax.Array) -> Any:
    x, kernel = kept
    rows = tuple(range(x.ndim - 1))
    of_x = jax.lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())), precision)
    return of_x, jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())), precision)


_rows_product.defvjp(_rows_product_forward, _rows_product_backward)


def rows_product(
    x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None, **settings: Any
) -> jax.Array:
    """`jax.lax.dot_general` of rows [..., K] and a kernel [K, M], for `nnx.Linear`.

    JAX's gradient of the kernel is the transpose of a product, which XLA turns on a CPU into a
    product of a form that its fast library does not take. This one transposes x, which pays where
    it is no wider than the output.
    """
    plain = all(value is None for value in settings.values())
    if kernel.shape[0] <= kernel.shape[1] and plain:
        return _rows_product(x, kernel, precision)
    return jax.lax.dot_general(x, kernel, dimensions, precision, **settings)


def layer_norm(
    config: LayerConfig, width: int, *, use_bias: bool = True, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """Make a layer normalisation over `width` features."""
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    return nnx.LayerNorm(
        width,
        epsilon=config.layer_norm_eps,
        use_bias=use_bias,
        use_fast_variance=False,
        rngs=rngs,
    )


@dataclass(frozen=True)
class TrainMode:
    """What differs in training: dropout, and layers that are computed again in the backward pass.

    keys: [B], a random key for each row, so that a row's dropout depends neither on the other rows
      of its batch nor on its device.
    dropout: share of the activations that become 0 (Srivastava et al., 2014); the others grow by
      1 / (1 - dropout).
    remat: keep only the inputs of layers; activations inside are computed again for gradients.
    """

    keys: jax.Array
    dropout: float = 0.0
    remat: bool = False

    def at(self, place: int) -> TrainMode:
        """Return the mode with the random keys for one place in the model."""
        return TrainMode(_fold(self.keys, place), self.dropout, self.remat)


@partial(jax.vmap, in_axes=(0, None))
def _fold(key: jax.Array, place: int) -> jax.Array:
    return jax.random.fold_in(key, place)


def drop(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Apply dropout to one row with its key."""
    kept = _random_words(key, x.shape) >= np.uint32(rate * (1 << 32))
    return jnp.where(kept, x * (1 / (1 - rate)), 0).astype(x.dtype)


def _random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32[shape]: a hash of each value's place and the key's last two words.

    JAX's own generator took half of the time of attention in training on a CPU. What makes it
    dear, that nobody can tell its numbers from random ones on purpose, dropout does not need.
    """
    first, second = jax.random.key_data(key)[-2:]
    place = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _mixed(_mixed(place + first) ^ second)


def _mixed(x: jax.Array) -> jax.Array:
    """Mix the bits of 32-bit words, one to one: MurmurHash3's finaliser (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def dropped(x: jax.Array, train: TrainMode | None, place: int) -> jax.Array:
    """Apply dropout to x [B, ...] at a place in the model. If `train` is None, return x."""
    if train is None or not train.dropout:
        return x
    return jax.vmap(partial(drop, rate=train.dropout))(x, train.at(place).keys)


def run_layers(
    layers: nnx.List, call: Callable[..., jax.Array], x: jax.Array, train: TrainMode | None
) -> jax.Array:
    """Run layers one after the other: x = call(i, layer, x, train).

    Args:
      train: each layer gets other random keys. If None, the model is not being trained.
    """
    for i, layer in enumerate(layers):
        mode = None if train is None else train.at(i + 1)
        run = partial(call, i, layer, train=mode)
        x = jax.checkpoint(run)(x) if train is not None and train.remat else run(x)
    return x


def check_length(ids: jax.Array, longest: int) -> None:
    """Raise ValueError if sequences have more tokens than the model has positions."""
    if ids.shape[1] > longest:
        raise ValueError(f"sequences of {ids.shape[1]} tokens; the model has {longest} positions")


def positions_after_padding(ids: jax.Array, padding: int) -> jax.Array:
    """Number tokens from padding + 1 on; padding tokens get `padding` (fairseq): int32[B, L]."""
    counted = (ids != padding).astype(jnp.int32)
    return jnp.cumsum(counted, axis=1) * counted + padding


class WordEmbeddings(nnx.Module):
    """The normalised sum of word and token type embeddings; positions come in later."""

    def __init__(self, config: BackboneConfig, *, token_types: int = 0, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        embed = partial(nnx.Embed, features=config.hidden_size, embedding_init=normal, rngs=rngs)
        self.word = embed(config.vocab_size)
        self.token_type = embed(token_types) if token_types else None
        self.norm = layer_norm(config, config.hidden_size, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Embed ids int32[B, L]: float32[B, L, hidden_size]."""
        x = self.word(ids)
        return self.norm(x if self.token_type is None else x + self.token_type.embedding[0])


class Embeddings(nnx.Module):
    """The normalised sum of word, position and, if `token_types` > 0, token type embeddings."""

    def __init__(
        self,
        config: BackboneConfig,
        *,
        token_types: int = 0,
        width: int | None = None,
        rngs: nnx.Rngs,
    ):
        width = width or config.hidden_size
        normal = nnx.initializers.normal(config.initializer_range)
        embed = partial(nnx.Embed, features=width, embedding_init=normal, rngs=rngs)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(token_types) if token_types else None
        self.norm = layer_norm(config, width, rngs=rngs)

    def __call__(
        self, ids: jax.Array, positions: jax.Array, types: jax.Array | None = None
    ) -> jax.Array:
        """Embed ids int32[B, L] at positions int32[B, L] or [L]: float32[B, L, width].

        types: int32[B, L], the token types. If None, all are 0.
        """
        x = self.word(ids)
        if self.token_type is not None:
            x = x + (self.token_type.embedding[0] if types is None else self.token_type(types))
        return self.norm(x + self.position(positions))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    *,
    precision: jax.lax.Precision,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Compute scaled dot-product attention of one sequence.

    Args:
      query: [L, heads, head_dim].
      key, value: [L of the keys, heads, head_dim].
      bias: float32, broadcastable to [heads, L of the queries, L of the keys], added to the scores.
      dropout: applied to the attention weights. If None, no dropout.

    Returns:
      [L, heads, head_dim].
    """
    einsum = partial(jnp.einsum, precision=precision)
    scores = einsum("qhd,khd->hqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5 + bias, axis=-1)
    if dropout is not None:
        weights = dropout(weights)
    return einsum("hqk,khd->qhd", weights.astype(value.dtype), value)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attended: jax.Array,
    position_bias: jax.Array | None = None,
    train: TrainMode | None = None,
    reach: Reach | None = None,
) -> jax.Array:
    """Compute attention within each sequence of a batch, or from each to another one.

    Args:
      query: [B, L, heads, head_dim].
      key, value: [B, L of the keys, heads, head_dim].
      attended: bool[B, L of the keys], the tokens that others may attend to.
      position_bias: float32[heads or 1, L, L of the keys], added to the scores of every sequence;
        MASKED forbids a pair of positions. If None, nothing is added.
      train: dropout of the attention weights. If None, the model is not being trained.
      reach: see `Reach`. If None, every token may look at all.

    Returns:
      [B, L, heads * head_dim].
    """
    precision = matmul_precision(query.dtype)
    length = query.shape[1]
    if reach is not None and length <= _WHOLE:
        near = reach_bias(length, reach)
        position_bias = near if position_bias is None else jnp.where(near < 0, near, position_bias)
    if position_bias is None:
        position_bias = jnp.zeros((1, 1, 1), jnp.float32)
    rows = [query, key, value, attended]
    rate = 0.0 if train is None else train.dropout
    if train is not None and rate:
        rows.append(train.at(0).keys)

    def one(position_bias, query, key, value, attended, *random):
        bias = jnp.where(attended, position_bias, MASKED)
        dropout = partial(drop, key=random[0], rate=rate) if random else None
        return attention(query, key, value, bias, precision=precision, dropout=dropout)

    if length > _WHOLE:
        one = partial(_in_blocks, reach=reach or (None, None), precision=precision, rate=rate)

    # Weights that leave the cache for the backward pass take longer than to compute them again;
    # blocks do so themselves.
    again = jax.checkpoint(one, prevent_cse=False) if length <= _WHOLE else one

    def one_by_one(position_bias, *rows):
        return jax.lax.map(lambda row: again(position_bias, *row), rows)

    # On a CPU one sequence at a time keeps its attention matrices in cache: 2-4 times faster.
    y = jax.lax.platform_dependent(
        position_bias,
        *rows,
        cpu=one_by_one,
        default=jax.vmap(one, in_axes=(None, *[0] * len(rows))),
    )
    return y.reshape(*y.shape[:2], -1)


def _in_blocks(
    position_bias: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attended: jax.Array,
    *random: jax.Array,
    reach: Reach,
    precision: jax.lax.Precision,
    rate: float,
) -> jax.Array:
    """Attention of one sequence, some rows at a time; arguments as for `attend`.

    Where tokens look at their neighbours only, a block's scores are of these only.
    """
    (length, heads, head_dim), keys = query.shape, len(key)
    behind, ahead = reach
    near = None if behind is None or ahead is None else behind + ahead
    rows = _WHOLE
    while rows > 16 and heads * rows * min(keys, keys if near is None else rows + near) > _BLOCK:
        rows //= 2
    span = keys if near is None else min(rows + near, keys)
    blocks = -(-length // rows)
    padding = [(0, blocks * rows - length), (0, 0), (0, 0)]
    padded = jnp.pad(query, padding).reshape(blocks, rows, heads, head_dim)
    by_row = position_bias.shape[1] > 1
    if by_row:
        position_bias = jnp.pad(position_bias, [(0, 0), padding[0], (0, 0)])

    def block(i: jax.Array, query: jax.Array) -> jax.Array:
        at = i * rows
        first = (
            jnp.clip(at - (behind or 0), 0, keys - span) if near is not None else jnp.zeros_like(at)
        )
        near_key, near_value, allowed = (
            jax.lax.dynamic_slice_in_dim(x, first, span) for x in (key, value, attended)
        )
        bias = position_bias
        if by_row:
            bias = jax.lax.dynamic_slice_in_dim(bias, at, rows, axis=1)
        if bias.shape[2] > 1:
            bias = jax.lax.dynamic_slice_in_dim(bias, first, span, axis=2)
        distance = first + jnp.arange(span) - (at + jnp.arange(rows)[:, None])
        allowed = jnp.broadcast_to(allowed, distance.shape) & _within(distance, reach)
        dropout = None
        if random:
            dropout = partial(drop, key=jax.random.fold_in(random[0], i), rate=rate)
        bias = jnp.where(allowed, bias, MASKED)
        return attention(query, near_key, near_value, bias, precision=precision, dropout=dropout)

    # Recomputed for gradients: kept, the weights of all blocks are the matrix that blocks avoid.
    y = jax.lax.map(lambda block_of: jax.checkpoint(block)(*block_of), (jnp.arange(blocks), padded))
    return y.reshape(-1, *y.shape[2:])[:length]


def _within(distance: jax.Array, reach: Reach) -> jax.Array:
    """Whether keys at distances (key minus query) may be looked at: bool of the same shape."""
    behind, ahead = reach
    allowed = jnp.ones(distance.shape, bool)
    if behind is not None:
        allowed &= distance >= -behind
    if ahead is not None:
        allowed &= distance <= ahead
    return allowed


def reach_bias(length: int, reach: Reach) -> jax.Array:
    """Return 0 for pairs within reach and MASKED for others: float32[1, L, L]."""
    i = jnp.arange(length)
    return jnp.where(_within(i - i[:, None], reach), 0.0, MASKED)[None]


def sees_any(attended: jax.Array, reach: Reach | None) -> jax.Array:
    """Whether there is an attended token within reach of each: bool[B, L], or [B, 1] for all.

    attended: bool[B, L].
    """
    if reach is None:
        return attended.any(axis=-1, keepdims=True)
    behind, ahead = reach
    length = attended.shape[1]
    counts = jnp.pad(jnp.cumsum(attended.astype(jnp.int32), axis=1), [(0, 0), (1, 0)])
    i = np.arange(length)
    first = np.zeros_like(i) if behind is None else np.maximum(i - behind, 0)
    last = np.full_like(i, length) if ahead is None else np.minimum(i + ahead + 1, length)
    return counts[:, last] > counts[:, first]


class Attention(nnx.Module):
    """Multi-head attention with four dense layers, within a sequence or to another one."""

    def __init__(
        self, config: LayerConfig, *, use_bias: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        width, settings = config.hidden_size, dense(config, dtype, rngs)
        linear = partial(nnx.Linear, width, width, use_bias=use_bias, **settings)
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.query, self.key, self.value, self.output = linear(), linear(), linear(), linear()

    def __call__(
        self,
        x: jax.Array,
        attended: jax.Array,
        position_bias: jax.Array | None,
        train: TrainMode | None = None,
        *,
        other: jax.Array | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Apply attention to x [B, L, H], arguments as for `attend`: [B, L, H].

        other: [B, L of the keys, H], the sequence that x attends to. If None, x itself.
        rotation: of queries and keys (`rotary.rotary_tables`). If None, they are not rotated.
        """

        def split(y: jax.Array) -> jax.Array:  # [B, L, H] -> [B, L, heads, head_dim]
            return y.reshape(*y.shape[:2], self.heads, self.head_dim)

        source = x if other is None else other
        query, key, value = split(self.query(x)), split(self.key(source)), split(self.value(source))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return self.output(attend(query, key, value, attended, position_bias, train))


class PostNormLayer(nnx.Module):
    """The layer of the original transformer: each block is added to its input, then normalised."""

    def __init__(self, config: LayerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        settings = dense(config, dtype, rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_norm = layer_norm(config, width, rngs=rngs)
        self.intermediate = nnx.Linear(width, inner, **settings)
        self.output = nnx.Linear(inner, width, **settings)
        self.output_norm = layer_norm(config, width, rngs=rngs)
        self.activation = activation(config.hidden_act)

    def __call__(
        self,
        x: jax.Array,
        attended: jax.Array,
        position_bias: jax.Array | None = None,
        train: TrainMode | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Apply the layer to x [B, L, H], other arguments as for `attend`: float32[B, L, H]."""
        y = self.attention(x, attended, position_bias, train, rotation=rotation)
        x = self.attention_norm(x + dropped(y, train, 1))
        y = self.output(self.activation(self.intermediate(x)))
        return self.output_norm(x + dropped(y, train, 2))


def post_norm_layers(config: BackboneConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.List:
    """Make the layers of a post-layer-norm backbone."""
    layers = range(config.num_hidden_layers)
    return nnx.List([PostNormLayer(config, dtype=dtype, rngs=rngs) for _ in layers])


def run_post_norm_layers(
    layers: nnx.List,
    x: jax.Array,
    attended: jax.Array,
    position_bias: jax.Array | None = None,
    *,
    train: TrainMode | None = None,
    rotation: Rotation | None = None,
) -> jax.Array:
    """Apply the layers to x [B, L, H], other arguments as for `attend`: float32[B, L, H]."""

    def call(i: int, layer: PostNormLayer, x: jax.Array, train: TrainMode | None) -> jax.Array:
        return layer(x, attended, position_bias, train, rotation)

    return run_layers(layers, call, dropped(x, train, 0), train)
