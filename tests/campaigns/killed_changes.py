"""Kill processes that change an index, at random moments, while readers search it.

    python tests/campaigns/killed_changes.py --kills 200 --seed 0
    python tests/campaigns/killed_changes.py --changes 10000 --readers 4 --seed 0

The first line kills a writer with SIGKILL so many times. Right is: what was committed is there, the
index is as before the change or after it, whole, and the next process finishes the change. The
second lets one writer add and delete without being killed. In both, readers in processes of their
own search and refresh without pause. Right is: no error, no id that is not of the state that they
have open, states in their order, and at the end as much memory and as many open files as before.
A change depends on the seed and its number alone. Syncing is left out where nothing is killed:
it would take most of the time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from campaigns.living_index import NBITS, check, decompressed, documents  # noqa: E402

from colbert_jax import Index  # noqa: E402

FIRST, MOST = 30, 12  # documents of the index, and of a change
WARM = 0.3  # share of a reader's searches before its memory counts


def change(index: Index, ids: list[str], seed: int, number: int) -> tuple[Index, set[str]]:
    """Change `number` of a seed; the index, and the ids that it must have then."""
    rng = np.random.default_rng([seed, number])
    kinds = ["add", "upsert", "update", "delete", "compact"]
    kind = rng.choice(kinds, p=[0.3, 0.15, 0.15, 0.3, 0.1])
    count = int(rng.integers(1, MOST))
    some = sorted(ids)
    picked = list(rng.choice(some, min(count, len(some)), replace=False)) if some else []
    fresh = [f"n{number}-{i}" for i in range(count)]
    if kind == "delete" and len(some) > 2 * FIRST:
        picked = list(rng.choice(some, len(some) - FIRST, replace=False))
    if kind == "compact":
        return index.compact(False), set(ids)
    if kind == "delete":
        return (index.delete(picked) if picked else index), set(ids) - set(picked)
    given = {"add": fresh, "upsert": fresh[:3] + picked, "update": picked}[str(kind)]
    if not given:
        return index, set(ids)
    values, lengths = documents(seed * 1_000_003 + number, len(given))
    rows = dict(embeddings=values, lengths=lengths, ids=given, progress=False)
    return getattr(index, str(kind))(**rows), set(ids) | set(given)


def living(index: Index) -> list[str]:
    return [index.ids[i] for i in np.flatnonzero(~index.deleted).tolist()]


def write(path: str, seed: int, first: int, last: int, pipe: Any, durable: bool) -> None:
    """Make changes first..last-1, saying when each begins and how many documents it left."""
    if not durable:
        os.fsync = lambda descriptor: None
    # Loading compiled loops takes longer than many changes.
    warm = Path(tempfile.mkdtemp(dir=Path(path).parent))
    change(Index.open(built(warm)), [], 0, 0)
    index = Index.open(path)
    for number in range(first, last):
        pipe.send(number)
        index, ids = change(index, living(index), seed, number)
        assert set(living(index)) == ids
    pipe.send(last)


def read(path: str, seed: int, pipe: Any) -> None:
    """Search and refresh until told to stop; what went wrong, or what was used."""
    try:
        pipe.send(("used", *_read(path, seed, pipe)))
    except BaseException as error:
        pipe.send(("error", repr(error)))
        raise


def _read(path: str, seed: int, pipe: Any) -> tuple[int, int, list[tuple[int, int]]]:
    index, searches, states, used = Index.open(path), 0, 0, []
    rng = np.random.default_rng(seed)
    ids = set(living(index))
    while not pipe.poll():
        query = documents(int(rng.integers(1000)), 2)[0][:4][None]
        k = int(rng.integers(1, 20))
        for mode in ("accurate", "exact"):
            hits = index.search(query, k, mode=mode)
            found = [index.ids[p] for p in hits.positions[0]]
            assert len(set(found)) == min(k, len(index)) and set(found) <= ids, (found, ids)
        searches += 2
        newer = index.refresh()
        if newer is not index:
            assert newer.metadata.generation > index.metadata.generation
            index, states = newer, states + 1
            ids = set(living(index))
        if searches % 200 == 0:
            used.append((_memory(), len(os.listdir("/proc/self/fd"))))
    return searches, states, used


def _memory() -> int:
    """Resident bytes that are this process's own, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0]) << 10


class Readers:
    """Processes that read an index as long as the block lasts."""

    def __init__(self, context: Any, path: Path, number: int):
        self._pipes = [context.Pipe() for _ in range(number)]
        self._processes = [
            context.Process(target=read, args=(str(path), i, pipe[1]), daemon=True)
            for i, pipe in enumerate(self._pipes)
        ]
        self.results: list[tuple] = []

    def __enter__(self) -> Readers:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *error: Any) -> None:
        for pipe, _ in self._pipes:
            pipe.send("stop")
        for process, (pipe, _) in zip(self._processes, self._pipes, strict=True):
            self.results.append(pipe.recv() if pipe.poll(60) else ("error", "hangs"))
            process.join(30)


def built(folder: Path) -> Path:
    values, lengths = documents(0, FIRST)
    return Index.build(
        folder / "i",
        embeddings=values,
        lengths=lengths,
        ids=[f"d{i}" for i in range(FIRST)],
        nbits=NBITS,
        num_centroids=16,
        progress=False,
    ).path


def check_whole(path: Path, seed: int) -> Index:
    index = Index.open(path)
    index.verify()
    known = {id: decompressed(index, index.position(id)) for id in living(index)}
    check(index, known, seed, 10)
    return index


def kills(count: int, seed: int, readers: int = 2) -> Iterator[str]:
    """Kill writers; a line for each. Raises AssertionError for the first that goes wrong."""
    context = _context()
    folder = Path(tempfile.mkdtemp())
    rng = np.random.default_rng(seed)
    try:
        path = built(folder)
        number, expected = 0, set(living(Index.open(path)))
        with Readers(context, path, readers) as reading:
            for kill in range(count):
                get, put = context.Pipe(duplex=False)
                arguments = (str(path), seed, number, number + 1000, put, True)
                writer = context.Process(target=write, args=arguments, daemon=True)
                writer.start()
                assert get.poll(120), "the writer does not begin"
                time.sleep(float(rng.choice([rng.uniform(0, 0.3), rng.uniform(0, 3)])))
                os.kill(writer.pid, signal.SIGKILL)
                writer.join(60)
                put.close()
                reached = number
                while get.poll(0):
                    try:
                        reached = get.recv()
                    except EOFError:
                        break
                # What was done before is certain; the change that was killed may be or not.
                for done in range(number, reached):
                    expected = _after(expected, seed, done)
                found = set(living(check_whole(path, seed)))
                after = _after(expected, seed, reached)
                assert found in (expected, after), (kill, reached, found ^ expected)
                number = reached + (found == after != expected)
                expected = found
                yield f"kill {kill}: in change {reached}, {len(found)} documents"
        for result in reading.results:
            assert result[0] == "used", result
        yield f"readers: {[result[1:3] for result in reading.results]} searches and states"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Dry:
    """An index that only says which ids a change would leave."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


def _after(ids: set[str], seed: int, number: int) -> set[str]:
    return change(_Dry(), sorted(ids), seed, number)[1]  # type: ignore[arg-type]


def changes(count: int, seed: int, readers: int = 4) -> Iterator[str]:
    """Let one writer change an index so many times beside readers; lines of what they used."""
    context = _context()
    folder = Path(tempfile.mkdtemp())
    try:
        path = built(folder)
        get, put = context.Pipe(duplex=False)
        with Readers(context, path, readers) as reading:
            arguments = (str(path), seed, 0, count, put, False)
            writer = context.Process(target=write, args=arguments, daemon=True)
            writer.start()
            put.close()
            reached = 0
            while reached < count:
                assert get.poll(300), f"the writer hangs in change {reached}"
                reached = get.recv()
            writer.join(60)
        index = check_whole(path, seed)
        left = {file.name for file in path.iterdir()}
        yield f"{count} changes: {len(index)} documents, {len(left)} files"
        for result in reading.results:
            assert result[0] == "used", result
            searches, states, used = result[1:]
            yield f"reader: {searches} searches, {states} states"
            warm = used[int(len(used) * WARM) :]
            if len(warm) > 10:
                memory = np.array([m for m, _ in warm]) / 1e6
                files = [f for _, f in warm]
                sizes = f"{memory[0]:.0f} to {memory[-1]:.0f} MB"
                yield f"  memory {sizes}, open files {files[0]} to {files[-1]}"
                assert np.median(memory[-5:]) < 1.1 * np.median(memory[:5]) + 10
                assert max(files[-5:]) <= max(files[:5]) + 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["campaigns.killed_changes"])
    return context


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="how many times a writer is killed")
    parser.add_argument("--changes", type=int, help="changes of a writer that is not killed")
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    for run, count in ((kills, args.kills), (changes, args.changes)):
        for line in run(count, args.seed, args.readers) if count else ():
            print(line, flush=True)
    print(f"no fault; {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    from campaigns import killed_changes  # what the other processes import

    sys.exit(killed_changes.main())
