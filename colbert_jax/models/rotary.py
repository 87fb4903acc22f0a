"""Rotary positions (Su et al., 2021): queries and keys are rotated by angles of their positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.config import require

Rotation = tuple[np.ndarray, np.ndarray]


def rotary_tables(length: int, head_dim: int, theta: float, ntk_factor: float = 1.0) -> Rotation:
    """Return cosines and sines of the angles of Su et al. (2021), eq. 15.

    Args:
      ntk_factor: for positions so many times beyond those of the first training, frequencies are
        those of a base so much larger, divided by the factor to the power of 2 / head_dim.

    Returns:
      two float32[L, head_dim / 2].
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The models were trained with frequencies rounded to float32, which at position 8,000 changes
    # angles by about 1e-4 radians.
    base = np.float64(theta) * ntk_factor
    frequencies = np.float32(1) / (base**exponents).astype(np.float32)
    if ntk_factor != 1:
        frequencies = frequencies / np.float32(ntk_factor ** (2 / head_dim))
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate [B, L, heads, head_dim]: dimension i pairs with dimension i + head_dim / 2."""
    cosine, sine = (table[:, None, :] for table in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
    return rotated.astype(x.dtype)


def check_rotary(head_dim: int, theta: float, name: str = "rope_theta") -> None:
    """Raise ValueError unless heads can be rotated with this base."""
    require(head_dim % 2 == 0, f"head_dim must be even, got {head_dim}")
    require(theta > 0, f"{name} must be > 0, got {theta}")


def read_theta(parameters: Any, name: str = "rope_parameters") -> float | None:
    """Read the base of the frequencies from `rope_parameters`; None if it is not there.

    Raises ValueError for anything else in it: it scales the frequencies.
    """
    require(
        parameters is None or isinstance(parameters, Mapping),
        f"{name} must be an object, got {parameters!r}",
    )
    rope = dict(parameters or {})
    theta = rope.pop("rope_theta", None)
    scaled = {k: v for k, v in rope.items() if v not in (None, "default")}
    require(not scaled, f"{name}: {scaled!r} is not supported; leave it out")
    return theta


def written_theta(theta: float) -> dict[str, Any]:
    """Return the base as transformers 4 and 5 read it."""
    parameters = {"rope_type": "default", "rope_theta": float(theta)}
    return {"rope_theta": float(theta), "rope_parameters": parameters}
