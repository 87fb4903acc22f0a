"""The residual codec (Santhanam et al., 2022, section 3.3): a centroid and b bits per dimension.

Packed bytes are the same as Stanford ColBERT's. The bucket of a dimension takes b consecutive bits,
the least significant first; eight consecutive bits make a byte, the first being the most
significant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from colbert_jax import runtime
from colbert_jax.compression import cpu
from colbert_jax.compression.assign import block_size, nearest, nearest_blocks, pad_to
from colbert_jax.compression.sharding import auto_mesh, data_mesh, rows_spec, shard_rows
from colbert_jax.config import BUCKETS, NBITS

_BLOCK = 1 << 14  # tokens that a device compresses in a step
_LLOYD_MAX_ITERATIONS = 100  # each costs 2^b binary searches
# Decompressed embeddings are brought to unit length, so only their direction counts, and the
# residual of a longer embedding may be rounded to a nearer one. The first is plain rounding.
SCALES = (1.0, 0.9, 1.1, 1.2, 1.3, 1.4)
_SCALED_NBITS = 4  # of 8 bits the error is nothing already
_SCALED_ROUNDS = 3  # of fitting buckets to scales
_SCALED_POINTS = 1 << 13  # held-out embeddings for that


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidualCodec:
    """Centroids, and the rounding of residuals to buckets.

    centroids: float32[K, D].
    bucket_cutoffs: float32[2^b - 1], ascending.
    bucket_weights: float32[2^b], the value that a bucket is decompressed to.
    """

    centroids: jax.Array | np.ndarray
    bucket_cutoffs: jax.Array | np.ndarray
    bucket_weights: jax.Array | np.ndarray

    @property
    def nbits(self) -> int:
        """Bits of a dimension's bucket, b."""
        return nbits_of(self.bucket_weights)

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales of embeddings that `compress` tries.

        All where values are rounded to the nearest weight, that is cutoffs lie halfway between two;
        Stanford's lie elsewhere, and have one.
        """
        weights = np.asarray(self.bucket_weights)
        halfway = (weights[1:] + weights[:-1]) / 2
        nearest = np.allclose(self.bucket_cutoffs, halfway, rtol=1e-5, atol=1e-7)
        return SCALES if nearest and self.nbits <= _SCALED_NBITS else SCALES[:1]


def nbits_of(bucket_weights: Any) -> int:
    """Return the bits of a bucket, b, for bucket weights float32[2^b]."""
    return bucket_weights.shape[0].bit_length() - 1


def check_packable(dim: int, nbits: int) -> None:
    """Raise ValueError unless `dim` values of `nbits` bits fill whole bytes."""
    if nbits not in NBITS:
        raise ValueError(f"nbits must be one of {NBITS}, got {nbits}")
    if dim * nbits % 8:
        raise ValueError(
            f"embeddings of {dim} dimensions at {nbits} bits do not fill whole bytes; "
            f"the dimension must be a multiple of {8 // nbits}"
        )


def train_codec(
    centroids: np.ndarray, heldout: np.ndarray, nbits: int, buckets: str = "optimal"
) -> ResidualCodec:
    """Choose bucket cutoffs and weights by the residuals of held-out embeddings.

    All dimensions share them. There are two rules:
      "quantile", Stanford's: with q_i = i / 2^b the cutoffs are the quantiles q_1.. of the
        residuals, and the weights the quantiles halfway between them;
      "optimal": starting from these, the smallest squared error (Lloyd, 1957; Max, 1960): every
        weight is the mean of its bucket, every cutoff halfway between two weights. Up to 4 bits
        then for the embeddings at the scales that `compress` chooses, in turn with choosing them.

    Args:
      centroids: float32[K, D].
      heldout: [n, D], n >= 1.
      nbits: bits of a bucket: 1, 2, 4 or 8.
      buckets: "optimal" or "quantile".

    Raises:
      ValueError: unknown `buckets`, or D values of `nbits` bits do not fill whole bytes.
    """
    near = np.asarray(centroids)[nearest_codes(centroids, heldout)]
    return codec_from_nearest(centroids, near, heldout, nbits, buckets)


@runtime.apart()
def nearest_codes(centroids: np.ndarray | jax.Array, values: np.ndarray) -> np.ndarray:
    """Return the nearest centroid of each embedding, that with the largest dot product.

    Args:
      centroids: float32[K, D].
      values: [n, D].

    Returns:
      int32[n].
    """
    if runtime.use_cpu_kernels():
        return cpu.nearest(cpu.groups_of(centroids), values)
    return nearest_blocks(values, jnp.asarray(centroids))


def extended(codec: ResidualCodec, fresh: np.ndarray) -> ResidualCodec:
    """Return the codec with more centroids float32[F, D], of unit length, behind its own."""
    if len(fresh) == 0:
        return codec
    centroids = jnp.asarray(np.concatenate([codec.centroids, fresh]))
    if runtime.use_cpu_kernels():
        cpu.extend_groups(codec.centroids, centroids)
    return dataclasses.replace(codec, centroids=centroids)


def codec_from_nearest(
    centroids: np.ndarray, near: np.ndarray, heldout: np.ndarray, nbits: int, buckets: str
) -> ResidualCodec:
    """As `train_codec`, with the nearest centroids float32[n, D] of the held-out embeddings."""
    check_packable(centroids.shape[1], nbits)
    if buckets not in BUCKETS:
        raise ValueError(f"buckets must be one of {BUCKETS}, got {buckets!r}")
    heldout = np.asarray(heldout, np.float32)
    residuals = np.sort((heldout - near).ravel())
    levels = np.arange(1 << nbits) / (1 << nbits)
    cutoffs = np.quantile(residuals, levels[1:])
    weights = np.quantile(residuals, levels + 0.5 / (1 << nbits))
    if buckets == "optimal":
        cutoffs, weights = _lloyd_max(residuals, weights)
        if nbits <= _SCALED_NBITS:
            step = -(-len(heldout) // _SCALED_POINTS)
            cutoffs, weights = _fit_to_scales(near[::step], heldout[::step], weights)
    return ResidualCodec(
        jnp.asarray(centroids),
        jnp.asarray(cutoffs.astype(np.float32)),
        jnp.asarray(weights.astype(np.float32)),
    )


def _lloyd_max(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cutoffs and weights with the smallest squared error for ascending values."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.float64)])
    for _ in range(_LLOYD_MAX_ITERATIONS):
        cutoffs = (weights[1:] + weights[:-1]) / 2
        ends = np.searchsorted(values, [-np.inf, *cutoffs, np.inf])
        counts = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(counts, 1)
        weights = np.where(counts > 0, means, weights)
    return (weights[1:] + weights[:-1]) / 2, weights


def _fit_to_scales(
    near: np.ndarray, heldout: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cutoffs and weights for embeddings at the scales that round to the nearest direction."""
    for _ in range(_SCALED_ROUNDS):
        cutoffs = (weights[1:] + weights[:-1]) / 2
        best, scales = np.full(len(heldout), -np.inf), np.ones((len(heldout), 1), np.float32)
        for scale in SCALES:
            residuals = np.float32(scale) * heldout - near
            rounded = near + weights[np.searchsorted(cutoffs, residuals)]
            norms = np.maximum(np.linalg.norm(rounded, axis=1), 1e-12)
            cosines = np.einsum("nd,nd->n", heldout, rounded) / norms
            better = cosines > best
            best[better], scales[better] = cosines[better], scale
        cutoffs, weights = _lloyd_max(np.sort((scales * heldout - near).ravel()), weights)
    return cutoffs, weights


@runtime.apart()
def compress(
    codec: ResidualCodec, values: np.ndarray, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Compress embeddings to codes and packed residuals.

    The residual of s x, for x at the scale s, is rounded; of `ResidualCodec.scales` s is the one
    whose decompressed embedding has the largest cosine with x, the first of several.

    Args:
      values: [n, D].
      mesh: devices of this process that share the work, in one axis. If None, the default device.

    Returns:
      codes int32[n], the centroids with the largest dot product, and residuals uint8[n, D * b / 8].

    Raises:
      ValueError: the mesh has several axes, or devices of other processes.
    """
    if mesh is None and runtime.use_cpu_kernels():
        groups = cpu.groups_of(codec.centroids)
        return cpu.compress(groups, codec, reversed_bits(codec.nbits), values)
    mesh = data_mesh() if mesh is None else auto_mesh(mesh)
    if any(d.process_index != jax.process_index() for d in mesh.devices.flat):
        raise ValueError("compress runs on devices of this process, the mesh has others")
    dim = codec.centroids.shape[1]
    codes = np.empty(len(values), np.int32)
    packed = np.empty((len(values), dim * codec.nbits // 8), np.uint8)
    for rows, block in _compressed(mesh, codec, values):
        codes[rows], packed[rows] = (np.asarray(part)[: rows.stop - rows.start] for part in block)
    return codes, packed


def _compressed(
    mesh: Mesh, codec: ResidualCodec, values: np.ndarray
) -> Iterator[tuple[slice, tuple[jax.Array, jax.Array]]]:
    """Blocks of rows with their codes and residuals, computed one block ahead."""
    scales = codec.scales
    codec = jax.device_put(codec, NamedSharding(mesh, PartitionSpec()))  # no copy if it is there
    pending = None
    for start in range(0, len(values), mesh.size * _BLOCK):
        chunk = values[start : start + mesh.size * _BLOCK]
        size = block_size(-(-len(chunk) // mesh.size), _BLOCK)

        def read(device: int, chunk: np.ndarray = chunk, size: int = size):
            return pad_to(chunk[device * size : (device + 1) * size], size)

        block = shard_rows(mesh, (size, *values.shape[1:]), read)
        following = slice(start, start + len(chunk)), _compress_sharded(mesh, scales, codec, block)
        if pending is not None:
            yield pending
        pending = following
    if pending is not None:
        yield pending


@partial(jax.jit, static_argnames=("mesh", "scales"))
def _compress_sharded(
    mesh: Mesh, scales: tuple[float, ...], codec: ResidualCodec, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    spread = rows_spec(mesh)
    return jax.shard_map(
        partial(_compress_block, scales),
        mesh=mesh,
        in_specs=(PartitionSpec(), spread),
        out_specs=spread,
    )(codec, values)


@partial(jax.jit, static_argnums=0)
def _compress_block(
    scales: tuple[float, ...], codec: ResidualCodec, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    values = values.astype(jnp.float32)
    codes = nearest(values, codec.centroids, jnp.zeros(codec.centroids.shape[0], jnp.float32))
    near = codec.centroids[codes]
    # A value equal to a cutoff is below it. For few cutoffs, comparing with all is fastest.
    method = "compare_all" if codec.nbits <= 4 else "scan"

    def rounded(scale: Any) -> jax.Array:
        residuals = scale * values - near
        buckets = jnp.searchsorted(codec.bucket_cutoffs, residuals, side="left", method=method)
        return buckets.astype(jnp.uint8)

    if len(scales) == 1:
        return codes, pack(rounded(scales[0]), codec.nbits)

    def better(best: tuple[jax.Array, jax.Array], scale: jax.Array) -> tuple[Any, None]:
        cosines, buckets = best
        others = rounded(scale)
        direction = near + codec.bucket_weights[others]
        norms = jnp.maximum(jnp.linalg.norm(direction, axis=-1), 1e-12)
        theirs = (values * direction).sum(axis=-1) / norms
        nearer = theirs > cosines
        buckets = jnp.where(nearer[:, None], others, buckets)
        return (jnp.where(nearer, theirs, cosines), buckets), None

    nothing = jnp.full_like(values[:, 0], -jnp.inf), jnp.zeros_like(values, jnp.uint8)
    (_, buckets), _ = jax.lax.scan(better, nothing, jnp.asarray(scales, jnp.float32))
    return codes, pack(buckets, codec.nbits)


def decompress(codec: Any, codes: jax.Array, residuals: jax.Array) -> jax.Array:
    """Decompress token embeddings, and normalise them.

    Args:
      codec: a ResidualCodec or IndexArrays, for their `centroids` and `bucket_weights`.
      codes: int32[...].
      residuals: uint8[..., D * b / 8].

    Returns:
      float32[..., D].
    """
    values = codec.centroids[codes] + unpack_weights(codec.bucket_weights, residuals)
    return values / jnp.maximum(jnp.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def decompress_on_host(codec: Any, codes: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """As `decompress`, by numpy, for blocks of any size: no program is compiled."""
    weights = np.asarray(codec.bucket_weights)
    table = weights[unpack(np.arange(256, dtype=np.uint8)[:, None], nbits_of(weights))]
    values = table[residuals].reshape(len(codes), residuals.shape[1] * table.shape[1])
    values += np.asarray(codec.centroids)[codes]
    values /= np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
    return values


def unpack_weights(bucket_weights: jax.Array, residuals: jax.Array) -> jax.Array:
    """Unpack residuals uint8[..., P] to the weights of their buckets float32[..., P * 8 / b]."""
    nbits = nbits_of(bucket_weights)
    table = bucket_weights[unpack(np.arange(256, dtype=np.uint8)[:, None], nbits)]
    return table[residuals].reshape(*residuals.shape[:-1], residuals.shape[-1] * 8 // nbits)


def pack(buckets: jax.Array, nbits: int) -> jax.Array:
    """Pack buckets int[..., D] in 0..2^b-1 into bytes uint8[..., D * b / 8]."""
    bits = (buckets[..., None].astype(jnp.int32) >> jnp.arange(nbits)) & 1
    bits = bits.reshape(*buckets.shape[:-1], -1, 8)
    return (bits << jnp.arange(7, -1, -1)).sum(axis=-1).astype(jnp.uint8)


def reversed_bits(nbits: int) -> np.ndarray:
    """Reverse the b bits of every bucket, which is how a packed byte has them: int64[2^b]."""
    bits = (np.arange(1 << nbits)[:, None] >> np.arange(nbits)) & 1
    return (bits << np.arange(nbits - 1, -1, -1)).sum(axis=1)


def unpack(packed: np.ndarray, nbits: int) -> np.ndarray:
    """Unpack bytes uint8[..., P] to buckets int32[..., P * 8 / b], the inverse of `pack`."""
    bits = (packed[..., None].astype(np.int32) >> np.arange(7, -1, -1)) & 1
    bits = bits.reshape(*packed.shape[:-1], -1, nbits)
    return (bits << np.arange(nbits)).sum(axis=-1)
