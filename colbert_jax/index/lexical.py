"""BM25 of an index's texts, kept in the index's folder.

    bm25-NAME/    what `Bm25.save` writes; NAME belongs to one state of the index

Whoever searches a state finds its own or none: what another state has left is never read. The
index's metadata does not know of it, so that any version of this library opens the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from colbert_jax.bm25 import Bm25, read_about
from colbert_jax.files import sync_folder
from colbert_jax.index.format import IndexFormatError

_PREFIX = "bm25-"


def is_kept(path: Path) -> bool:
    """Whether the index at `path` keeps BM25, of its present state or a former one."""
    return any(path.glob(f"{_PREFIX}*"))


def is_there(path: Path, state: str) -> bool:
    """Whether the index at `path` keeps BM25 of this state."""
    return _place(path, state).is_dir()


def verify(path: Path, state: str) -> None:
    """Compare the checksums of what the index at `path` keeps of a state, if anything.

    Raises IndexFormatError, naming the file.
    """
    if is_there(path, state):
        with _naming(path):
            read_about(_place(path, state))


def read(path: Path, state: str) -> Bm25 | None:
    """BM25 of a state of the index at `path`; None where it is not there.

    Raises:
      IndexFormatError: it is damaged.
      ImportError: bm25s or PyStemmer are not installed.
    """
    if not is_there(path, state):
        return None
    try:
        with _naming(path):
            return Bm25.load(_place(path, state), state=state)
    except IndexFormatError:
        if is_there(path, state):
            raise
        return None  # another process has made the next one


def publish(folder: Path, path: Path, state: str, made: Bm25) -> None:
    """Write BM25 of a state into `folder`, and make that the one of the index at `path`.

    Whoever has a former one open keeps it.
    """
    made.save(folder, state=state)
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)
    place = _place(path, state)
    shutil.rmtree(place, ignore_errors=True)
    os.rename(folder, place)
    sync_folder(path)
    for other in path.glob(f"{_PREFIX}*"):
        if other != place:
            shutil.rmtree(other, ignore_errors=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise IndexFormatError(f"{error}; make it again: colbert-jax bm25 {path}") from None


def _place(path: Path, state: str) -> Path:
    return path / (_PREFIX + hashlib.sha256(state.encode()).hexdigest()[:16])
