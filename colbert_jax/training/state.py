"""Checkpoints of a run: parameters, moments and step by orbax, written while training goes on.

The position in the data and all random numbers are functions of the step and the settings, so the
three are all that a resumed run needs to go on bit for bit. What the run is (its settings, its
architecture, its data) is in `run.json`; a resumed run must be the same one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from colbert_jax import processes
from colbert_jax.config import TrainingConfig
from colbert_jax.files import read_object, short_json, write_json
from colbert_jax.training.step import State

RUN = "run.json"
FOLDER = "checkpoints"
_STATE = "state"
# Settings that may change when a run goes on: they change what is learned by rounding at most.
FREE = ("save_every", "keep", "eval_every", "log_every", "remat", "chunk", "fsdp")
_SMALLEST_SHARDED = 1 << 14  # values; smaller arrays are kept whole on every device


def parameter_sharding(mesh: Mesh, tree: Any, *, fsdp: bool) -> Any:
    """A sharding for every array: whole on every device, or cut along its longest axis.

    Args:
      tree: arrays, or what `jax.eval_shape` gives.
      fsdp: cut arrays that are large enough along the longest axis that divides by the number of
        devices; XLA gathers them where they are used.
    """
    count = mesh.devices.size

    def one(leaf: Any) -> NamedSharding:
        axes: list[str | None] = [None] * len(leaf.shape)
        if fsdp and np.prod(leaf.shape) >= _SMALLEST_SHARDED:
            fitting = [i for i, size in enumerate(leaf.shape) if size % count == 0]
            if fitting:
                axes[max(fitting, key=lambda i: leaf.shape[i])] = "data"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(one, tree)


def check_run(folder: Path, run: dict[str, Any], group: processes.Group) -> None:
    """Write `run.json`, or hold a run that goes on to the one that is there.

    Raises:
      ValueError: another run is in the folder; names what differs.
    """
    file = folder / RUN
    # Through JSON, so that both sides are what a file gives back.
    run = json.loads(json.dumps(run))
    if file.is_file():
        there = read_object(file)
        different = [
            f"{name} was {short_json(old, 60)}, is now {short_json(new, 60)}"
            for name, old, new in _differences(there, run)
            if name.split(".")[-1] not in FREE
        ]
        if different:
            raise ValueError(
                f"{file}: another run has its checkpoints here: {'; '.join(different[:5])}. Go on "
                "with its settings, choose another folder, or pass overwrite=True to start anew"
            )
    elif group.is_first:
        write_json(file, run)
    group.exchange("run.json")


class Checkpoints:
    """The checkpoints of a run's folder, the last `keep` of them."""

    def __init__(self, folder: Path, config: TrainingConfig):
        import orbax.checkpoint as ocp  # a second; not for everybody who imports the library

        self._args = ocp.args
        self.folder = (folder / FOLDER).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: State) -> None:
        """Begin to write; training may go on. Waits for the write before it.

        Raises:
          OSError: the disk is too full for it; earlier checkpoints stay as they are.
        """
        if step == self.latest:
            return
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder}: a checkpoint takes {needed / 1e6:.0f} MB and the disk has "
                f"{free / 1e6:.0f} MB left. Nothing that was saved is lost: make room and run the "
                "same command again, which goes on from the last checkpoint"
            )
        with _writing(self.folder / str(step)):
            args = self._args.Composite(state=self._args.StandardSave(state))
            self._manager.save(step, args=args)

    def wait(self) -> None:
        """Until what was begun is on disk. Raises OSError if it could not be written."""
        with _writing(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, like: Any) -> State:
        """The last checkpoint.

        Args:
          like: a state of the same form, of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          ValueError: it is of another architecture, or damaged.
        """
        step = self.latest
        try:
            args = self._args.Composite(state=self._args.StandardRestore(like))
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise ValueError(
                f"{self.folder / str(step)}: this checkpoint cannot be restored: {error}. If it is "
                "damaged, delete the folder: the run goes on from the one before it"
            ) from error
        return restored[_STATE]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Errors of writing say where, and that nothing is lost."""
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise OSError(
            f"{place}: the checkpoint could not be written: {error}. Earlier checkpoints are "
            "whole: run the same command again, which goes on from the last of them"
        ) from error


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in [*old, *(k for k in new if k not in old)]:
            out += _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return out
    return [] if old == new else [(name, old, new)]
