"""Metrics of a run: a line of JSON each time, and TensorBoard where tensorboardX is installed."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class Metrics:
    """`metrics.jsonl` and `tensorboard/` of a run's folder, written by one process."""

    def __init__(self, folder: Path, start: int, *, write: bool = True):
        """
        Args:
          start: the step that the run goes on from; what is logged of later ones is dropped.
          write: False in all processes but the first.
        """
        self._file = None
        self._board = None
        path = folder / FILE
        self._kept: list[str] = []
        if path.is_file():
            lines = path.read_text("utf-8").splitlines()
            self._kept = [line for line in lines if _step(line) <= start]
        if not write:
            return
        new = path.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in self._kept), "utf-8")
        os.replace(new, path)
        self._file = path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboardX") is not None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=start + 1)

    def history(self) -> list[dict[str, float]]:
        """What the run logged before it stopped."""
        return [json.loads(line) for line in self._kept]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log what is known after `step` steps."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line, cut short
        return float("inf")
