"""The folder of an index: where it is put together, who may write, how it takes its place.

The index for `path` is put together in `path.building`, which `build.json` marks as ours, and takes
the place of the index at `path` when it is whole. What a change of the index writes is put together
in a folder beside it too (`changing`), and published with the one rename of `metadata.json`. Who
builds or changes an index holds its one lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from colbert_jax.files import (
    beside,
    drafts,
    lock,
    lock_file,
    present,
    previous_folder,
    read_object,
    recover,
    replace_folder,
    unlock_file,
    write_json,
)
from colbert_jax.processes import Group

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
METADATA = "metadata.json"
_BUILDING = ".building"
_CENTROIDS = ("centroids.npy", "centroids.pt")  # every layout has one of them
_MARK = {"made_by": "colbert_jax"}  # in a state; a folder without it is not ours
_VISIBLE = 90.0  # seconds within which a network file system shows what another process wrote


def building_folder(path: Path) -> Path:
    """Where an index is put together before it is published: a sibling, on the same file system."""
    return path.with_name(path.name + _BUILDING)


def locate(path: Path) -> Path:
    """The index's folder: `path`, or where an interrupted `publish` has left the former index."""
    aside = previous_folder(path)
    return aside if not path.exists() and aside.is_dir() else path


def check_free(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError where an index for `path` cannot be built: something is at `path` that
    must not be replaced, or something in the place of its building folder that is not ours."""
    if is_index(path):
        if not overwrite:
            raise FileExistsError(f"{path}: an index is there; pass overwrite=True to replace it")
    elif path.exists() and not _is_empty(path):
        raise FileExistsError(f"{path}: exists and is not an index; choose another path")
    folder = building_folder(path)
    if folder.exists() and not _is_empty(folder) and not _is_ours(folder):
        raise FileExistsError(
            f"{folder}: exists and is no unfinished build of this library; rename it, or choose "
            "another path for the index"
        )


def is_index(folder: Path) -> bool:
    """Whether an index of any layout is there, whole or damaged.

    Raises ValueError where one of the files that tell is there and cannot be read.
    """
    if not present(folder / METADATA):
        return False
    # Of a changed index another generation's file, where a file with two names had to grow.
    return any(present(folder / name) for name in _CENTROIDS) or any(
        re.fullmatch(r"centroids-[0-9]+\.npy", file.name) for file in folder.iterdir()
    )


@contextlib.contextmanager
def building(path: Path, overwrite: bool, group: Group | None = None) -> Iterator[Path]:
    """Make the folder where the index for `path` is put together, and hold it.

    It holds what an interrupted build has left, or nothing but the mark. An error before a build
    has written its state leaves nothing behind.

    Args:
      group: the processes that build together; they share the file system.

    Raises:
      FileExistsError: see `check_free`.
      RuntimeError: others build there.
      DiskFullError: see `naming_space`.
    """
    group = Group() if group is None else group
    if group.is_first:
        check_free(path, overwrite)
    with _held(path, building_folder(path), group) as folder:
        try:
            if group.is_first:
                recover(path)
                check_free(path, overwrite)  # another process may have published since
            with naming_space(folder):
                if group.is_first and not _is_marked(folder):
                    clear(folder)
                yield folder
        except Exception:
            if group.is_first and not read_state(folder).keys() - _MARK.keys():
                discard(folder)
            raise


@contextlib.contextmanager
def changing(path: Path, what: str) -> Iterator[Path]:
    """Hold the index at `path`, and make the folder where a change of it is put together.

    It holds what an interrupted change of the same kind has left, or nothing.

    Args:
      what: the kind of change, a word for the folder's name.

    Raises:
      RuntimeError: somebody else builds or changes the index.
      DiskFullError: see `naming_space`.
    """
    with _held(path, beside(path, what), Group()) as folder:
        try:
            recover(path)
            with naming_space(folder):
                yield folder
        except Exception:
            if not read_state(folder).keys() - _MARK.keys():
                discard(folder)
            raise


class DiskFullError(OSError):
    """No room for an index that is being written: a full disk, quota, or a limit on files."""

    def __str__(self) -> str:
        return str(self.args[1])


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Give errors of writing a file its name: a stream's own have none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise


@contextlib.contextmanager
def naming_space(folder: Path) -> Iterator[None]:
    """Raise DiskFullError, with file, folder and free space, where the block found no room.

    What is half-written is cut off by the next run, so that nothing but room is needed to go on.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        full = _without_room(error)
        if full is None:
            raise
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
        message = (
            f"{full.filename or folder}: {os.strerror(full.errno or 0)}: {free / 2**20:.1f} MiB "
            f"are free in {folder.parent}; make room and run the same again"
        )
        raise DiskFullError(full.errno, message) from error


def _without_room(error: BaseException | None) -> OSError | None:
    """The error of a full disk among an error and those it came from: closing a file may fail in
    its own way."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None


def state_name(process: int) -> str:
    return "build.json" if process == 0 else f"build.{process}.json"


def read_state(folder: Path, process: int = 0) -> dict[str, Any]:
    """How far a process's build has come; a damaged state means no state."""
    with contextlib.suppress(OSError, ValueError):
        return read_object(folder / state_name(process))
    return {}


def write_state(folder: Path, values: dict[str, Any], process: int = 0) -> None:
    """Replace a process's state in one step."""
    file = folder / state_name(process)
    with naming(file):
        write_json(file, _MARK | values)


def clear(folder: Path) -> None:
    """Delete all that an interrupted build has left in a building folder."""
    write_state(folder, {})
    _delete_all_but_the_mark(folder)


def discard(folder: Path) -> None:
    """Delete a building folder, its mark last: what a kill leaves is still known as ours."""
    if folder.is_dir():
        _delete_all_but_the_mark(folder)
        shutil.rmtree(folder)


def publish(folder: Path, path: Path) -> None:
    """Make a finished building folder the index at `path`, in place of the one that is there.

    Readers find the old index or the new one at every moment. A kill between the two renames leaves
    the old one aside, where readers look too (`locate`) and the next build brings it back.
    """
    replace_folder(folder, path)
    for state in (*path.glob(state_name(0)), *path.glob("build.[0-9]*.json")):
        state.unlink()


def await_visible(seen: Callable[[], bool], path: Path, group: Group) -> None:
    """Wait for what the first process has written; a network file system may show it late."""
    end = time.monotonic() + _VISIBLE
    while True:
        with contextlib.suppress(OSError, ValueError):
            if seen():
                return
        if time.monotonic() > end:
            raise FileNotFoundError(
                f"{path}: written by process 0, but process {group.index} does not see it: an "
                "index that several processes build must be on a file system they share"
            )
        time.sleep(0.05)


@contextlib.contextmanager
def _held(path: Path, folder: Path, group: Group) -> Iterator[Path]:
    """Lock the index at `path` and make a folder; the system unlocks it when the process ends.

    What is locked is a file beside it. The first process makes sure that nobody is there; then all
    of the group share the lock, so that it is held until the last of them has ended, however it
    ends. The last one deletes the file.
    """
    file = beside(building_folder(path), "lock")
    descriptor = None
    try:
        if group.is_first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            descriptor = lock_file(file)
            folder.mkdir(exist_ok=True)
            if descriptor is not None and group.count > 1:
                lock(descriptor, shared=True)
        has_locks = group.exchange("the lock", descriptor is not None)[0]
        if not group.is_first:
            await_visible(folder.is_dir, folder, group)
            descriptor = lock_file(file, shared=True) if has_locks else None
        group.exchange("all locks")
        yield folder
    except BlockingIOError:
        raise RuntimeError(
            f"{path}: another process is building or changing this index; wait until it is done"
        ) from None
    finally:
        unlock_file(file, descriptor)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _is_ours(folder: Path) -> bool:
    """Whether this library made the folder; a kill may leave no more than the mark's draft."""
    if _is_marked(folder):
        return True
    return folder.is_dir() and set(folder.iterdir()) <= set(drafts(folder / state_name(0)))


def _is_marked(folder: Path) -> bool:
    state = read_state(folder)
    return all(state.get(name) == value for name, value in _MARK.items())


def _delete_all_but_the_mark(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name != state_name(0):
            file.unlink()
