"""What the CPU's kernels share: how they are compiled, and their inner loops.

numba keeps compiled functions on disk beside their own file and does not see that one they call
has changed: after a change here remove the `__pycache__` folders of `search` and `compression`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_ZERO = np.float32(0)
# No NaN comes in, sums may be taken in any order.
compiled = njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "contract", "arcp", "reassoc"})


@compiled
def dots(a, b, q0, q1, q2, q3):
    """The dot products of a and of b with four vectors, eight float32: loads are shared."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _ZERO
    for d in range(len(a)):
        x, y = a[d], b[d]
        a0 += x * q0[d]
        a1 += x * q1[d]
        a2 += x * q2[d]
        a3 += x * q3[d]
        b0 += y * q0[d]
        b1 += y * q1[d]
        b2 += y * q2[d]
        b3 += y * q3[d]
    return a0, a1, a2, a3, b0, b1, b2, b3


@compiled
def insert(value, place, count, filled, values, places):
    """Put a value among the `count` largest, the largest first; returns how many there are now.

    Equal values stay in the order in which they come.

    Args:
      filled: how many there are.
      values, places: [count], updated.
    """
    if filled == count and value <= values[count - 1]:
        return filled
    at = filled if filled < count else count - 1
    while at > 0 and values[at - 1] < value:
        values[at] = values[at - 1]
        places[at] = places[at - 1]
        at -= 1
    values[at] = value
    places[at] = place
    return min(filled + 1, count)
