"""k-means centroids and the residual codec of ColBERTv2."""

from colbert_jax.compression.codec import ResidualCodec, compress, decompress, train_codec
from colbert_jax.compression.kmeans import num_centroids_for, sample_size_for, train_kmeans

__all__ = [
    "ResidualCodec",
    "compress",
    "decompress",
    "num_centroids_for",
    "sample_size_for",
    "train_codec",
    "train_kmeans",
]
