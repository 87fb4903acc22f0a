"""An index's arrays on one device, with room for documents that are added later.

Tokens, documents and list entries have room up to a power of two. Programs are compiled for the
room: an index that grows needs no other programs until it is full. What lies beyond the index in
them is documents without a token, and is never read.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import next_power_of_two
from colbert_jax.scoring.residual import inverse_norms
from colbert_jax.search.arrays import IndexArrays, join_lists, with_inverse_norms
from colbert_jax.search.learned import LearnedArrays

_BLOCK = 1 << 16  # tokens copied to the device at a time, and the least room for them
_FEWEST_DOCUMENTS = 1 << 10
_FEWEST_ENTRIES = 1 << 16
_LARGE = 1 << 24  # from here on a power of two would waste memory
_INT32 = np.iinfo(np.int32).max


def room_for(count: int, least: int = 1) -> int:
    """Round up to a power of two; a large number to the next sixteenth of it."""
    room = next_power_of_two(max(count, least))
    if room > _LARGE:
        room = -(-count // (room // 16)) * (room // 16)
    return min(room, _INT32)


def place(arrays: IndexArrays, device: jax.Device | None) -> IndexArrays:
    """Copy an index to a device as it is. A CPU uses mapped arrays without a copy.

    Args:
      arrays: on the host.
      device: If None, the default device.
    """
    arrays = join_lists(arrays)
    narrow = arrays._replace(
        offsets=np.asarray(arrays.offsets).astype(np.int32),  # type: ignore[arg-type]
        list_offsets=np.asarray(arrays.list_offsets).astype(np.int32),  # type: ignore[arg-type]
    )
    put = partial(jax.device_put, device=device, may_alias=True)
    return with_inverse_norms(jax.tree.map(put, narrow))


def place_with_room(
    arrays: IndexArrays,
    device: jax.Device | None,
    former: IndexArrays | None = None,
    num_tokens: int = 0,
) -> IndexArrays:
    """Copy an index to a device, with room to grow.

    Args:
      arrays, device: as for `place`.
      former: arrays on the device that hold the first `num_tokens` tokens already; only the others
        are copied from the host. They stay as they are.
    """
    total = len(arrays.codes)
    put = partial(jax.device_put, device=device)
    centroids, weights = put((np.asarray(arrays.centroids), np.asarray(arrays.bucket_weights)))
    kept = None if former is None else (former.codes, former.residuals, former.inverse_norms)
    room = max(room_for(total, _BLOCK), 0 if former is None else len(former.codes))
    if kept is not None and len(kept[0]) == room:
        kept = jax.device_put(kept, may_alias=False)  # a copy, made without a program
    else:
        empty = (
            jnp.zeros(room, np.int32, device=device),
            jnp.zeros((room, arrays.residuals.shape[1]), np.uint8, device=device),
            jnp.zeros(room, np.float32, device=device),
        )
        kept = empty if kept is None else _overwritten(empty, kept, 0)
    block = min(_BLOCK, room)
    for at in range(num_tokens, total, block):
        start = min(at, room - block)  # from here on a block has room
        rows = tuple(
            _filled(column[start : start + block], block)
            for column in (arrays.codes, arrays.residuals)
        )
        kept = _written(kept, centroids, weights, rows, np.int32(start))
    joined = join_lists(arrays)
    offsets, lists = np.asarray(joined.offsets), np.asarray(joined.lists)
    documents = room_for(len(offsets) - 1, _FEWEST_DOCUMENTS)
    lists = _filled(lists, room_for(len(lists), _FEWEST_ENTRIES))
    padded = np.pad(offsets, (0, documents + 1 - len(offsets)), mode="edge").astype(np.int32)
    list_offsets = np.asarray(joined.list_offsets).astype(np.int32)
    codes, residuals, norms = kept
    padded, lists, list_offsets = put((padded, lists, list_offsets))
    return IndexArrays(
        centroids, weights, codes, residuals, padded, lists, list_offsets, inverse_norms=norms
    )


def place_learned(
    learned: LearnedArrays, device: jax.Device | None, documents: int
) -> LearnedArrays:
    """Copy learned vectors to a device, with room for so many documents; as `place` else."""
    landmarks, projection, *rows = map(np.asarray, learned)
    if len(rows[0]) < documents:
        rows = [_filled(column, documents) for column in rows]
    arrays = LearnedArrays(landmarks, projection, *rows)  # type: ignore[arg-type]
    return jax.tree.map(partial(jax.device_put, device=device, may_alias=True), arrays)


def _filled(rows: Any, count: int) -> np.ndarray:
    """Rows and zeros after them, `count` together."""
    rows = np.asarray(rows)
    return np.pad(rows, [(0, count - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


@partial(jax.jit, donate_argnums=0)
def _written(columns, centroids, weights, rows, start):
    """The columns codes, residuals and norms with other rows from `start` on, in place."""
    codes, residuals = rows
    norms = inverse_norms(centroids, codes, residuals, weights)
    return _overwritten(columns, (codes, residuals, norms), start)


@partial(jax.jit, donate_argnums=0)
def _overwritten(columns, rows, start):
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(column, some, start, 0)
        for column, some in zip(columns, rows, strict=True)
    )
