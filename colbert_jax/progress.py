"""How far long work is: a bar where somebody watches, else a line in the log now and then.

The lines go to the logger "colbert_jax", at level INFO. A library adds no handlers; a program that
has no logging of its own calls `log_to_stderr`.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # In a notebook without ipywidgets tqdm.auto warns, and draws the bar as text.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

LOGGER = logging.getLogger("colbert_jax")


class Pace(NamedTuple):
    """When work logs a line: `first` seconds after it began, then every `every` seconds."""

    first: float = 10.0
    every: float = 30.0
    clock: Callable[[], float] = time.monotonic


PACE = Pace()


def progress_bar(
    total: int | None,
    description: str,
    unit: str,
    show: bool | None = None,
    *,
    initial: int = 0,
    pace: Pace | None = None,
) -> tqdm | LogLines:
    """Make a progress bar with rate and time left, or what logs these in its place.

    Args:
      total: the units of work. If None, they are not known.
      show: True for a bar, False for silence. If None, a bar on a terminal or in a notebook, and
        lines in the log elsewhere; silence where a program has set the log to warnings only.
      initial: the units that an earlier run did; the rate leaves them out.
      pace: of the lines. If None, `PACE`.
    """
    if show is None and LOGGER.level > logging.INFO:
        show = False
    if show is None and not (sys.stderr.isatty() or _in_notebook()):
        return LogLines(total, description, unit, initial, PACE if pace is None else pace)
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not show and show is not None,
        dynamic_ncols=True,
    )


class LogLines:
    """The part of tqdm's interface that this library uses, as lines in the log.

    Work that ends before its first line is due logs nothing; other work also logs its end.
    """

    def __init__(self, total: int | None, description: str, unit: str, initial: int, pace: Pace):
        self.total, self.n, self.initial = total, initial, initial
        self._description, self._unit, self._pace = description, unit, pace
        self._postfix: dict[str, Any] = {}
        self._start = self._last = pace.clock()
        self._last_n = initial
        self._due = self._start + pace.first
        self._spoke = self._closed = False

    def update(self, n: int = 1) -> None:
        self.n += n
        now = self._pace.clock()
        if now < self._due:
            return
        # The rate since the last line: the first work of a run compiles.
        parts = [self._count(), *self._rate(self.n - self._last_n, now - self._last)]
        if self.total is not None and self.n > self._last_n:
            left = max(self.total - self.n, 0) * (now - self._last) / (self.n - self._last_n)
            parts.append(f"{duration(left)} left")
        self._log(parts)
        self._spoke, self._due = True, now + self._pace.every
        self._last, self._last_n = now, self.n

    def set_postfix(self, values: Mapping[str, Any], refresh: bool = True) -> None:
        """Name values that the lines end with; `refresh` has no effect."""
        self._postfix = dict(values)

    def close(self, stopped: bool = False) -> None:
        """Log the end, if this has logged anything; `stopped` by an error."""
        if self._spoke and not self._closed:
            seconds = self._pace.clock() - self._start
            how = f"{'stopped' if stopped else 'done'} after {duration(seconds)}"
            self._log([self._count(), how, *self._rate(self.n - self.initial, seconds)])
        self._closed = True

    def __enter__(self) -> LogLines:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(stopped=error is not None)

    def _log(self, parts: list[str]) -> None:
        parts = parts + [f"{name} {value}" for name, value in self._postfix.items()]
        LOGGER.info("%s: %s", self._description, ", ".join(parts))

    def _count(self) -> str:
        if not self.total:
            return f"{self.n:,}"
        return f"{self.n:,}/{self.total:,} ({min(100 * self.n // self.total, 100)} %)"

    def _rate(self, n: int, seconds: float) -> list[str]:
        if n <= 0 or seconds <= 0:
            return []
        rate = n / seconds
        if rate < 1:
            return [f"{1 / rate:,.1f} s/{self._unit}"]
        return [f"{rate:,.{0 if rate >= 100 else 1}f} {self._unit}/s"]


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours before them if there are any: 1:05, 2:00:30."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def log_to_stderr(level: int = logging.INFO) -> None:
    """Write what this library logs to stderr, from `level` on; a second call changes the level."""
    LOGGER.setLevel(level)
    LOGGER.propagate = False  # the root logger may have got a handler too: absl adds one unasked
    if not any(isinstance(handler, _Stderr) for handler in LOGGER.handlers):
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOGGER.addHandler(handler)


class _Stderr(logging.Handler):
    """Writes above the bars that are on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _in_notebook() -> bool:
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is not None and kernel.IPKernelApp.initialized()
