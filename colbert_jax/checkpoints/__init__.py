"""Checkpoints of every published layout, one module each, read and written.

The layout is told by the files present, so nothing needs to be said when reading.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from colbert_jax.checkpoints import (
    colbertv1,
    flmr,
    hub,
    huggingface,
    modules,
    native,
    pylate,
    sentence_transformers,
    stanford,
)
from colbert_jax.checkpoints.common import Checkpoint
from colbert_jax.files import check_free, publishing

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "convert_checkpoint",
    "detect_layout",
    "read_checkpoint",
    "write_checkpoint",
]

# What can be written, by the name that the command line takes.
LAYOUTS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "native": native.write,
    "stanford": stanford.write,
    "flmr": flmr.write,
    "pylate": pylate.write,
    "sentence-transformers": sentence_transformers.write,
    "colbertv1": colbertv1.write,
}


def read_checkpoint(
    path: Path, *, dim: int | None = None, seed: int = 0, base: Path | None = None
) -> Checkpoint:
    """Read a checkpoint of any supported layout.

    Args:
      path: a folder in the layout of this library, FLMR, PyLate, sentence-transformers, Stanford
        ColBERT or plain Hugging Face; or a ColBERTv1 `.dnn` file.
      dim: for an encoder without a head: width of a new projection with seeded random weights;
        None: no projection. For the others: None, or the width it has.
      seed: of the new projection.
      base: for a `.dnn` file: folder of the model it was trained from; None: the file's own.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    return _read(Path(path), detect_layout(path), dim=dim, seed=seed, base=base)


def _read(
    path: Path, layout: str, *, dim: int | None = None, seed: int = 0, base: Path | None = None
) -> Checkpoint:
    if layout == "colbertv1":
        file = path if path.is_file() else next(path.glob(f"*{colbertv1.SUFFIX}"))
        return colbertv1.read(file, base=base or file.parent, dim=dim)
    if layout == "huggingface":
        return huggingface.read(path, dim=dim, seed=seed)
    if layout in _FOLDERS:
        return _FOLDERS[layout].read(path, dim=dim)
    listed, settings = modules.read_modules(path), modules.read_settings(path)
    if layout == "pylate":
        return pylate.read(path, listed, settings, dim=dim)
    if layout == "sentence-transformers":
        return sentence_transformers.read(path, listed, settings, dim=dim)
    return sentence_transformers.read_single_vector(path, listed, settings, dim=dim, seed=seed)


_FOLDERS = {"native": native, "flmr": flmr, "stanford": stanford}


def detect_layout(path: Path) -> str:
    """The layout of a checkpoint, told by its files.

    Returns:
      a name of `LAYOUTS`, or "single-vector" (sentence-transformers) or "huggingface" (a plain
      encoder).

    Raises:
      FileNotFoundError, ValueError: nothing there, or no checkpoint.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != colbertv1.SUFFIX:
            raise ValueError(
                f"{path}: a file; a checkpoint is a folder, or a ColBERTv1 {colbertv1.SUFFIX} file"
            )
        return "colbertv1"
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if native.detect(path):
        return "native"
    if (path / modules.MODULES).is_file():
        listed, settings = modules.read_modules(path), modules.read_settings(path)
        if sentence_transformers.detect(listed, settings):
            return "sentence-transformers"
        # Without a Dense module, a projection among the weights is Stanford's.
        if not any(module.kind == "Dense" for module in listed) and _is_stanford(path):
            return "stanford"
        return "pylate" if pylate.detect(listed, settings) else "single-vector"
    if not (path / "config.json").is_file():
        file = next(path.glob(f"*{colbertv1.SUFFIX}"), None)
        advice = "" if file is None else f"; pass {file.name} itself, and base= for its base model"
        raise FileNotFoundError(f"{path}: not a checkpoint folder: config.json is missing{advice}")
    if flmr.detect(path):
        return "flmr"
    if colbertv1.detect(path):
        return "colbertv1"
    return "stanford" if stanford.detect(path) else "huggingface"


def _is_stanford(folder: Path) -> bool:
    return (folder / "config.json").is_file() and stanford.detect(folder)


def write_checkpoint(checkpoint: Checkpoint, folder: Path, layout: str = "native") -> None:
    """Write a checkpoint as a new folder, complete or not at all.

    Args:
      layout: a name of `LAYOUTS`.

    Raises:
      ValueError: an unknown layout, or something that the layout cannot say.
      FileExistsError: `folder` exists and is not empty.
    """
    _check_layout(layout)
    with publishing(folder) as draft:
        LAYOUTS[layout](checkpoint, draft)


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    layout: str = "native",
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[str, Checkpoint]:
    """Read a checkpoint of any layout and write it in another one.

    Args:
      source: folder, hub id, or ColBERTv1 `.dnn` file; base, revision, token: as of
        `ColBERT.from_pretrained`.
      folder: the folder to make.
      layout: a name of `LAYOUTS`.

    Returns:
      the source's layout, and the checkpoint.

    Raises as `read_checkpoint` and `write_checkpoint`, before anything is written.
    """
    _check_layout(layout)
    check_free(Path(folder))
    path, base = hub.resolve_checkpoint(source, base=base, revision=revision, token=token)
    found = detect_layout(path)
    checkpoint = _read(path, found, base=base)
    write_checkpoint(checkpoint, Path(folder), layout)
    return found, checkpoint


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose from {', '.join(LAYOUTS)}")
