"""What campaigns share: damage to files, and trials in a process that may crash or hang."""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LIMIT = 30  # seconds of one trial
Damage = Callable[[Path, list[Path], np.random.Generator], str]


# --- Damage ---------------------------------------------------------------------------------


def pick(files: list[Path], rng: np.random.Generator) -> Path:
    return files[int(rng.integers(len(files)))]


def _pick_full(files: list[Path], rng: np.random.Generator) -> Path:
    return pick([file for file in files if file.stat().st_size], rng)


def truncate(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick_full(files, rng)
    size = int(rng.integers(file.stat().st_size))
    os.truncate(file, size)
    return f"{file.name} cut to {size} bytes"


def flip(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick_full(files, rng)
    data = bytearray(file.read_bytes())
    # Half of the flips fall into the first bytes, where headers are.
    most = len(data) if rng.random() < 0.5 else min(len(data), 4096)
    places = rng.integers(most * 8, size=int(rng.integers(1, 5)))
    for place in places.tolist():
        data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)
    return f"{file.name}: bits {places.tolist()} flipped"


def zeros(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick_full(files, rng)
    data = bytearray(file.read_bytes())
    start = int(rng.integers(len(data)))
    stop = min(len(data), start + int(rng.integers(1, 4096)))
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)
    return f"{file.name}: zeros at {start}..{stop}"


def junk(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = pick(files, rng)
    with file.open("ab") as stream:
        stream.write(rng.bytes(int(rng.integers(1, 200))))
    return f"{file.name}: bytes appended"


def replace(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = pick(files, rng)
    contents = (  # an empty object is a valid file, which sets nothing
        b"",
        b"null",
        b"[]",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"<!DOCTYPE html><html></html>",
        b"\xff\xfe{\x00",
        b"[" * 100_000,
    )
    content = contents[int(rng.integers(len(contents)))]
    file.write_bytes(content)
    return f"{file.name} became {content[:20]!r}"


def delete(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = pick(files, rng)
    file.unlink()
    return f"{file.relative_to(folder)} deleted"


def unreadable(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = pick(files, rng)
    file.unlink()
    kind = ("link", "circle", "folder", "pipe")[int(rng.integers(4))]
    if kind == "link":
        file.symlink_to("pruned")
    elif kind == "circle":
        file.symlink_to(file)
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    return f"{file.relative_to(folder)} became a {kind}"


def swap(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    first, second = (files[int(i)] for i in rng.choice(len(files), 2, replace=False))
    aside = folder / "aside"
    os.rename(first, aside)
    os.rename(second, first)
    os.rename(aside, second)
    return f"{first.relative_to(folder)} and {second.relative_to(folder)} exchanged"


def wrong_type(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """A value of a JSON file becomes one of another type; null would mean that it is not set."""
    file = pick([f for f in files if f.suffix in (".json", ".metadata")] or files, rng)
    try:
        value = json.loads(file.read_text())
    except ValueError:
        return truncate(folder, [file], rng)
    places = list(_places(value, ()))
    path, old = places[int(rng.integers(len(places)))]
    others = ["text", -1, 10**30, 0.5, True, [], ["text"], {}, {"text": -1}, float("nan")]
    others = [o for o in others if not _alike(o, old)]
    new = others[int(rng.integers(len(others)))]
    if path:
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = new
    else:
        value = new
    file.write_text(json.dumps(value))
    return f"{file.relative_to(folder)}: {'.'.join(map(str, path))} {old!r:.40} became {new!r}"


def _alike(new: Any, old: Any) -> bool:
    """Whether a reader may take one for the other: numbers, anything in the place of null."""
    if isinstance(new, bool) or isinstance(old, bool):
        return type(new) is type(old)
    numbers = isinstance(new, (int, float)) and isinstance(old, (int, float))
    return old is None or type(new) is type(old) or numbers


def _places(value: Any, path: tuple) -> Iterator[tuple[tuple, Any]]:
    yield path, value
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if len(path) < 6:
        for key, inner in list(items)[:40]:
            yield from _places(inner, (*path, key))


# --- Trials ---------------------------------------------------------------------------------


class Campaign(NamedTuple):
    """A kind of damage, tried many times.

    script: the file that makes it, which runs as a worker.
    write_sources: writes what is damaged into a folder.
    load: what trials compare with, of that folder.
    trial: (folder, seed, number, loaded) -> what was done, and the verdict; one that begins with
      "fault" is one. It depends on the seed and its number alone.
    """

    script: str
    write_sources: Callable[[Path], None]
    load: Callable[[Path], Any]
    trial: Callable[[Path, int, int, Any], dict[str, str]]

    def run(self, count: int, seed: int, first: int = 0) -> Iterator[dict[str, str]]:
        """Run trials in a process that is started again after a crash or a hang."""
        with tempfile.TemporaryDirectory() as root:
            self.write_sources(Path(root))
            start, stop = first, first + count
            while start < stop:
                command = [sys.executable, self.script, "--worker", root]
                command += map(str, ["--seed", seed, "--first", start, "--count", stop - start])
                with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
                    number, why = start - 1, "crash"
                    for line in _lines(worker):
                        if line is None:
                            worker.kill()
                            why = "hang"
                        elif "number" in line:
                            number = line["number"]
                        else:
                            start = number + 1
                            yield {"number": str(number), **line}
                if start < stop:
                    if number < start:
                        raise RuntimeError(f"the worker ended before trial {start}")
                    verdict = f"fault: {why}, exit status {worker.returncode}"
                    yield {"number": str(number), "done": "see the seed", "verdict": verdict}
                    start = number + 1

    def work(self, sources: Path, seed: int, start: int, stop: int) -> None:
        """Run trials in this process, a line of JSON for the beginning and the end of each."""
        loaded = self.load(sources)
        for number in range(start, stop):
            print(json.dumps({"number": number}), flush=True)
            print(json.dumps(self.trial(sources, seed, number, loaded)), flush=True)

    def main(self, summary: str, count: int) -> int:
        """The command line; returns the exit status."""
        parser = argparse.ArgumentParser(description=summary)
        parser.add_argument("--count", type=int, default=count, help=f"trials (default: {count})")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--first", type=int, default=0, help="number of the first trial")
        parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
        args = parser.parse_args()
        if args.worker:
            self.work(args.worker, args.seed, args.first, args.first + args.count)
            return 0
        verdicts: Counter[str] = Counter()
        for result in self.run(args.count, args.seed, args.first):
            fault = result["verdict"].startswith("fault")
            verdicts["fault" if fault else result["verdict"]] += 1
            if fault:
                print(f"trial {result['number']}: {result['done']}\n    {result['verdict']}")
        print(", ".join(f"{verdict}: {n}" for verdict, n in verdicts.most_common()))
        return 1 if verdicts["fault"] else 0


def _lines(worker: Any) -> Iterator[dict[str, Any] | None]:
    """The worker's lines; None where none comes in time."""
    pending, patience = b"", 20 * LIMIT  # what trials compare with is loaded first
    while True:
        ready, _, _ = select.select([worker.stdout], [], [], patience)
        if not ready:
            yield None
            return
        data = os.read(worker.stdout.fileno(), 1 << 16)
        if not data:
            return
        patience = 4 * LIMIT
        *whole, pending = (pending + data).split(b"\n")
        yield from map(json.loads, whole)
