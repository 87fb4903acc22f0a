"""How a CPU's loops are compiled by numba, and where the compiled code is kept between runs.

numba's own cache looks at the file of the function that it compiles and not at those of functions
that this one calls, so that after an upgrade old code would be used; and where it can write nowhere
it refuses to compile. Here code is kept by the content of all modules that hold loops, in the
user's cache folder; where that can't be written, code is compiled for this process alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numba
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

from colbert_jax.runtime import cache_folder

_PACKAGE = Path(__file__).parents[1]
# Loops, their constants and what they call are in these, and how they are compiled in this file.
_SOURCES = (
    "compression/cpu_kernels.py",
    "compression/fixed_point.py",
    "compression/fixed_tiles.py",
    "compression/pooling_kernels.py",
    "compression/tiles.py",
    "search/cpu_kernels.py",
    "compression/compiled.py",
)
_OURS, _DIGITS = "colbert_jax-", 16  # of the folders' names: a prefix, and digits of the content
_UNUSED = 30 * 24 * 3600.0  # seconds
FAST = {"nnan", "nsz", "contract", "arcp", "reassoc"}
_told = threading.Event()


def compiled(function: Any) -> Any:
    """Compile a function, when it is first called, to one that lets other threads run.

    There must be no NaN that matters, and sums may be taken in any order.
    """
    dispatcher: Any = numba.njit(nogil=True, fastmath=FAST)(function)
    try:
        dispatcher._cache = _Cache(function)
    except OSError as error:
        _not_kept(error)
    return dispatcher


@functools.cache
def _content() -> str:
    """A name for all that decides what loops are compiled to, the machine apart."""
    digest = hashlib.sha256(numba.__version__.encode())
    for name in _SOURCES:
        digest.update((_PACKAGE / name).read_bytes())
    return digest.hexdigest()[:_DIGITS]


def _base() -> Path:
    chosen = getattr(config, "CACHE_DIR", "")
    return Path(chosen) if chosen else cache_folder() / "numba"


@functools.cache
def _delete_old() -> None:
    """Delete what other versions of the loops have left, if nothing was added to it for long."""
    for folder in _base().glob(f"{_OURS}{'[0-9a-f]' * _DIGITS}"):
        if folder.name == f"{_OURS}{_content()}" or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            newest = max(file.stat().st_mtime for file in (folder, *folder.rglob("*")))
            if newest < time.time() - _UNUSED:
                shutil.rmtree(folder, ignore_errors=True)


class _Locator(_CacheLocator):
    """Below `$NUMBA_CACHE_DIR` or the user's cache folder, a folder for every content."""

    def __init__(self, module: str, py_file: str):
        self._folder = _base() / f"{_OURS}{_content()}" / module
        self._py_file = py_file  # numba names it where a function can't be kept

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator:
        return cls(py_func.__module__, py_file)

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return _content()

    def get_disambiguator(self) -> str:
        return ""


class _Files(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012


class _Cache(FunctionCache):
    """What can't be read is compiled, what can't be written is not kept."""

    _impl_class = _Files

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a damaged pickle fails in many ways
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
            _delete_old()
        except OSError as error:
            _not_kept(error)


def _not_kept(error: OSError) -> None:
    """Say it once, not for every function."""
    if not _told.is_set():
        _told.set()
        warnings.warn(
            "compiled loops can't be kept, so the first search or build of every process takes "
            f"up to a minute longer ({error}): set XDG_CACHE_HOME to a folder that can be written",
            stacklevel=3,
        )
