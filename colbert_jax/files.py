"""Files and folders: read with errors that name them, written whole or not at all.

What is being written lies beside its place as `.NAME.<8 hex digits>.colbert_jax`, and a folder that
makes room for a new one is `.NAME.previous.colbert_jax` for a moment. Names that a user may have
chosen are never taken over.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import shutil
import stat
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_OURS = ".colbert_jax"
_DIGITS = 8  # of a draft's name
_READ = 1 << 22  # bytes read at a time
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def checksum(file: Path) -> int:
    """CRC-32 of a file, read in blocks."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_READ):
            crc = zlib.crc32(block, crc)
    return crc


def present(file: Path) -> bool:
    """Whether a file is there, for files that may be left out.

    What is there and cannot be read does not count as absent: without one of its settings files a
    checkpoint would be read as another model.

    Raises:
      ValueError: there is a broken link, a folder, a pipe, or a file that may not be read.
    """
    kind = _kind(file)
    if kind is None:
        return False
    if kind != stat.S_IFREG:
        what = "a folder" if kind == stat.S_IFDIR else "a pipe or a device"
        raise ValueError(f"{file}: {what} in place of a file; remove it, or put the file there")
    try:
        file.open("rb").close()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    return True


def present_folder(folder: Path) -> bool:
    """Whether a folder is there; errors as for `present`."""
    kind = _kind(folder)
    if kind not in (None, stat.S_IFDIR):
        raise ValueError(f"{folder}: expected a folder, found a file")
    return kind is not None


def _kind(path: Path) -> int | None:
    """The type of what is at a path, links followed; None where nothing is."""
    if "\0" in str(path):
        return None
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            target = os.readlink(path)
            try:
                mode = os.stat(path).st_mode
            except FileNotFoundError:
                raise ValueError(
                    f"{path}: a link to {target}, which is not there; fetch the file again, or "
                    "remove the link"
                ) from None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a circle of links, a folder that may not be searched
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return stat.S_IFMT(mode)


def read_json(file: Path) -> Any:
    """Parse a JSON file; the error names the file and the place."""
    data = file.read_bytes()
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise ValueError(f"{file}, line {line}: not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError or ValueError naming the file."""
    if not present(file):
        raise FileNotFoundError(f"{file.parent}: {file.name} is missing")
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return fields


def check_types(file: Path, fields: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Hold fields of a JSON object to their types, where they are there and not null.

    Args:
      kinds: field -> type, or [type] for a list of it.

    Raises:
      ValueError: naming the file and the field.
    """
    for name, kind in kinds.items():
        value = fields.get(name)
        one = kind[0] if isinstance(kind, list) else kind
        items = value if isinstance(kind, list) and isinstance(value, list) else [value]
        whole = isinstance(value, list) == isinstance(kind, list)
        right = all(
            isinstance(item, one) and (one is bool or not isinstance(item, bool)) for item in items
        )
        if value is not None and not (whole and right):
            one = one[-1] if isinstance(one, tuple) else one
            wanted = f"a list of {one.__name__}" if isinstance(kind, list) else one.__name__
            raise ValueError(f"{file}: {name} must be {wanted}, got {value!r:.80}")


def short_json(value: Any, most: int) -> str:
    """JSON of at most so many characters, for errors."""
    text = json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def resolved(path: str | os.PathLike) -> Path:
    """The real place of a file or folder: `~`, `.` and links followed."""
    return Path(path).expanduser().resolve()


# --- One file -------------------------------------------------------------------------------


@contextmanager
def replacing(file: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A stream whose content becomes `file` in one step, durably, when the block ends well.

    Until then, and after an error, the file that was there stays as it was.

    Args:
      mode: "w", text in UTF-8 with plain newlines, or "wb".
    """
    draft = _draft(file)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with draft.open(mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[IO[str]]:
    """A stream of text into a place that a user has named.

    A file is whole or not there (`replacing`), and if the place is a link, it is the link's target.
    A pipe, a device, or an open descriptor such as /dev/stdout is written to at once.

    Raises:
      OSError: see `output_place`; or no room, naming the place.
    """
    place = output_place(path)
    try:
        if place is None:
            # "w" would empty a file that is behind a descriptor
            with open(path, "a", encoding="utf-8", newline="\n") as stream:
                yield stream
        else:
            with replacing(place) as stream:
                yield stream
    except OSError as error:
        if error.filename is None and error.errno in NO_ROOM:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise


def output_place(path: str | os.PathLike) -> Path | None:
    """Where the file lies that a user has named to be written, behind links; None for a pipe, a
    device or an open descriptor.

    Raises:
      OSError: nothing can be written there, with what to do.
    """
    path = Path(path)
    if _is_descriptor(path):
        return None
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path}: is there and may not be written; name another file")
    if path.exists() and not path.is_file():
        return None
    place = Path(os.path.realpath(path))
    if place.is_symlink():
        raise OSError(f"{path}: a link that leads back to itself; remove it")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {place.parent}; make it first")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: no permission to write in {place.parent}; name another")
    return place


def _is_descriptor(path: Path) -> bool:
    """Whether a path is, or links to, an open file of this process."""
    name = os.path.abspath(path)
    for _ in range(40):  # as many links as Linux follows
        if re.fullmatch(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/[^/]+/fd/\d+", name):
            return True
        if not os.path.islink(name):
            return False
        name = os.path.abspath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return False


def write_json(file: Path, value: Any) -> None:
    """Replace a JSON file in one step, durably."""
    with replacing(file) as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# --- A folder -------------------------------------------------------------------------------


def check_free(folder: Path) -> None:
    """Raises FileExistsError where `folder` exists and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not an empty folder; name another place")


@contextmanager
def publishing(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A draft to write into, which becomes `folder` in one step when the block ends well.

    Args:
      replace: the folder that is there goes when the new one is complete; what a killed run has
        left is repaired first (`recover`), so nobody else may be writing to `folder`.

    Raises FileExistsError where a file is at `folder`, or, without `replace`, anything but an empty
    folder.
    """
    folder = folder.resolve()
    if replace and (folder.is_dir() or not folder.exists()):
        recover(folder)
    else:
        check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(folder)
    draft.mkdir()
    try:
        yield draft
        for file in draft.rglob("*"):
            _sync(file)
        if replace:
            replace_folder(draft, folder)
        else:
            if folder.exists():
                folder.rmdir()
            os.replace(draft, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Give a finished folder the name of one that may be there, which is then deleted.

    A kill between the two renames leaves the former one at `previous_folder`; `recover` brings it
    back. The files in `new` must have been synced.
    """
    previous = previous_folder(folder)
    sync_folder(new)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(folder, previous)
    os.rename(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def previous_folder(folder: Path) -> Path:
    """Where the former folder is while a new one takes its place."""
    return beside(folder, "previous")


def recover(folder: Path) -> None:
    """Repair what a kill has left of `publishing`: no draft stays, and the former folder comes back
    where the new one had not yet come. Only where nobody else is writing to `folder`."""
    previous = previous_folder(folder)
    if previous.is_dir() and not folder.exists():
        os.rename(previous, folder)
    for left in [previous, *drafts(folder)]:
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A draft to write files into, which take their places in `folder` when the block ends well.

    Each replaces the file of its name in one step; the folder's other files stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = _draft(folder / "files")
    draft.mkdir()
    try:
        yield draft
        for file in sorted(file for file in draft.rglob("*") if file.is_file()):
            _sync(file)
            target = folder / file.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        sync_folder(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable (where the system can open folders)."""
    if os.name == "posix":
        _sync(folder)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(place: Path, what: str) -> Path:
    """A name for what belongs to `place` for a while, one that only this library makes."""
    return place.with_name(f".{place.name}.{what}{_OURS}")


def _draft(place: Path) -> Path:
    """A new name beside `place`, which nobody else has."""
    return beside(place, secrets.token_hex(_DIGITS // 2))


def drafts(place: Path) -> Iterator[Path]:
    """What `_draft` has named and a kill has left, with the drafts of these drafts."""
    digits = "[0-9a-f]" * _DIGITS
    draft = f".{glob.escape(place.name)}.{digits}{_OURS}"
    for pattern in (draft, f".{draft}.{digits}{_OURS}"):
        yield from place.parent.glob(pattern)


# --- Locks ----------------------------------------------------------------------------------


def lock(file: int | IO[Any], *, shared: bool = False) -> None:
    """Lock an open file, or change its lock, without waiting; nothing happens on Windows.

    The system lets go of it when the file is closed, however its process ends.

    Raises:
      BlockingIOError: somebody else holds it.
      OSError: its file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def lock_file(file: Path, *, shared: bool = False) -> int | None:
    """Make a file that is there only to be locked; `unlock_file` deletes it.

    Returns:
      A descriptor that holds the lock; None where there are no locks, with a warning.

    Raises:
      BlockingIOError: somebody else holds it.
    """
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(descriptor, shared=shared)
            # Who held it before may have deleted it since it was opened.
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            os.close(descriptor)
            file.unlink(missing_ok=True)
            warnings.warn(
                f"{file}: this file system has no locks ({error}); make sure that nobody else "
                "writes here",
                stacklevel=2,
            )
            return None


def unlock_file(file: Path, descriptor: int | None) -> None:
    """Let go of a lock; who is the last to hold it deletes the file."""
    if descriptor is None:
        return
    with suppress(OSError):  # somebody else shares it
        lock(descriptor)
        file.unlink()
    os.close(descriptor)
