"""The arrays a search works on, and what it returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import next_power_of_two
from colbert_jax.compression.codec import decompress
from colbert_jax.scoring.maxsim import token_rows
from colbert_jax.scoring.residual import inverse_norms

_NORM_BLOCK = 1 << 14  # tokens
_RESULTS = (128, 1024)  # then powers of two
_FLOAT16 = float(np.finfo(np.float16).max)


class Hits(NamedTuple):
    """The best documents of each query, best first, equal scores by the smaller position.

    positions: int32[B, k], of documents in the collection, from 0.
    scores: float32[B, k].
    """

    positions: np.ndarray
    scores: np.ndarray


def check_k(k: Any) -> int:
    """A number of results as int. Raises ValueError unless it is a whole number >= 1."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k must be a whole number >= 1, got {k!r}")
    return int(k)


def result_size(k: int) -> int:
    """How many results programs are compiled to return for k: calls of any k share a few."""
    return next((size for size in _RESULTS if k <= size), next_power_of_two(k))


def concatenate_hits(parts: list[Hits]) -> Hits:
    """Hits of several batches as one; at least one batch."""
    return Hits(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class DamagedArrayError(ValueError):
    """An array of an index holds a value out of its range; `array` is its name in `IndexArrays`."""

    def __init__(self, array: str, holds: str):
        super().__init__(f"{array}: damaged: holds {holds}")
        self.array, self.holds = array, holds


def check_codes(right: Any, num_centroids: int) -> None:
    """Raises DamagedArrayError unless it is right that every code is a centroid."""
    if not right:
        raise DamagedArrayError("codes", f"a code outside 0..{num_centroids - 1}")


def check_lists(right: Any, num_documents: int) -> None:
    """Raises DamagedArrayError unless it is right that the lists hold documents only."""
    if not right:
        raise DamagedArrayError("lists", f"a document outside 0..{num_documents - 1}")


def check_centroids(least: Any, most: Any) -> None:
    """Raises DamagedArrayError for centroids that are NaN, or larger than float16 can say."""
    if not (least >= -_FLOAT16 and most <= _FLOAT16):
        raise DamagedArrayError("centroids", "NaN, or a value too large for a centroid")


class RawArrays(NamedTuple):
    """Uncompressed token embeddings: values [T, D] and offsets int32[N+1]."""

    values: jax.Array
    offsets: jax.Array


class IndexArrays(NamedTuple):
    """A compressed index.

    centroids: float32[K, D].
    bucket_weights: float32[2^b].
    codes: int32[T], the centroid of every token.
    residuals: uint8[T, D * b / 8].
    offsets: int32[N+1], document i holds tokens offsets[i]..offsets[i+1]-1.
    lists: int32[sum], for each centroid the positions of the documents that have a token there,
      ascending.
    list_offsets: int32[K+1].
    inverse_norms: float32[T], see `with_inverse_norms`; None where nothing has asked for them.
    recent_lists, recent_list_offsets: the lists of later documents, which `lists` does not cover;
      None where it covers all. See `join_lists`.
    """

    centroids: jax.Array
    bucket_weights: jax.Array
    codes: jax.Array
    residuals: jax.Array
    offsets: jax.Array
    lists: jax.Array
    list_offsets: jax.Array
    inverse_norms: jax.Array | None = None
    recent_lists: jax.Array | None = None
    recent_list_offsets: jax.Array | None = None


def list_lengths(arrays: IndexArrays) -> np.ndarray:
    """int64[K], the entries of every inverted list, both its parts together, on the host."""
    lengths = np.diff(_to_all_centroids(arrays, arrays.list_offsets))
    if arrays.recent_list_offsets is not None:
        lengths += np.diff(_to_all_centroids(arrays, arrays.recent_list_offsets))
    return lengths


def join_lists(arrays: IndexArrays) -> IndexArrays:
    """Append to every inverted list its recent part, on the host: one part that covers all."""
    list_offsets = _to_all_centroids(arrays, arrays.list_offsets)
    lists: Any = arrays.lists
    if arrays.recent_lists is not None:
        recent_offsets = _to_all_centroids(arrays, arrays.recent_list_offsets)
        ends = np.repeat(list_offsets[1:], np.diff(recent_offsets))
        lists = np.insert(np.asarray(lists), ends, arrays.recent_lists)
        list_offsets = list_offsets + recent_offsets
    return arrays._replace(
        lists=lists,
        list_offsets=list_offsets,  # type: ignore[arg-type]
        recent_lists=None,
        recent_list_offsets=None,
    )


def _to_all_centroids(arrays: IndexArrays, list_offsets: Any) -> np.ndarray:
    """int64[K+1]: lists are empty of centroids that were added after they were written."""
    list_offsets = np.asarray(list_offsets, np.int64)
    missing = len(arrays.centroids) + 1 - len(list_offsets)
    return np.pad(list_offsets, (0, missing), mode="edge") if missing else list_offsets


def check_placed(arrays: IndexArrays, num_documents: int | None = None) -> None:
    """Hold arrays on devices to their ranges: a program would clamp what is outside, in silence.

    Args:
      num_documents: that the lists may name, N if None.

    Raises:
      DamagedArrayError: one of them is out of range.
    """
    num_centroids = len(arrays.centroids)
    if num_documents is None:
        num_documents = len(arrays.offsets) - 1
    names = ("centroids", "codes", "lists")
    extremes = jax.device_get(_extremes({name: getattr(arrays, name) for name in names}))
    least, most = zip(*(extremes[name] for name in names), strict=True)
    check_centroids(least[0], most[0])
    check_codes(least[1] >= 0 and most[1] < num_centroids, num_centroids)
    check_lists(least[2] >= 0 and most[2] < num_documents, num_documents)


@jax.jit
def _extremes(arrays: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The smallest and the largest value of each and of 0; NaN where there is one."""
    return {name: (a.min(initial=0), a.max(initial=0)) for name, a in arrays.items()}


def with_inverse_norms(arrays: IndexArrays) -> IndexArrays:
    """The arrays with `inverse_norms`: 1 / |centroid + bucket weights| of every token.

    PLAID's last stage needs them. They are not on disk; computing them reads all residuals once.
    """
    if arrays.inverse_norms is not None:
        return arrays
    return arrays._replace(inverse_norms=token_inverse_norms(arrays))


@jax.jit
def token_inverse_norms(arrays: IndexArrays) -> jax.Array:
    """float32[T], a block of tokens at a time."""
    total = len(arrays.codes)
    block = min(_NORM_BLOCK, total)

    def step(i: jax.Array, norms: jax.Array) -> jax.Array:
        start = jnp.minimum(i * block, total - block)
        codes, residuals = (
            jax.lax.dynamic_slice_in_dim(array, start, block)
            for array in (arrays.codes, arrays.residuals)
        )
        part = inverse_norms(arrays.centroids, codes, residuals, arrays.bucket_weights)
        return jax.lax.dynamic_update_slice_in_dim(norms, part, start, 0)

    steps = -(-total // block) if block else 0
    return jax.lax.fori_loop(0, steps, step, jnp.zeros(total, jnp.float32))


def load_tokens(
    arrays: RawArrays | IndexArrays, positions: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Token embeddings of documents, decompressed where they are compressed.

    Args:
      positions: int32[n]; one outside 0..N-1 has no token.
      length: at least the longest of them.

    Returns:
      float32[n, length, D] and the mask bool[n, length].
    """
    rows, mask = token_rows(arrays.offsets, positions, length)
    if isinstance(arrays, RawArrays):
        return arrays.values[rows].astype(jnp.float32), mask
    return decompress(arrays, arrays.codes[rows], arrays.residuals[rows]), mask


def best_of(
    negated: jax.Array, positions: jax.Array, k: int, axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The k best: sorted by falling score, then by rising position.

    Args:
      negated, positions: [B, n], scores with the sign turned, and of which documents.
      axis: a mesh axis, inside `jax.shard_map`: the k best of all its devices.

    Returns:
      [B, min(k, n)] of each; with an axis [B, min(k, all n)], on every device the same.
    """
    negated, positions = (a[:, :k] for a in jax.lax.sort((negated, positions), num_keys=2))
    if axis is None:
        return negated, positions
    merged = [jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (negated, positions)]
    negated, positions = (a[:, :k] for a in jax.lax.sort(merged, num_keys=2))
    return negated, positions
