"""Checkpoint folders, one module per layout. The layout is told by the files present."""

from __future__ import annotations

from pathlib import Path

from colbert_jax.checkpoints import huggingface, stanford
from colbert_jax.checkpoints.common import Checkpoint
from colbert_jax.files import read_json

__all__ = ["Checkpoint", "read_checkpoint"]


def read_checkpoint(folder: Path, *, dim: int | None = None, seed: int = 0) -> Checkpoint:
    """Read a checkpoint folder of any supported layout.

    Args:
      folder: Stanford ColBERT (`artifact.metadata`, or `linear.weight` among the weights), or a
        plain Hugging Face BERT.
      dim: for a plain BERT: width of a new projection with seeded random weights; None: no
        projection. For a ColBERT checkpoint: None, or the width it has.
      seed: of the new projection.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: not a checkpoint folder: config.json is missing")
    _refuse_dense_modules(folder)
    if stanford.detect(folder):
        return stanford.read(folder, dim=dim)
    return huggingface.read(folder, dim=dim, seed=seed)


def _refuse_dense_modules(folder: Path) -> None:
    """A PyLate or sentence-transformers folder keeps its projection in Dense modules of its own."""
    file = folder / "modules.json"
    if not file.is_file():
        return
    modules = read_json(file)
    try:
        dense = [m["path"] for m in modules if m["type"].rpartition(".")[2] == "Dense"]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{file}: expected a list of objects with 'path' and 'type'") from None
    if dense:
        raise ValueError(
            f"{file}: lists Dense modules ({', '.join(dense)}): the PyLate layout is not supported "
            "yet; supported: Stanford ColBERT folders and plain BERT folders"
        )
