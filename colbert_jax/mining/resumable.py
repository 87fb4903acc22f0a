"""Files that are written in blocks: a killed run goes on behind its last whole block."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from colbert_jax.files import lock, present, read_object, short_json, sync_folder, write_json
from colbert_jax.progress import progress_bar


class Block(NamedTuple):
    """What is appended in one go, and what it counts: see `BlockFile.counts`."""

    data: bytes
    counts: Mapping[str, int]


class BlockFile:
    """A file that grows block by block and takes its name when it is whole.

    Until then it is `<output>.partial`; `<output>.partial.json` holds what it is made from and how
    far it is, and is replaced in one step after each block. `<output>.meta`, beside the finished
    file, holds what it was made from. To be used as a context manager.

    Attributes:
      finished: the file is there and was made from the same; nothing is left to do.
      counts: the counts of the blocks that are there, added up by name.
    """

    def __init__(self, output: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False):
        """
        Args:
          output: the file to make.
          settings: what it is made from, JSON; equal settings, equal bytes.
          overwrite: make it anew where it is there, or left unfinished from other settings.

        Raises:
          FileExistsError: it is there, or left unfinished, from other settings; or what has the
            name of the unfinished file is something else.
          RuntimeError: another process is writing it.
        """
        self.output = Path(output)
        self._partial = _beside(self.output, ".partial")
        self._state = _beside(self.output, ".partial.json")
        self._meta = _beside(self.output, ".meta")
        self._settings = json.loads(json.dumps(settings))
        self._bytes, self.counts = 0, dict[str, int]()
        self._stream: FileIO | None = None
        self._complete_renames()
        self.finished = present(self.output) and not overwrite
        if self.finished:
            if present(self._meta):
                meta = read_object(self._meta)
                check_settings(meta.get("settings"), self._settings, self.output, "was made")
                self.counts = meta.get("counts", {})
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._partial.open("ab", buffering=0)
        try:
            _lock(self._stream, self.output)
            self._resume(overwrite)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is None:
            return
        self._stream.close()
        if error is not None and not self._bytes:  # bad input: leave nothing behind
            self._state.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)

    def fill(
        self,
        make: Callable[[int], Block],
        total: int,
        unit: str,
        description: str,
        progress: bool | None,
    ) -> None:
        """Append the blocks that are not there yet, with a bar.

        Args:
          make: the block that begins with a unit, given its number from 0.
          total: units of the whole file.
          unit: name of the count of units.
        """
        done = self.counts.get(unit, 0)
        with progress_bar(total, description, unit, progress, initial=done) as bar:
            while done < total:
                data, counts = make(done)
                self.append(data, **counts)
                done += counts[unit]
                bar.update(counts[unit])

    def append(self, data: bytes, **counts: int) -> None:
        """Write a block, for good.

        Args:
          **counts: whole numbers to add to `counts`; from them a resumed run knows where to go on.

        Raises:
          OSError: naming the file; the blocks before stay and are gone on with.
        """
        assert self._stream is not None
        try:
            left = memoryview(data)
            while left:
                left = left[self._stream.write(left) :]
            os.fsync(self._stream.fileno())
            for name, count in counts.items():
                self.counts[name] = self.counts.get(name, 0) + count
            self._bytes += len(data)
            self._commit()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; what was written before stays, the same call goes on from it",
                str(self._partial),
            ) from error

    def publish(self) -> None:
        """Give the whole file its name."""
        assert self._stream is not None
        self._stream.close()
        os.replace(self._partial, self.output)
        os.replace(self._state, self._meta)
        sync_folder(self.output.parent)
        self.finished = True

    def _complete_renames(self) -> None:
        """Do what a kill between the two renames has left undone."""
        if present(self._state) and not present(self._partial) and present(self.output):
            os.replace(self._state, self._meta)

    def _resume(self, overwrite: bool) -> None:
        """Go on behind the last whole block; what was written behind it is cut off."""
        assert self._stream is not None
        state: dict[str, Any] = {}
        size = self._partial.stat().st_size
        if present(self._state):
            with contextlib.suppress(ValueError):  # a damaged state means no state
                state = read_object(self._state)
        elif size:
            raise FileExistsError(
                f"{self._partial}: exists, and was not left by a run ({self._state.name} is "
                "missing); move it away, or name another output"
            )
        if state and state.get("bytes", 0) <= size:
            if state.get("settings") == self._settings:
                self._bytes, self.counts = state["bytes"], state["counts"]
            elif not overwrite:
                what = "was left unfinished by a run"
                check_settings(state.get("settings"), self._settings, self._partial, what)
        self._stream.truncate(self._bytes)
        self._commit()

    def _commit(self) -> None:
        state = {"settings": self._settings, "bytes": self._bytes, "counts": self.counts}
        write_json(self._state, state)


def check_settings(before: Any, settings: Mapping[str, Any], file: Path, what: str) -> None:
    """Raises FileExistsError, naming `file` and what differs, for `settings` unlike those before.

    Args:
      what: what happened to the file before, for the error.
    """
    before, settings = before if isinstance(before, dict) else {}, dict(settings)
    different = [
        f"{name}: {short_json(before.get(name), 40)}, not {short_json(settings.get(name), 40)}"
        for name in {**settings, **before}
        if before.get(name) != settings.get(name)
    ]
    if different:
        raise FileExistsError(
            f"{file}: {what} with other settings ({'; '.join(different)}); name another output, or "
            "pass overwrite=True to make it anew"
        )


def remove_finished(file: Path) -> None:
    """Delete a finished `BlockFile` and its `.meta`; a file without `.meta` is left alone."""
    meta = _beside(file, ".meta")
    if present(meta):
        file.unlink(missing_ok=True)
        meta.unlink()


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _lock(stream: FileIO, output: Path) -> None:
    """Hold a file until it is closed."""
    try:
        lock(stream)
    except BlockingIOError:
        raise RuntimeError(f"{output}: another process is writing it") from None
    except OSError:  # a file system without locks: trust that no other process writes
        return
