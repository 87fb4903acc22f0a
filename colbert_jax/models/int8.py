"""Dense layers in 8-bit integers: weights are quantised once, activations at every call.

Dynamic W8A8 (Dettmers et al., 2022, section 2.1, vector-wise): x W = sx sw (qx qw), where qx and qw
are int8, sx has one value a token and sw one an output feature, each the largest magnitude / 127.
Products are summed in int32. It runs on every device and is fast where int8 is multiplied natively.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_LARGEST = 127
_SMALLEST_SCALE = 1e-30  # for rows of zeros


class Int8Linear(nnx.Module):
    """An `nnx.Linear` with a quantised kernel.

    kernel: int8[inputs, outputs]; scale: float32[outputs]; bias: float32[outputs] or None.
    """

    def __init__(self, linear: nnx.Linear):
        shape = linear.kernel.shape
        self.kernel = nnx.Param(jnp.zeros(shape, jnp.int8))
        self.scale = nnx.Param(jnp.zeros(shape[-1:], jnp.float32))
        self.bias = None if linear.bias is None else nnx.Param(jnp.zeros(shape[-1:], jnp.float32))
        self.dtype = linear.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiply x [..., inputs]: [..., outputs] of the dtype of the replaced layer."""
        x = x.astype(jnp.float32)
        largest = jnp.abs(x).max(axis=-1, keepdims=True)
        scale = jnp.maximum(largest / _LARGEST, _SMALLEST_SCALE)
        y = jax.lax.dot_general(
            jnp.round(x / scale).astype(jnp.int8),
            self.kernel[...],
            (((x.ndim - 1,), (0,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        y = y.astype(jnp.float32) * scale * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(self.dtype)


def quantize_modules(module: nnx.Module) -> None:
    """Replace every `nnx.Linear` in a module by an `Int8Linear`."""
    for _, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Linear):
                    setattr(node, name, Int8Linear(value))


def quantize_params(params: dict[Any, Any]) -> dict[Any, Any]:
    """Quantise parameters for a module that `quantize_modules` has changed.

    Args:
      params: nested dict; a dense layer is a dict with a "kernel" float32[inputs, outputs].

    Returns:
      the same nested dict with NumPy arrays "kernel" and "scale" in each dense layer.
    """
    if "kernel" in params and np.ndim(params["kernel"]) == 2:
        kernel, scale = quantize_columns(np.asarray(params["kernel"]))
        return params | {"kernel": kernel, "scale": scale}
    return {
        name: quantize_params(value) if isinstance(value, dict) else value
        for name, value in params.items()
    }


def quantize_columns(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a kernel float32[inputs, outputs] column by column.

    Returns:
      int8[inputs, outputs] and float32[outputs], whose product approximates the kernel.
    """
    scale = np.maximum(np.abs(kernel).max(axis=0) / np.float32(_LARGEST), _SMALLEST_SCALE)
    scale = scale.astype(np.float32)
    return np.round(kernel / scale).astype(np.int8), scale
