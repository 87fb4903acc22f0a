"""Hierarchical clustering by Ward's criterion, compiled by numba.

Equal to SciPy's `linkage(..., "ward")` and `fcluster(..., criterion="maxclust")`, the order of the
clusters included: the nearest-neighbour chain (Muellner, 2011, figure 3) over condensed distances.
"""

from __future__ import annotations

import numpy as np

from colbert_jax.compression.compiled import compiled


@compiled
def condensed(n, i, j):
    """The place of the distance of i and j, i != j, among those of n points."""
    if i > j:
        i, j = j, i
    return n * i - i * (i + 1) // 2 + j - i - 1


@compiled
def ward_merges(distances, n, left, right, heights):
    """Write the n - 1 merges, in the order in which they are found.

    Args:
      distances: float64[n (n - 1) / 2], condensed; overwritten.
      left, right: int64[n - 1], the points that stand for the merged clusters, left < right; the
        right one stands for the new one.
      heights: float64[n - 1].
    """
    sizes = np.ones(n, np.int64)
    chain = np.empty(n, np.int64)
    length = 0
    for k in range(n - 1):
        if length == 0:
            length += 1
            for i in range(n):
                if sizes[i] > 0:
                    chain[0] = i
                    break
        while True:
            x = chain[length - 1]
            y = x
            nearest = np.inf
            if length > 1:
                y = chain[length - 2]
                nearest = distances[condensed(n, x, y)]
            for i in range(n):
                if sizes[i] == 0 or i == x:
                    continue
                distance = distances[condensed(n, x, i)]
                if distance < nearest:
                    nearest = distance
                    y = i
            if length > 1 and y == chain[length - 2]:
                break
            chain[length] = y
            length += 1
        length -= 2
        if x > y:
            x, y = y, x
        size_x, size_y = sizes[x], sizes[y]
        left[k], right[k], heights[k] = x, y, nearest
        sizes[x] = 0
        sizes[y] = size_x + size_y
        for i in range(n):
            size = sizes[i]
            if size == 0 or i == y:
                continue
            to_x, to_y = distances[condensed(n, i, x)], distances[condensed(n, i, y)]
            share = 1.0 / (size_x + size_y + size)
            distances[condensed(n, i, y)] = np.sqrt(
                (size + size_x) * share * to_x * to_x
                + (size + size_y) * share * to_y * to_y
                - size * share * nearest * nearest
            )


@compiled
def find_root(parents, i):
    """The cluster that i is in, with shorter ways to it for later."""
    root = i
    while parents[root] != root:
        root = parents[root]
    while parents[i] != root:
        parents[i], i = root, parents[i]
    return root


@compiled
def flat_clusters(left, right, heights, cut, labels):
    """Number the clusters below a height, in the order of SciPy's walk through the tree.

    Args:
      left, right, heights: merges in order of height, as `ward_merges` writes them.
      cut: merges up to this height are made.
      labels: int64[n], written: the cluster of each point, from 0 on.

    Returns:
      the number of clusters.
    """
    n = len(labels)
    parents = np.arange(2 * n - 1)
    children = np.empty((n - 1, 2), np.int64)
    for k in range(n - 1):
        a, b = find_root(parents, left[k]), find_root(parents, right[k])
        children[k, 0], children[k, 1] = min(a, b), max(a, b)
        parents[a] = n + k
        parents[b] = n + k
    walked = np.zeros(2 * n - 1, np.bool_)
    path = np.empty(n, np.int64)
    path[0] = 2 * n - 2
    depth, leader, count = 0, -1, 0
    while depth >= 0:
        root = path[depth] - n
        if leader == -1 and heights[root] <= cut:
            leader = root
            count += 1
        deeper = False
        for side in range(2):
            child = children[root, side]
            if child >= n and not walked[child]:
                walked[child] = True
                depth += 1
                path[depth] = child
                deeper = True
                break
        if deeper:
            continue
        for side in range(2):
            child = children[root, side]
            if child < n:
                if leader == -1:
                    count += 1
                labels[child] = count - 1
        if leader == root:
            leader = -1
        depth -= 1
    return count
