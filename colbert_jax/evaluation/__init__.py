"""Collections, queries and judgements from files; measures of rankings; run files."""

from colbert_jax.data.collections import read_collection, read_qrels, read_queries
from colbert_jax.evaluation.metrics import MEASURES, evaluate_ranking
from colbert_jax.evaluation.runs import read_run, write_run

__all__ = [
    "MEASURES",
    "evaluate_ranking",
    "read_collection",
    "read_qrels",
    "read_queries",
    "read_run",
    "write_run",
]
