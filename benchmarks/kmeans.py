"""The two-level k-means and assignment of a CPU against comparing every token with all centroids.

    python benchmarks/kmeans.py CACHE [--passages 10000] [--output FILE]

CACHE is what `benchmarks/passages.py` filled. Both sides train on the same tokens with the same
number of centroids; the exact side is plain Lloyd from random points with numpy's matrix product.
Printed: seconds of both, and the mean squared residual of held-out tokens. Of the second, one row
compares the centroids alone (each token given its true nearest), the other all that a build does.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from passages import load

from colbert_jax.compression import cpu
from colbert_jax.compression.kmeans import num_centroids_for, train_kmeans
from colbert_jax.compression.refill import refill
from colbert_jax.progress import log_to_stderr
from colbert_jax.runtime import num_threads

_BLOCK = 8192


def exact_nearest(points: np.ndarray, centroids: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """int32[n], the centroid with the largest dot product plus bias, compared with all."""
    codes = np.empty(len(points), np.int32)
    for start in range(0, len(points), _BLOCK):
        block = np.asarray(points[start : start + _BLOCK], np.float32)
        codes[start : start + _BLOCK] = np.argmax(block @ centroids.T + bias, axis=1)
    return codes


def exact_kmeans(points: np.ndarray, num_centroids: int, iterations: int, seed: int) -> np.ndarray:
    """Plain Lloyd from random points, normalised."""
    rng = np.random.default_rng(seed)
    start = np.sort(rng.choice(len(points), num_centroids, replace=False))
    centroids = np.asarray(points[start], np.float32)
    for _ in range(iterations):
        codes = exact_nearest(points, centroids, -0.5 * np.square(centroids).sum(axis=1))
        counts = np.bincount(codes, minlength=num_centroids)
        order = np.argsort(codes, kind="stable")
        sums = np.zeros_like(centroids)
        filled = np.flatnonzero(counts)
        starts = (np.cumsum(counts) - counts)[filled]
        sums[filled] = np.add.reduceat(points[order].astype(np.float32), starts)
        means = sums / np.maximum(counts, 1)[:, None]
        centroids = refill(means.astype(np.float32), counts.astype(np.float32))
    return centroids / np.linalg.norm(centroids, axis=1, keepdims=True)


def squared_residual(points: np.ndarray, centroids: np.ndarray, codes: np.ndarray) -> float:
    return float(np.square(np.asarray(points, np.float32) - centroids[codes]).sum(axis=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    values = load(args.cache, args.passages)[0].values
    held_out = np.random.default_rng(0).random(len(values)) < 0.05
    points, rest = values[~held_out], values[held_out]
    num_centroids = num_centroids_for(len(values))
    warm = train_kmeans(points[:20_000], 2048, iterations=2, progress=False)  # compiles
    cpu.nearest(cpu.group_centroids(warm, distance=False), rest[:1000])

    start = time.perf_counter()
    ours = train_kmeans(
        points, num_centroids, iterations=args.iterations, max_points_per_centroid=10**9
    )
    trained = time.perf_counter()
    codes = cpu.nearest(cpu.group_centroids(ours, distance=False), rest)
    assigned = time.perf_counter()
    exact = exact_kmeans(points, num_centroids, args.iterations, 123)
    exact_trained = time.perf_counter()
    exact_codes = exact_nearest(rest, exact, np.zeros(num_centroids, np.float32))
    exact_assigned = time.perf_counter()

    best = squared_residual(rest, exact, exact_codes)
    true = exact_nearest(rest, ours, np.zeros(num_centroids, np.float32))
    micro = 1e6 / len(rest)
    results = {
        "tokens": len(values),
        "centroids": num_centroids,
        "train seconds": [trained - start, exact_trained - assigned],
        "assign microseconds a token": [
            (assigned - trained) * micro,
            (exact_assigned - exact_trained) * micro,
        ],
        "squared residual": [squared_residual(rest, ours, codes), best],
        "ratio, centroids alone": squared_residual(rest, ours, true) / best,
        "ratio, all that a build does": squared_residual(rest, ours, codes) / best,
        "tokens with their true nearest": float((codes == true).mean()),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": num_threads(),
            "numpy": version("numpy"),
            "numba": version("numba"),
        },
    }
    print(json.dumps(results, indent=1))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    log_to_stderr()
    main()
