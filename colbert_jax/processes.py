"""The processes of one `jax.distributed` job that do one thing together.

They talk through the job's coordination service, not through its devices: a process may be late by
hours, and one that failed can say so, where a collective of devices would time out or wait forever.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import jax

_POLL = 2.0  # seconds between two looks at whether another process has failed
_START = 600.0  # seconds that the first meeting waits for the other processes
_jobs = itertools.count()


class PeerError(RuntimeError):
    """Another process of the group failed; its own error says why."""


class Group:
    """`count` processes, of which this one is `index`. A group of one never waits."""

    def __init__(self, index: int = 0, count: int = 1, client: Any = None, name: str = ""):
        """`client` is the coordination service's, `name` what nobody else there uses."""
        self.index, self.count = index, count
        self._client, self._name, self._failures = client, name, f"{name}/failed"
        self._steps, self._lanes = itertools.count(), itertools.count()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def lane(self) -> Group:
        """The same processes for the exchanges of one more thread in each.

        Threads must not share a group, whose exchanges have to come in the same order everywhere; a
        failure in one lane reaches all.
        """
        lane = Group(self.index, self.count, self._client, f"{self._name}/lane{next(self._lanes)}")
        lane._failures = self._failures
        return lane

    def exchange(
        self,
        what: str,
        value: Any = None,
        seconds: float | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Any]:
        """Every process's value (JSON), by process; none goes on before all have come here.

        Args:
          what: what is waited for, for errors; the same in every process.
          seconds: give up after so long; None: wait as long as the other processes live.
          cancelled: looked at every two seconds; waiting ends where it returns True.

        Raises:
          PeerError: another process has failed, or is doing something else.
          TimeoutError: another process did not come in time.
          CancelledError: `cancelled`.
        """
        if self.count == 1:
            return [value]
        step = next(self._steps)
        place = f"{self._name}/{step}"
        end = None if seconds is None else time.monotonic() + seconds

        def wait(key: str, other: int) -> str:
            return self._wait(f"{place}/{key}", what, other, end, cancelled)

        # The first process collects, the others wait for its answer: 2 n messages, not n^2.
        if not self.is_first:
            self._client.key_value_set(f"{place}/{self.index}", json.dumps([what, value]))
            return json.loads(wait("all", 0))
        values = [value]
        for other in range(1, self.count):
            came, theirs = json.loads(wait(str(other), other))
            if came != what:
                error = PeerError(
                    f"process 0 is at {what!r}, process {other} at {came!r}: every process must "
                    "make the same calls with the same arguments"
                )
                self.fail(error)
                raise error
            values.append(theirs)
        self._client.key_value_set(f"{place}/all", json.dumps(values))
        if step:  # who comes to a step has read all of the one before
            self._client.key_value_delete(f"{self._name}/{step - 1}")
        return values

    def check(self) -> None:
        """Raise PeerError if another process has failed; returns at once."""
        if self.count == 1:
            return
        for key, error in self._client.key_value_dir_get(f"{self._failures}/"):
            other = int(key.rsplit("/", 1)[1])
            if other != self.index:
                raise PeerError(f"process {other} failed: {error}")

    def fail(self, error: BaseException) -> None:
        """Tell the other processes, who find out where they next wait or check."""
        if self.count > 1:
            text = f"{type(error).__name__}: {error}"
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(f"{self._failures}/{self.index}", text, True)

    def _wait(
        self,
        key: str,
        what: str,
        other: int,
        end: float | None,
        cancelled: Callable[[], bool] | None,
    ) -> str:
        while True:
            try:
                return self._client.blocking_key_value_get(key, int(1000 * _POLL))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            self.check()
            if cancelled is not None and cancelled():
                raise CancelledError(f"nobody waits for {what!r} any more")
            if end is not None and time.monotonic() > end:
                raise TimeoutError(
                    f"process {other} did not come to {what!r}: under jax.distributed every "
                    f"process must make this call ({self.count} processes)"
                )


@contextlib.contextmanager
def group(what: str) -> Iterator[Group]:
    """All processes of the job for the length of a block; an error in one ends it in all.

    Raises:
      PeerError, TimeoutError: another process failed, or did not come within 10 minutes.
      RuntimeError: several processes without `jax.distributed.initialize`.
    """
    if jax.process_count() == 1:
        yield Group()
        return
    # The one thing here without a public name; checkpointing libraries use it as well.
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError(
            f"{jax.process_count()} processes, but no coordination service: call "
            "jax.distributed.initialize() first"
        )
    # Every process makes the same calls in the same order, so that they count alike.
    name = f"colbert_jax/{next(_jobs)}"
    together = Group(jax.process_index(), jax.process_count(), client, name)
    try:
        together.exchange(what, seconds=_START)
        yield together
    except PeerError:
        raise
    except BaseException as error:
        together.fail(error)
        raise
