"""FLMR's names and arguments over this library, so that its model card's
example runs after changing an import.

FLMR (Lin et al., 2023), PreFLMR (2024) and their ColBERT-v2. Arrays are NumPy or JAX instead of
torch.
"""

from colbert_jax.flmr.configuration import FLMRConfig, FLMRTextConfig, FLMRVisionConfig
from colbert_jax.flmr.modeling import FLMRModelForRetrieval
from colbert_jax.flmr.outputs import (
    FLMRContextEncoderOutput,
    FLMRModelForRetrievalOutput,
    FLMRQueryEncoderOutput,
)
from colbert_jax.flmr.retrieval import (
    create_searcher,
    index_custom_collection,
    search_custom_collection,
)
from colbert_jax.flmr.tokenization import (
    FLMRContextEncoderTokenizer,
    FLMRQueryEncoderTokenizer,
)

__all__ = [
    "FLMRConfig",
    "FLMRContextEncoderOutput",
    "FLMRContextEncoderTokenizer",
    "FLMRModelForRetrieval",
    "FLMRModelForRetrievalOutput",
    "FLMRQueryEncoderOutput",
    "FLMRQueryEncoderTokenizer",
    "FLMRTextConfig",
    "FLMRVisionConfig",
    "create_searcher",
    "index_custom_collection",
    "search_custom_collection",
]
