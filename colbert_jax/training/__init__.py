"""Training: examples, losses, the loop, teachers, mining, the papers' recipes."""

from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import (
    Example,
    concatenate,
    dataset_examples,
    pair_examples,
    stanford_examples,
)
from colbert_jax.evaluation.dev import DevCollection
from colbert_jax.mining.stages import mine
from colbert_jax.mining.teacher import LateInteraction, load_teacher
from colbert_jax.training.loader import Task
from colbert_jax.training.trainer import Trained, train

__all__ = [
    "DevCollection",
    "Example",
    "LateInteraction",
    "Task",
    "Trained",
    "TrainingConfig",
    "concatenate",
    "dataset_examples",
    "load_teacher",
    "mine",
    "pair_examples",
    "stanford_examples",
    "train",
]
