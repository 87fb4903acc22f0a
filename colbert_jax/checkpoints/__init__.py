"""Checkpoints of every published layout, one module each, read and written.

To add a layout: write one module with `detect`, `read` and, if it can be written, `write`, and name
it in `_REGISTER`. File names that only the new layout has go into `hub` too, which fetches them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from colbert_jax.checkpoints import (
    bge_m3,
    carried,
    colbertv1,
    flmr,
    hub,
    huggingface,
    native,
    pylate,
    sentence_transformers,
    single_vector,
    stanford,
)
from colbert_jax.checkpoints.common import Checkpoint
from colbert_jax.checkpoints.modules import has_modules, read_modules
from colbert_jax.files import check_free, present, present_folder, publishing
from colbert_jax.runtime import warn
from colbert_jax.tensors.weights import WEIGHT_FILES, is_head, other_weights

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "convert_checkpoint",
    "detect_layout",
    "read_checkpoint",
    "write_checkpoint",
]

# In this order: the first layout that detects a path is the one it is read as.
_REGISTER: dict[str, Any] = {
    "native": native,
    "sentence-transformers": sentence_transformers,
    "flmr": flmr,
    "colbertv1": colbertv1,
    "stanford": stanford,
    "pylate": pylate,
    "bge-m3": bge_m3,
    "single-vector": single_vector,
    "huggingface": huggingface,
}

_WITHOUT_HEAD = ("single-vector", "huggingface")  # plain encoders
_WITHOUT_NORMALIZING = ("native", "sentence-transformers")
_WITH_LANGUAGE = ("stanford", "huggingface")
_ADAPTER = "adapter_config.json"  # of peft; transformers looks for it in every folder

# The layouts that can be written, by the name that the command line takes.
LAYOUTS: dict[str, Callable[[Checkpoint, Path], None]] = {
    name: layout.write for name, layout in _REGISTER.items() if hasattr(layout, "write")
}


def read_checkpoint(
    path: Path,
    *,
    dim: int | None = None,
    seed: int = 0,
    base: Path | None = None,
    images: bool | None = None,
    language: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of any supported layout, which is detected from its files.

    Args:
      path: a folder in the layout of this library, FLMR, PyLate, sentence-transformers, Stanford
        ColBERT or plain Hugging Face; or a ColBERTv1 `.dnn` file.
      dim: for an encoder without a head, the width of a new projection with seeded random weights;
        if None, it gets no projection. For all others the width that the head must have.
      seed: for the new projection.
      base: for a `.dnn` file, the folder of the model it was trained from. If None, the file's
        folder.
      images: whether to read FLMR's image encoder too. If None, a checkpoint that has one is read
        without it, with a warning.
      language: which adapters of an X-MOD model to read, such as "de_DE". If None, those of the
        configuration's default language.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    path = Path(path)
    layout = detect_layout(path)
    _check_language(path, layout, language)
    arguments = dict(dim=dim, seed=seed, base=base, images=images, language=language)
    return _read(path, layout, **arguments)


def _check_language(path: Path, layout: str, language: str | None) -> None:
    if language is not None and layout not in _WITH_LANGUAGE:
        raise ValueError(f"{path}: language= is for X-MOD in {' or '.join(_WITH_LANGUAGE)} folders")


def _read(path: Path, layout: str, **arguments: Any) -> Checkpoint:
    unread = _unread_weights(path, layout)
    _refuse_unread(path, layout, unread)
    checkpoint = _REGISTER[layout].read(path, **arguments)
    if unread:
        warn(
            f"{path}: read as {layout}, without the weights in {', '.join(unread)}: this library "
            "does not read them, and embeddings are those of a model without them"
        )
    return carried.restore(checkpoint, path)


def _refuse_unread(path: Path, layout: str, unread: list[str]) -> None:
    """Raise ValueError for weights without which token embeddings would be others: a projection
    beside an encoder that has none in its layout, and an adapter."""
    heads = [name for name in unread if is_head(name)] if layout in _WITHOUT_HEAD else []
    if heads:
        raise ValueError(
            f"{path / heads[0]}: by its name a head, which this library does not read: embeddings "
            f"would be those of a model without it; use the model's own library, or take the file "
            "out of a copy of the folder to go on without it"
        )
    if not path.is_file() and present(path / _ADAPTER):
        raise ValueError(
            f"{path / _ADAPTER}: an adapter, which this library does not apply: embeddings would "
            "be those of the model before it was trained; merge it with peft "
            "(merge_and_unload), save the result, and load that"
        )


def _unread_weights(path: Path, layout: str) -> list[str]:
    """Weight files in a folder, or in folders of modules, that its layout does not read."""
    if path.is_file():
        return []
    found = other_weights(file.name for file in path.iterdir())
    if layout == "bge-m3":
        found = [name for name in found if name not in (bge_m3.HEAD, bge_m3.SPARSE)]
    if layout == "colbertv1":
        found = [name for name in found if not name.endswith(colbertv1.SUFFIX)]
    listed = [m.folder for m in read_modules(path)] if has_modules(path) else []
    modules = (folder for folder in path.glob(hub.MODULE_FOLDER) if folder not in listed)
    inside = [folder / name for folder in modules for name in WEIGHT_FILES]
    return sorted(found + [str(file.relative_to(path)) for file in inside if file.exists()])


def detect_layout(path: Path) -> str:
    """Detect the layout of a checkpoint from its files.

    Returns:
      a name of `LAYOUTS`, or "single-vector" (sentence-transformers) or "huggingface" (a plain
      encoder).

    Raises:
      FileNotFoundError, ValueError: the path does not exist, or is not a checkpoint.
    """
    path = Path(path)
    if path.is_file() and path.suffix != colbertv1.SUFFIX:
        raise ValueError(
            f"{path}: a file; a checkpoint is a folder, or a ColBERTv1 {colbertv1.SUFFIX} file"
        )
    if not path.is_file() and not present_folder(path):
        raise FileNotFoundError(f"{path}: no such folder")
    for name, layout in _REGISTER.items():
        if layout.detect(path):
            return name
    file = next(path.glob(f"*{colbertv1.SUFFIX}"), None)
    advice = "" if file is None else f"; pass {file.name} itself, and base= for its base model"
    raise FileNotFoundError(
        f"{path}: not a checkpoint folder: config.json is missing, and so is {native.FILE}{advice}"
    )


def write_checkpoint(checkpoint: Checkpoint, folder: Path, layout: str = "native") -> None:
    """Write a checkpoint as a new folder, complete or not at all.

    Args:
      layout: a name of `LAYOUTS`.

    Raises:
      ValueError: the layout is unknown, or cannot express a setting of the checkpoint.
      FileExistsError: `folder` exists and is not empty.
    """
    _check_layout(layout)
    if checkpoint.images is not None and layout != "flmr":
        raise ValueError(
            f"the {layout} layout has no image encoder, this checkpoint has one; write the flmr "
            "layout, or the text part alone: read it with images=False"
        )
    if not checkpoint.encoder.normalized and layout not in _WITHOUT_NORMALIZING:
        raise ValueError(
            f"the {layout} layout normalises token embeddings, this checkpoint does not; write "
            f"one of {', '.join(_WITHOUT_NORMALIZING)}"
        )
    if checkpoint.sparse and layout != "native":
        warn(
            f"the {layout} layout has no place for the lexical weights ({bge_m3.SPARSE}): written "
            "without them; token embeddings are the same"
        )
    with publishing(folder) as draft:
        LAYOUTS[layout](checkpoint, draft)
        carried.write(checkpoint.config, _REGISTER[layout].kept(checkpoint.config), draft)


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    layout: str = "native",
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    language: str | None = None,
    truncate_dim: int | None = None,
    pool_factor: float | None = None,
) -> tuple[str, Checkpoint]:
    """Read a checkpoint of any layout and write it in another one.

    Args:
      source: folder, hub id, or ColBERTv1 `.dnn` file.
      folder: the folder to make.
      layout: a name of `LAYOUTS`.
      base, revision, token, language, truncate_dim, pool_factor: as for `ColBERT.from_pretrained`.

    Returns:
      the source's layout, and the checkpoint.

    Raises:
      FileNotFoundError, ValueError, FileExistsError: as from `read_checkpoint` and
        `write_checkpoint`, before anything is written.
    """
    _check_layout(layout)
    check_free(Path(folder))
    path, base = hub.resolve_checkpoint(source, base=base, revision=revision, token=token)
    found = detect_layout(path)
    # An image encoder has a place in one layout; where it has none, a warning says so.
    images = True if layout == "flmr" else None
    _check_language(path, found, language)
    checkpoint = _read(path, found, base=base, images=images, language=language)
    if truncate_dim is not None:
        checkpoint = checkpoint.truncated(truncate_dim)
    if pool_factor is not None:
        checkpoint = checkpoint.with_text(pool_factor=pool_factor)
    checkpoint.text_tokenizer()  # for its checks
    write_checkpoint(checkpoint, Path(folder), layout)
    return found, checkpoint


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose from {', '.join(LAYOUTS)}")
