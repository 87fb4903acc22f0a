"""AdamW with linear warm-up and decay, in two parts: the backbone and the head.

Each part has moments and a step count of its own, so that a backbone that was frozen for a while
starts as torch's does when it first gets a gradient. The gradient's norm is cut over both together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from colbert_jax.config import TrainingConfig

EPSILON = 1e-8  # torch's default
_AFTER_LAYERS = ("final_norm",)  # of a backbone; all else but the layers comes before them


def schedule(config: TrainingConfig, peak: float) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of a step, counted from 0: linear up from 0, linear down to 0 at `maxsteps`."""
    if config.warmup is None:
        return optax.constant_schedule(peak)
    up = optax.linear_schedule(0.0, peak, max(config.warmup, 1))
    down = optax.linear_schedule(peak, 0.0, max(config.maxsteps - config.warmup, 1))
    return optax.join_schedules([up, down], [config.warmup]) if config.warmup else down


def _adamw(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) for a learning rate of 1."""
    return optax.chain(
        optax.scale_by_adam(eps=EPSILON), optax.add_decayed_weights(config.weight_decay)
    )


def trainable(config: TrainingConfig, tree: dict) -> dict:
    """Of the parameters, or of a tree like theirs, what is not frozen for all of the training."""
    if not config.freeze_layers:
        return tree
    backbone = tree["backbone"]
    layers = {i: x for i, x in backbone["layers"].items() if int(i) >= config.freeze_layers}
    after = {name: backbone[name] for name in _AFTER_LAYERS if name in backbone}
    return tree | {"backbone": {"layers": layers} | after}


def with_changes(tree: Any, changed: Any) -> Any:
    """The tree with the leaves of `changed`, which has some of its branches."""
    if not isinstance(tree, dict):
        return changed
    return tree | {name: with_changes(tree[name], branch) for name, branch in changed.items()}


def init_moments(config: TrainingConfig, params: dict) -> dict:
    """The optimiser's state: one for each part of the parameters, of what is trained in it."""
    selected = trainable(config, params)
    return {part: _adamw(config).init(values) for part, values in selected.items()}


def apply_gradients(
    config: TrainingConfig, params: dict, moments: dict, gradients: dict, step: jax.Array
) -> tuple[dict, dict, dict[str, jax.Array]]:
    """One step of the optimiser.

    Args:
      params, moments: by part, "backbone" and "head".
      gradients: of the parts that are trained in this step, of what is `trainable` in them.
      step: int32[], from 0.

    Returns:
      new parameters, new moments, and what to log: the gradient's norm before it was cut, and the
      learning rates.
    """
    norm = optax.tree.norm(gradients)
    factor = jnp.minimum(1.0, config.max_grad_norm / jnp.maximum(norm, 1e-12))
    gradients = jax.tree.map(lambda g: g * factor, gradients)
    params, moments, rates = dict(params), dict(moments), {}
    selected = trainable(config, params)
    for part, gradient in gradients.items():
        peak = config.lr if part != "head" else config.head_lr or config.lr
        rate = schedule(config, peak)(step)
        updates, moments[part] = _adamw(config).update(gradient, moments[part], selected[part])
        updates = jax.tree.map(lambda u, rate=rate: -rate * u, updates)
        params[part] = with_changes(params[part], optax.apply_updates(selected[part], updates))
        rates["lr" if part == "backbone" else "head_lr"] = rate
    return params, moments, {"grad_norm": norm} | rates
