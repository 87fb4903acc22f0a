"""Exact search of token embeddings that are not compressed, without an index."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import next_power_of_two
from colbert_jax.runtime import use_cpu_kernels
from colbert_jax.search.arrays import Hits, RawArrays, concatenate_hits
from colbert_jax.search.cpu import cpu_exact_raw
from colbert_jax.search.exact import QUERIES, exact_search


class RawSearch:
    """Documents' token embeddings, searched exactly any number of times.

    numba's kernels score them in place on a CPU (`runtime.use_cpu_kernels`), XLA elsewhere.
    """

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        """
        Args:
          values: float32[T, D].
          offsets: int[N+1], document i holds values offsets[i]..offsets[i+1]-1.
        """
        self.lengths = np.diff(offsets)
        self._on_host: tuple[np.ndarray, np.ndarray] | None = None
        if use_cpu_kernels():
            self._on_host = np.ascontiguousarray(values, np.float32), offsets
        else:
            # Powers of two of both, so that collections of any size share a few programs.
            tokens, n = len(values), len(self.lengths)
            values = np.pad(values, [(0, next_power_of_two(tokens) - tokens), (0, 0)])
            offsets = np.pad(offsets, (0, next_power_of_two(n) - n), mode="edge")
            self._placed = RawArrays(jnp.asarray(values), jnp.asarray(offsets, jnp.int32))

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """The k best documents of each query float32[B, Lq, D], equal ones by position.

        At least k documents have a token.
        """
        if self._on_host is None:
            return exact_search(self._placed, self.lengths, queries, k)
        parts = [queries[i : i + QUERIES] for i in range(0, len(queries), QUERIES)]
        return concatenate_hits([Hits(*cpu_exact_raw(*self._on_host, part, k)) for part in parts])
