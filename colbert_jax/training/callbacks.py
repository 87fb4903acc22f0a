"""Who else is told what a run measures: TensorBoard, Weights & Biases, code of your own."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colbert_jax.files import present, replacing

TENSORBOARD, WANDB = "tensorboard", "wandb"  # folders in a run's


class Callback:
    """Is told what a run measures, in the first process only. What it raises ends the run."""

    def begin(self, folder: Path, run: Mapping[str, Any], step: int) -> None:
        """Before the first step.

        Args:
          folder: of the run. run: what the run is, JSON: `run.json`.
          step: steps done, by an earlier call; what was told of later ones is void.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """What a line of `metrics.jsonl` says, after `step` steps."""

    def end(self, failed: bool) -> None:
        """After the last step, or where the run ends by an error or a signal."""


class TensorBoard(Callback):
    """Writes `tensorboard/` in the run's folder, by tensorboardX. Every run has it where that is
    installed."""

    @staticmethod
    def is_installed() -> bool:
        return importlib.util.find_spec("tensorboardX") is not None

    def begin(self, folder: Path, run: Mapping[str, Any], step: int) -> None:
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def end(self, failed: bool) -> None:
        self._board.close()


class WandB(Callback):
    """Tells Weights & Biases, by its package. A run that goes on is the same run there.

    Args:
      project: where the run goes.
      settings: of `wandb.init`: entity, tags, mode="offline" and others. `name` is the run's folder
        if you don't say otherwise.

    Raises ImportError where wandb is not installed.
    """

    def __init__(self, project: str, **settings: Any):
        if importlib.util.find_spec("wandb") is None:
            raise ImportError("reports to Weights & Biases need its package: pip install wandb")
        self._settings = {"project": project, **settings}

    def begin(self, folder: Path, run: Mapping[str, Any], step: int) -> None:
        import wandb

        place = folder / WANDB
        place.mkdir(exist_ok=True)
        kept = place / "run_id"
        if not present(kept):
            with replacing(kept) as stream:
                stream.write(secrets.token_hex(4))
        known = {"id": kept.read_text("utf-8"), "resume": "allow", "name": str(folder)}
        own = {"dir": str(folder), "config": dict(run)}
        self._run = wandb.init(**(known | own | self._settings))
        # By our own count, so that steps done again after a stop take the place of the first ones.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
