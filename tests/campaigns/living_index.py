"""Change an index at random, and compare it with a dictionary of documents after every step.

    python tests/campaigns/living_index.py --count 2000 --seed 0

A sequence adds, deletes, updates, upserts, compacts, reopens, is killed in the middle of a change
(at a random write, sync, rename or removal), refreshes readers, searches and filters. Right is:
the ids and the scores (within 1e-5) of exact MaxSim over the dictionary's documents, which keeps
their embeddings as they are after compression, for the index as it is and for every reader as it
was opened; min(k, documents) results by PLAID, each with its exact score; and whole files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import unit_rows  # noqa: E402

from colbert_jax import Index  # noqa: E402
from colbert_jax.index import changes  # noqa: E402
from colbert_jax.index import format as fmt  # noqa: E402

DIM, NBITS, WORDS = 8, 4, 40
READERS = 3
Known = dict[str, np.ndarray]  # id -> float32[Ld, D]


class Killed(BaseException):
    pass


def documents(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Token embeddings near a few directions, so that documents resemble each other."""
    rng = np.random.default_rng(seed)
    words = unit_rows(np.random.default_rng(0), WORDS, DIM)
    lengths = rng.integers(1, 6, number)
    rows = words[rng.integers(0, WORDS, lengths.sum())] + 0.3 * rng.normal(
        size=(lengths.sum(), DIM)
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), lengths


def decompressed(index: Index, i: int) -> np.ndarray:
    """float32[Ld, D], by the definition of the format, without the library."""
    start, stop = index._files["offsets"][i : i + 2]
    bits = np.unpackbits(np.asarray(index._files["residuals"][start:stop]), axis=1)
    buckets = bits.reshape(stop - start, DIM, NBITS) @ (1 << np.arange(NBITS))
    rows = index._files["centroids"][index._files["codes"][start:stop]]
    rows = rows + index._files["bucket_weights"][buckets]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ranked(known: Known, query: np.ndarray) -> dict[str, float]:
    return {id: float((query @ rows.T).max(axis=1).sum()) for id, rows in known.items()}


def check(index: Index, known: Known, seed: int, k: int) -> None:
    """That an index holds these documents and finds them."""
    assert len(index) == len(known)
    assert {index.ids[i] for i in np.flatnonzero(~index.deleted).tolist()} == set(known)
    queries = documents(seed, 2)[0][:4][None]
    expected = ranked(known, queries[0])
    best = sorted(expected.values(), reverse=True)
    for mode in ("exact", "fast", "accurate"):
        positions, scores = (row[0].tolist() for row in index.search(queries, k, mode=mode))
        found = [index.ids[p] for p in positions]
        assert len(found) == len(set(found)) == min(k, len(known)), (mode, found)
        for id, score in zip(found, scores, strict=True):
            assert abs(score - expected[id]) < 1e-5, (mode, id, score, expected[id])
        if mode == "exact":
            np.testing.assert_allclose(scores, best[: len(scores)], atol=1e-5)


class LivingIndex(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 999), number=st.integers(3, 30), own=st.booleans())
    def build(self, seed, number, own):
        self.folder = Path(tempfile.mkdtemp())
        self.path, self.fresh = self.folder / "i", 0
        self.own = own  # ids of their own; else numbers
        ids = self.new_ids(number) if own else [str(i) for i in range(number)]
        values, lengths = documents(seed, number)
        self.index = Index.build(
            self.path,
            embeddings=values,
            lengths=lengths,
            ids=ids if own else None,
            nbits=NBITS,
            num_centroids=8,
            kmeans_niters=1,
            progress=False,
        )
        self.known = self.stored(ids)
        self.readers: list[tuple[Index, Known]] = []

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def new_ids(self, number):
        self.fresh += number
        return [f"id{i}" for i in range(self.fresh - number, self.fresh)]

    def stored(self, ids) -> Known:
        index = self.index
        return {id: decompressed(index, index.position(id)) for id in ids}

    def change(self, how: Callable[[Index], Index], ids: list[str], kill: int | None, again: bool):
        """Make a change, or be killed in it, and perhaps make it again.

        ids: the documents that are new after it; None: it deletes.
        """
        with dying_after(kill):
            try:
                self.index = how(self.index)
                return True
            except Killed:
                pass
        before = self.index.metadata.state
        self.index = Index.open(self.path)
        happened = self.index.metadata.state != before
        if happened or not again:
            return happened
        self.index = how(self.index)
        return True

    @rule(
        kind=st.sampled_from(["add", "upsert", "update"]),
        seed=st.integers(0, 999),
        number=st.integers(1, 6),
        kill=st.none() | st.integers(1, 60),
        again=st.booleans(),
        data=st.data(),
    )
    def grow(self, kind, seed, number, kill, again, data):
        ids = []
        if kind != "add" and self.known:
            some = st.lists(st.sampled_from(sorted(self.known)), max_size=number, unique=True)
            ids = data.draw(some)
        if kind != "update" and (self.own or kind == "upsert"):
            ids += self.new_ids(number - len(ids))
        if kind == "add" and not self.own:
            values, lengths = documents(seed, number)
            numbers = [str(self.next_number() + i) for i in range(number)]
            if self.change(
                lambda index: index.add(embeddings=values, lengths=lengths, progress=False),
                numbers,
                kill,
                again,
            ):
                self.known |= self.stored(numbers)
            return
        if not ids:
            return
        values, lengths = documents(seed, len(ids))
        if self.change(
            lambda index: getattr(index, kind)(
                embeddings=values, lengths=lengths, ids=ids, progress=False
            ),
            ids,
            kill,
            again,
        ):
            self.own = self.own or kind in ("upsert", "update")
            self.known |= self.stored(ids)

    def next_number(self) -> int:
        change = self.index.metadata.change
        known = None if change is None else change.next_id
        return len(self.index.lengths) if known is None else known

    @precondition(lambda self: self.known)
    @rule(data=st.data(), kill=st.none() | st.integers(1, 20), again=st.booleans())
    def delete(self, data, kill, again):
        most = data.draw(st.sampled_from([1, 3, len(self.known)]))
        some = st.lists(st.sampled_from(sorted(self.known)), min_size=1, max_size=most, unique=True)
        ids = data.draw(some)
        if self.change(lambda index: index.delete(ids), [], kill, again):
            for id in ids:
                del self.known[id]

    @rule(kill=st.none() | st.integers(1, 40), again=st.booleans())
    def compact(self, kill, again):
        self.change(lambda index: index.compact(False), [], kill, again)

    @rule(unlisted=st.sampled_from([0, 20, 1 << 18]))
    def lists(self, unlisted):
        """From now on the lists on disk are made again sooner or later."""
        changes._UNLISTED, changes._UNLISTED_SHARE = unlisted, 1 << 30

    @rule()
    def reopen(self):
        self.index = Index.open(self.path)

    @rule()
    def read(self):
        self.readers = [*self.readers[-READERS + 1 :], (self.index, dict(self.known))]

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def refresh(self, data):
        place = data.draw(st.integers(0, len(self.readers) - 1))
        self.readers[place] = self.readers[place][0].refresh(), dict(self.known)

    @rule(seed=st.integers(0, 99), k=st.sampled_from([1, 5, 100]))
    def search(self, seed, k):
        check(self.index, self.known, seed, k)
        for reader, known in self.readers:
            check(reader, known, seed, k)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), seed=st.integers(0, 99))
    def search_some(self, data, seed):
        some = st.lists(st.sampled_from(sorted(self.known)), min_size=1, unique=True)
        ids = data.draw(some)
        queries = documents(seed, 2)[0][:4][None]
        expected = ranked({id: self.known[id] for id in ids}, queries[0])
        for mode in ("exact", "accurate"):
            hits = self.index.search(queries, 5, mode=mode, ids=ids)
            found = [self.index.ids[p] for p in hits.positions[0]]
            assert len(found) == min(5, len(ids))
            for id, score in zip(found, hits.scores[0], strict=True):
                assert abs(score - expected[id]) < 1e-5

    @rule()
    def verify(self):
        self.index.verify()


def dying_after(steps: int | None) -> Any:
    """Patch what writes, syncs, renames and removes, to end with `Killed` after so many calls."""
    left = [10**9 if steps is None else steps]

    def counted(function):
        def wrapper(*args, **kwargs):
            # A killed process lets go of its lock; this one would keep it.
            if not str(args[0]).endswith(".lock.colbert_jax"):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
            return function(*args, **kwargs)

        return wrapper

    stack = contextlib.ExitStack()
    for of, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (os, "unlink"),
        (fmt.ArrayWriter, "append"),
        (fmt, "append_rows"),
    ):
        stack.enter_context(mock.patch.object(of, name, counted(getattr(of, name))))
    return stack


def campaign(count: int, seed: int, steps: int = 20) -> None:
    """Run so many sequences; raises for the first that goes wrong, made as short as can be."""
    unlisted = changes._UNLISTED, changes._UNLISTED_SHARE
    # Durability is not what this is about, and waiting for disks takes most of the time.
    no_sync = mock.patch.object(os, "fsync", lambda descriptor: None)
    try:
        machine = type("LivingIndex", (LivingIndex,), {})
        machine._hypothesis_internal_use_seed = seed
        with no_sync:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=count,
                    stateful_step_count=steps,
                    deadline=None,
                    database=None,
                    print_blob=True,
                    phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck),
                ),
            )
    finally:
        changes._UNLISTED, changes._UNLISTED_SHARE = unlisted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="sequences (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    campaign(args.count, args.seed)
    print(f"{args.count} sequences from seed {args.seed}: no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
