"""Training: examples, losses, the loop, the papers' recipes."""

from colbert_jax.config import TrainingConfig
from colbert_jax.data import (
    Example,
    ExampleSource,
    concatenate,
    dataset_examples,
    pair_examples,
    stanford_examples,
)
from colbert_jax.evaluation.dev import DevCollection
from colbert_jax.training.flmr import train_flmr
from colbert_jax.training.loader import Task
from colbert_jax.training.trainer import Trained, train

__all__ = [
    "DevCollection",
    "Example",
    "ExampleSource",
    "Task",
    "Trained",
    "TrainingConfig",
    "concatenate",
    "dataset_examples",
    "pair_examples",
    "stanford_examples",
    "train",
    "train_flmr",
]
