"""Several sources in one run, each with a loss of its own: which step learns from which.

Every step learns from one source, so that all its queries are comparable. Which one depends on the
shares and the step alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import ExampleSource
from colbert_jax.training.loader import Loader, Step

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


@dataclass(frozen=True)
class Task:
    """A further source to train on.

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
    """The task of every step, without end.

    A step is that of the task furthest behind its share: after n steps each has had its share of
    n, give or take one.
    """
    done = [0] * len(shares)
    for step in itertools.count(1):
        task = max(range(len(shares)), key=lambda k: shares[k] * step - done[k])
        done[task] += 1
        yield task


class Mixture:
    """Steps of several loaders in turn: pairs of task and `Step`, whose number is the run's.

    A context manager, which closes the loaders.

    Args:
      shares: of each task.
      loaders: functions that make each task's loader, given the first of its own steps to give.
      start: the run's first step to give.
    """

    def __init__(
        self, shares: Sequence[float], loaders: Sequence[Callable[[int], Loader]], start: int = 0
    ):
        self._turns, self._number = task_order(shares), start
        done = Counter(itertools.islice(self._turns, start))
        with ExitStack() as stack:
            self._loaders = [
                stack.enter_context(make(done[task])) for task, make in enumerate(loaders)
            ]
            self._stack = stack.pop_all()

    def __iter__(self) -> Iterator[tuple[int, Step]]:
        return self

    def __next__(self) -> tuple[int, Step]:
        task = next(self._turns)
        step = next(self._loaders[task])._replace(number=self._number)
        self._number += 1
        return task, step

    def request_stop(self) -> None:
        """See `Loader.stop_requested`."""
        for loader in self._loaders:
            loader.stop_requested = True

    def __enter__(self) -> Mixture:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
