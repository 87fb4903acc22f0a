"""ColBERTv2 and PLAID in JAX/Flax: late-interaction retrieval on TPU, GPU and CPU."""

from colbert_jax.colbert import ColBERT
from colbert_jax.config import ColBERTConfig, TextConfig
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.explanation import Explanation
from colbert_jax.fusion import Hybrid
from colbert_jax.index import Index
from colbert_jax.retriever import Hit, Retriever
from colbert_jax.scoring import maxsim, maxsim_all_pairs, maxsim_nway, maxsim_ragged
from colbert_jax.search import Hits

__version__ = "0.1.0"

__all__ = [
    "ColBERT",
    "ColBERTConfig",
    "DocumentEmbeddings",
    "Explanation",
    "Hit",
    "Hits",
    "Hybrid",
    "Index",
    "Retriever",
    "TextConfig",
    "maxsim",
    "maxsim_all_pairs",
    "maxsim_nway",
    "maxsim_ragged",
]
