"""Mining: scored n-way examples from queries and a collection; teachers that score."""

from colbert_jax.mining.stages import Mined, Teacher, make_examples, mine, retrieve, score_ranking
from colbert_jax.mining.teacher import BiEncoder, CrossEncoder, LateInteraction, load_teacher

__all__ = [
    "BiEncoder",
    "CrossEncoder",
    "LateInteraction",
    "Mined",
    "Teacher",
    "load_teacher",
    "make_examples",
    "mine",
    "retrieve",
    "score_ranking",
]
