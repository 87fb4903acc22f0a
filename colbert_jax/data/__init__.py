"""The field's files: collections, queries, judgements, training examples."""

from colbert_jax.data.collections import read_collection, read_qrels, read_queries
from colbert_jax.data.examples import (
    Check,
    Example,
    ExampleSource,
    concatenate,
    dataset_examples,
    pair_examples,
    stanford_examples,
)
from colbert_jax.data.m2kr import read_m2kr
from colbert_jax.data.published import TestCollection, read_test_collection
from colbert_jax.data.texts import Texts

__all__ = [
    "Check",
    "Example",
    "ExampleSource",
    "TestCollection",
    "Texts",
    "concatenate",
    "dataset_examples",
    "pair_examples",
    "read_collection",
    "read_m2kr",
    "read_qrels",
    "read_queries",
    "read_test_collection",
    "stanford_examples",
]
