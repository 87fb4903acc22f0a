"""Batches for training, read, tokenised and padded by a host thread ahead of the device.

Which examples a step trains on depends on the seed and the step alone: not on the processes, the
devices, or where a run was interrupted.

A `Mixture` takes its steps from several sources, each with a loss of its own. Every step learns
from one source, so that all its queries are comparable; which one depends on the shares and the
step alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.batching import ladder_length, pad_rows
from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import ExampleSource, most_positives, positives_of
from colbert_jax.processes import Group
from colbert_jax.text import TextTokenizer, TokenIds
from colbert_jax.training.batch import ExampleBatch, Images, Passages, TokenBatch

# Every tuple of lengths is a program to compile, so there are fewer than `batching.LADDER` has.
_LADDER = (16, 32, 48, 64, 80, 96, 128, 180, 256, 300, 400, 512)
_LEAST_ROWS = 8  # of a length group on a device
# Settings that say what a step learns; all others are the run's.
TASK_SETTINGS = (
    "loss",
    "nway",
    "use_ib_negatives",
    "distillation_alpha",
    "student_temperature",
    "teacher_temperature",
    "normalize_teacher",
    "normalize_student",
    "temperature",
    "coupled_weight",
    "coupled_tokens",
    "bsize",
    "accumsteps",
    "shuffle",
    "length_groups",
)


class Step(NamedTuple):
    """The examples of one optimiser step.

    number: of the step, from 0.
    batches: one for each micro-batch, this process's rows as NumPy arrays.
    stop, save: some process asked to stop, or for a checkpoint; the same in all of them.
    examples: int64[B / processes], the numbers of this process's examples, batch by batch.
    """

    number: int
    batches: list[ExampleBatch]
    stop: bool
    examples: np.ndarray
    save: bool = False


class Loader:
    """An endless iterator of `Step`s, from step `start` on.

    Each epoch takes every example once; a step may end one epoch and begin the next. In a
    micro-batch process p of P has the p-th of P equal runs of queries.

    Documents are sorted by length in each process and cut into groups of one size, each padded to
    its own length. The processes agree on the lengths of every step, so the arrays of a step have
    the same shapes everywhere and `ExampleBatch.order` counts rows of the groups of all processes:
    in each group those of process 0 come first.

    Set `stop_requested` to ask every process to stop: the flag travels with the steps prepared from
    then on, so it comes up to `ahead` steps later, in all processes with the same step. So it is
    with `save_requested`, which asks once for a checkpoint.

    Close it, or use it as a context manager: that ends its thread.
    """

    def __init__(
        self,
        source: ExampleSource,
        tokenizer: TextTokenizer,
        *,
        bsize: int,
        seed: int,
        nway: int | None = None,
        accumsteps: int = 1,
        shuffle: bool = True,
        start: int = 0,
        devices: int = 1,
        group: Group | None = None,
        length_groups: int = 4,
        ahead: int = 2,
        longest: int | None = None,
    ):
        """
        Args:
          bsize: queries of a step, in all its micro-batches and processes.
          seed: of the order; any whole number >= 0.
          nway: documents of a query. If None, all that the source has.
          accumsteps: micro-batches of a step.
          shuffle: if False, examples come in the source's own order in each epoch.
          start: the first step to give.
          devices: of this process, among which its rows are divided.
          group: the processes of the job; every one of them makes a loader.
          length_groups: groups of documents by length; fewer where they can't be equal or would
            leave a device less than 8 rows.
          ahead: steps that may be prepared before they are asked for.
          longest: the model's number of positions.

        Raises:
          ValueError: numbers that do not fit together; names them.
        """
        group = Group() if group is None else group
        for name, value, least in (
            ("bsize", bsize, 1),
            ("accumsteps", accumsteps, 1),
            ("seed", seed, 0),
            ("start", start, 0),
            ("devices", devices, 1),
            ("length_groups", length_groups, 1),
            ("ahead", ahead, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_divides(bsize, accumsteps, group.count, devices)
        self._nway = source.nway if nway is None else nway
        if not 1 <= self._nway <= source.nway:
            raise ValueError(
                f"nway must be between 1 and {source.nway}, the documents of every example, got "
                f"{nway}"
            )
        text = tokenizer.config
        for name in ("query_maxlen", "doc_maxlen"):
            if longest is not None and getattr(text, name) > longest:
                raise ValueError(
                    f"{name} {getattr(text, name)} is more than the model's {longest} positions"
                )
        self._source, self._tokenizer, self._group = source, tokenizer, group.lane()
        self._shape = (accumsteps, group.count, bsize // (accumsteps * group.count))
        rows = self._shape[2] * self._nway
        self._num_groups = num_groups(rows, devices, length_groups)
        self._labels = most_positives(source)
        self._order = _Order(len(source), seed, shuffle)
        self.stop_requested = self.save_requested = False
        self._slots = threading.Semaphore(ahead)
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(start,), name="colbert_jax loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """Give the next step. Raises what went wrong while it was prepared; StopIteration once
        closed."""
        if self._error is not None:
            raise self._error
        if self._closed.is_set():
            raise StopIteration
        step = self._ready.get()
        if isinstance(step, BaseException):
            self._error = step
            self._group.fail(step)
            raise step
        self._slots.release()
        if self._group.count == 1:
            step = step._replace(stop=self.stop_requested)
        return step

    def close(self) -> None:
        """End the thread; may be called twice."""
        self._closed.set()
        self._slots.release()
        self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, start: int) -> None:
        try:
            for number in itertools.count(start):
                self._slots.acquire()
                if self._closed.is_set():
                    return
                self._ready.put(self._prepare(number, number == start))
        except BaseException as error:
            self._ready.put(error)

    def _prepare(self, number: int, is_first: bool) -> Step:
        count, processes, share = self._shape
        bsize = count * processes * share
        whole = self._order.examples(number * bsize, (number + 1) * bsize)
        mine = whole.reshape(self._shape)[:, self._group.index]
        places = np.arange(number * bsize, (number + 1) * bsize).reshape(self._shape)
        drafts = [
            self._draft(self._read(*pair))
            for pair in zip(mine, places[:, self._group.index], strict=True)
        ]
        save, self.save_requested = self.save_requested, False
        local = {
            "lengths": [draft.lengths for draft in drafts],
            "stop": self.stop_requested,
            "save": save,
            "run": [self._source.fingerprint, *self._shape, self._nway] if is_first else None,
        }
        everyone = self._group.exchange(
            f"training step {number}", local, cancelled=self._closed.is_set
        )
        for process, remote in enumerate(everyone):
            if remote["run"] != everyone[0]["run"]:
                raise ValueError(
                    f"process {process} reads other training data, or the same with other "
                    "settings, than process 0"
                )
        lengths = np.max([remote["lengths"] for remote in everyone], axis=0)
        return Step(
            number,
            [self._finish(*pair) for pair in zip(drafts, lengths.tolist(), strict=True)],
            any(remote["stop"] for remote in everyone),
            mine.reshape(-1),
            any(remote["save"] for remote in everyone),
        )

    def _read(self, numbers: np.ndarray, places: np.ndarray) -> list[Any]:
        """The examples of a micro-batch; `places` are theirs in the endless sequence."""
        return [self._source[int(i)] for i in numbers]

    def _draft(self, examples: list[Any]) -> _Draft:
        queries = self._tokenizer.queries([example.query for example in examples])
        texts = [text for example in examples for text in example.documents[: self._nway]]
        documents = self._tokenizer.documents(texts)
        by_length = np.argsort(-documents.attended, kind="stable")
        groups = by_length.reshape(self._num_groups, -1)
        lengths = [max(map(len, queries.ids)), *documents.attended[groups[:, 0]].tolist()]
        scores = None
        if self._source.scored:
            scores = np.array([example.scores[: self._nway] for example in examples], np.float32)
        passages = self._passages(examples, queries, documents)
        return _Draft(queries, documents, groups, lengths, scores, passages)

    def _passages(self, examples: list[Any], queries: TokenIds, documents: TokenIds) -> Passages:
        """By token ids: texts that the model reads alike cannot be told apart."""
        own = _identities(documents.ids)
        labelled = np.repeat(own[:: self._nway, None], self._labels, axis=1)
        if self._labels > 1:
            texts = [positives_of(self._source, example.query) for example in examples]
            known = _identities(self._tokenizer.documents([*itertools.chain(*texts)]).ids)
            ends = np.cumsum([0, *map(len, texts)])
            for row, start, end in zip(labelled, ends, ends[1:], strict=False):
                row[: end - start] = known[start:end]
        return Passages(_identities(queries.ids), own, labelled)

    def _finish(self, draft: _Draft, lengths: list[int]) -> ExampleBatch:
        text, tokenizer = self._tokenizer.config, self._tokenizer
        queries = _rows(
            draft.queries.ids,
            draft.queries.attended,
            self._query_length(lengths[0]),
            tokenizer.special.pad,
            tokenizer.kept_in_query,
        )
        documents = tuple(
            _rows(
                [draft.documents.ids[i] for i in group],
                draft.documents.attended[group],
                padded_length(length, text.doc_maxlen),
                tokenizer.special.pad,
                tokenizer.kept,
            )
            for group, length in zip(draft.groups, lengths[1:], strict=True)
        )
        order = self._global_order(draft.groups)
        return ExampleBatch(queries, documents, order, draft.scores, draft.passages, draft.images)

    def _query_length(self, length: int) -> int:
        text = self._tokenizer.config
        return text.fixed_query_length or padded_length(length, text.query_maxlen)

    def _global_order(self, groups: np.ndarray) -> np.ndarray:
        """int32[B * W / processes]: row of each local document in all processes' groups."""
        num_groups, rows = groups.shape
        before = np.arange(num_groups)[:, None] * self._group.count + self._group.index
        order = np.empty(groups.size, np.int32)
        order[groups] = before * rows + np.arange(rows)
        return order


class _Draft(NamedTuple):
    """A micro-batch before the processes have agreed on lengths.

    groups: int64[G, rows], documents by length, longest first.
    lengths: the longest query, then the longest document of each group.
    scores: float32[B, W] or None.
    """

    queries: TokenIds
    documents: TokenIds
    groups: np.ndarray
    lengths: list[int]
    scores: np.ndarray | None
    passages: Passages
    images: Images | None = None


class _Order:
    """The endless sequence of example numbers; keeps the permutations it has used last."""

    def __init__(self, count: int, seed: int, shuffle: bool):
        self._count, self._seed, self._shuffle = count, seed, shuffle
        self._epochs: dict[int, np.ndarray] = {}

    def examples(self, start: int, stop: int) -> np.ndarray:
        """int64: the numbers at positions start to stop."""
        epochs, places = np.divmod(np.arange(start, stop), self._count)
        if not self._shuffle:
            return places
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            numbers[chosen] = self._epoch(epoch)[places[chosen]]
        return numbers

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = permutation(self._count, self._seed, epoch)
        return self._epochs[epoch]


def check_divides(bsize: int, accumsteps: int, processes: int, devices: int) -> None:
    """Raise ValueError where a step's queries cannot be shared out; `devices` of each process."""
    parts = accumsteps * processes * devices
    if bsize % parts:
        raise ValueError(
            f"bsize {bsize} must be a multiple of {parts}: accumsteps {accumsteps} x "
            f"{processes} processes x {devices} devices each"
        )


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Give the order of the examples in an epoch, int[count].

    The ranks of a counter-based generator's raw words, which NumPy keeps as they are from version
    to version, as it does not for `Generator.permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    order = np.argsort(words, kind="stable")
    return order.astype(np.int32) if count < 1 << 31 else order


def padded_length(length: int, longest: int) -> int:
    """Round a length up to a step of training's ladder: see `batching.ladder_length`."""
    return ladder_length(length, longest, _LADDER)


def num_groups(rows: int, devices: int, most: int) -> int:
    """The number of equal groups that `rows` are cut into."""
    fitting = [
        n
        for n in range(2, most + 1)
        if rows % (n * devices) == 0 and rows // (n * devices) >= _LEAST_ROWS
    ]
    return max(fitting, default=1)


def _rows(ids: list[np.ndarray], attended: Any, length: int, pad: int, keep: Any) -> TokenBatch:
    """Padded to [N, length]; padding is not kept."""
    kept = [keep(row) for row in ids]
    return TokenBatch(
        pad_rows(ids, len(ids), length, pad),
        np.asarray(attended, np.int32),
        pad_rows(kept, len(ids), length, False),
    )


def _identities(ids: list[np.ndarray]) -> np.ndarray:
    """int32[N, 2]: the same of rows of the same ids, in all processes."""
    digests = (hashlib.blake2b(row.astype("<i4").tobytes(), digest_size=8).digest() for row in ids)
    return np.frombuffer(b"".join(digests), "<i4").astype(np.int32).reshape(-1, 2)


# --- Several sources ------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A further source to train on, with a loss of its own.

    name: of its metrics, before a slash.
    share: of all steps, between 0 and 1.
    settings: those of `TASK_SETTINGS` that differ from the run's.
    """

    name: str
    examples: ExampleSource
    share: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name == "dev":
            raise ValueError(
                f"a task's name must be a word without a slash, and not dev: got {self.name!r}"
            )
        if not 0 < self.share < 1:
            raise ValueError(f"task {self.name}: share must be in (0, 1), got {self.share}")
        foreign = sorted(set(self.settings) - set(TASK_SETTINGS))
        if foreign:
            raise ValueError(
                f"task {self.name}: {', '.join(foreign)} cannot differ between tasks; these can: "
                f"{', '.join(TASK_SETTINGS)}"
            )

    def config(self, run: TrainingConfig) -> TrainingConfig:
        """The run's settings with this task's own."""
        return dataclasses.replace(run, **self.settings)


def task_order(shares: Sequence[float]) -> Iterator[int]:
    """Yield the task of every step, without end.

    A step goes to the task furthest behind its share: after n steps each has had its share of n,
    give or take one.
    """
    done = [0] * len(shares)
    for step in itertools.count(1):
        task = max(range(len(shares)), key=lambda k: shares[k] * step - done[k])
        done[task] += 1
        yield task


class Mixture:
    """An endless iterator of pairs of task and `Step`, whose number is the run's.

    A context manager, which closes the loaders.

    Args:
      shares: of each task.
      loaders: functions that make each task's loader, given the first of its own steps to give.
      start: the run's first step to give.
    """

    def __init__(
        self, shares: Sequence[float], loaders: Sequence[Callable[[int], Loader]], start: int = 0
    ):
        self._tasks, self._number = task_order(shares), start
        self._most = max(range(len(shares)), key=shares.__getitem__)  # comes soonest
        done = Counter(itertools.islice(self._tasks, start))
        with ExitStack() as stack:
            self._loaders = [
                stack.enter_context(make(done[task])) for task, make in enumerate(loaders)
            ]
            self._stack = stack.pop_all()

    def __iter__(self) -> Iterator[tuple[int, Step]]:
        return self

    def __next__(self) -> tuple[int, Step]:
        task = next(self._tasks)
        step = next(self._loaders[task])._replace(number=self._number)
        self._number += 1
        return task, step

    def request_stop(self) -> None:
        """Ask every process to stop: see `Loader.stop_requested`."""
        for loader in self._loaders:
            loader.stop_requested = True

    def request_save(self) -> None:
        """Ask every process for a checkpoint: see `Loader.save_requested`."""
        self._loaders[self._most].save_requested = True

    def __enter__(self) -> Mixture:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
