"""The index: its on-disk format, building, opening."""

from colbert_jax.index.index import Index

__all__ = ["Index"]
