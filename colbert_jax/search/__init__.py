"""Search, as plain functions over an index's arrays: exact, and PLAID."""

from colbert_jax.search.arrays import Hits, IndexArrays
from colbert_jax.search.exact import exact_search
from colbert_jax.search.plaid import plaid_search

__all__ = ["Hits", "IndexArrays", "exact_search", "plaid_search"]
