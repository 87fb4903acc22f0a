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
from colbert_jax.compression.sharding import check_mesh, data_mesh, rows_spec, shard_rows
from colbert_jax.config import BUCKETS, NBITS

_BLOCK = 1 << 14  # tokens that a device compresses in a step
_LLOYD_MAX_ITERATIONS = 100  # each costs 2^b binary searches


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
        weight is the mean of its bucket, every cutoff halfway between two weights.

    Args:
      centroids: float32[K, D].
      heldout: [n, D], n >= 1.
      nbits: bits of a bucket: 1, 2, 4 or 8.
      buckets: "optimal" or "quantile".

    Raises:
      ValueError: unknown `buckets`, or D values of `nbits` bits do not fill whole bytes.
    """
    return codec_from_residuals(centroids, residuals_of(centroids, heldout), nbits, buckets)


def residuals_of(centroids: np.ndarray | jax.Array, values: np.ndarray) -> np.ndarray:
    """Subtract the nearest centroid, that with the largest dot product, from each embedding.

    Args:
      centroids: float32[K, D].
      values: [n, D].

    Returns:
      float32[n, D].
    """
    if runtime.use_cpu_kernels():
        codes = cpu.nearest(cpu.groups_of(centroids), values)
    else:
        codes = nearest_blocks(values, jnp.asarray(centroids))
    return np.asarray(values, np.float32) - np.asarray(centroids)[codes]


def extended(codec: ResidualCodec, fresh: np.ndarray) -> ResidualCodec:
    """Return the codec with more centroids float32[F, D], of unit length, behind its own."""
    if len(fresh) == 0:
        return codec
    centroids = jnp.asarray(np.concatenate([codec.centroids, fresh]))
    if runtime.use_cpu_kernels():
        cpu.extend_groups(codec.centroids, centroids)
    return dataclasses.replace(codec, centroids=centroids)


def codec_from_residuals(
    centroids: np.ndarray, residuals: np.ndarray, nbits: int, buckets: str = "optimal"
) -> ResidualCodec:
    """Choose bucket cutoffs and weights by residuals float32[n, D]; as `train_codec` else."""
    check_packable(centroids.shape[1], nbits)
    if buckets not in BUCKETS:
        raise ValueError(f"buckets must be one of {BUCKETS}, got {buckets!r}")
    residuals = residuals.ravel().copy()
    residuals.sort()
    levels = np.arange(1 << nbits) / (1 << nbits)
    cutoffs = np.quantile(residuals, levels[1:])
    weights = np.quantile(residuals, levels + 0.5 / (1 << nbits))
    if buckets == "optimal":
        cutoffs, weights = _lloyd_max(residuals, weights)
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


def compress(
    codec: ResidualCodec, values: np.ndarray, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Compress embeddings to codes and packed residuals.

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
        return cpu.compress(groups, codec.bucket_cutoffs, reversed_bits(codec.nbits), values)
    mesh = data_mesh() if mesh is None else mesh
    check_mesh(mesh)
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
    codec = jax.device_put(codec, NamedSharding(mesh, PartitionSpec()))  # no copy if it is there
    pending = None
    for start in range(0, len(values), mesh.size * _BLOCK):
        chunk = values[start : start + mesh.size * _BLOCK]
        size = block_size(-(-len(chunk) // mesh.size), _BLOCK)

        def read(device: int, chunk: np.ndarray = chunk, size: int = size):
            return pad_to(chunk[device * size : (device + 1) * size], size)

        block = shard_rows(mesh, (size, *values.shape[1:]), read)
        following = slice(start, start + len(chunk)), _compress_sharded(mesh, codec, block)
        if pending is not None:
            yield pending
        pending = following
    if pending is not None:
        yield pending


@partial(jax.jit, static_argnames="mesh")
def _compress_sharded(
    mesh: Mesh, codec: ResidualCodec, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    spread = rows_spec(mesh)
    return jax.shard_map(
        _compress_block, mesh=mesh, in_specs=(PartitionSpec(), spread), out_specs=spread
    )(codec, values)


@jax.jit
def _compress_block(codec: ResidualCodec, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    values = values.astype(jnp.float32)
    codes = nearest(values, codec.centroids, jnp.zeros(codec.centroids.shape[0], jnp.float32))
    residuals = values - codec.centroids[codes]
    # A value equal to a cutoff is below it. For few cutoffs, comparing with all is fastest.
    method = "compare_all" if codec.nbits <= 4 else "scan"
    buckets = jnp.searchsorted(codec.bucket_cutoffs, residuals, side="left", method=method)
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
    bits = (buckets[..., None] >> jnp.arange(nbits)) & 1
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
