"""What a run keeps in its folder, to go on from and to show.

    run.json        what the run is: settings, architecture, data; a resumed run must be the same
    checkpoints/    parameters, moments and step, by orbax, written while training goes on
    metrics.jsonl   a line of JSON each time, and what callbacks write: tensorboard/, wandb/
    last/, best/    the model at the end, and the one that did best on the dev collections

The position in the data and all random numbers are functions of the step and the settings, so a
checkpoint is all that a resumed run needs to go on bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from colbert_jax import processes
from colbert_jax.colbert import ColBERT
from colbert_jax.config import TrainingConfig
from colbert_jax.files import (
    beside,
    present,
    publishing,
    read_object,
    recover,
    replacing,
    short_json,
    write_json,
)
from colbert_jax.training.callbacks import TENSORBOARD, WANDB, Callback, TensorBoard
from colbert_jax.training.step import State, init_state, parameter_sharding

RUN, CHECKPOINTS, METRICS = "run.json", "checkpoints", "metrics.jsonl"
LAST, BEST = "last", "best"
DEV = "dev/"  # before the names of its measures
# Settings that may change when a run goes on: they change what is learned by rounding at most.
FREE = (
    *("save_every", "save_minutes", "keep", "eval_every", "eval_first", "log_every"),
    *("remat", "chunk", "fsdp"),
    "epochs",  # `maxsteps` is what they came to
)
_STATE, _PENDING = "state", "pending"  # of a checkpoint


# --- What the run is ------------------------------------------------------------------------


def open_run(
    folder: Path, run: Mapping[str, Any], group: processes.Group, *, overwrite: bool = False
) -> None:
    """Begin a run in a folder, or go on with the same one.

    Args:
      run: what the run is, JSON; written to `run.json`.
      overwrite: remove a run that is there first.

    Raises:
      FileExistsError: files there have the names of a run's and belong to no run.
      ValueError: another run is there; names what differs.
    """
    if group.is_first:
        if not _has_run(folder):
            _refuse_foreign(folder)
        else:
            for name in (LAST, BEST):
                recover(folder / name)
            _remove_drafts(folder)
            if overwrite:
                _remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
    group.exchange("folder")
    file = folder / RUN
    # Through JSON, so that both sides are what a file gives back.
    run = json.loads(json.dumps(run))
    if present(file):
        before = _with_new_settings(read_object(file), run)
        different = [
            f"{name} was {short_json(old, 60)}, is now {short_json(new, 60)}"
            for name, old, new in _differences(before, run)
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


def _has_run(folder: Path) -> bool:
    file = folder / RUN
    return present(file) and {"training", "encoder", "examples"} <= read_object(file).keys()


def _with_new_settings(before: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was, with the settings that its version did not have: what it did is the default
    of these."""
    defaults = dataclasses.asdict(TrainingConfig())
    new = {name: defaults[name] for name in run["training"] if name in defaults}
    return {**before, "training": new | before["training"]}


def earlier_settings(folder: Path) -> dict[str, Any]:
    """The settings of training of the run that is in a folder; none if there is no run."""
    return read_object(folder / RUN)["training"] if _has_run(folder) else {}


def _refuse_foreign(folder: Path) -> None:
    """Raise FileExistsError for files that are no run's and that a new run would write over."""
    for name in (RUN, CHECKPOINTS, METRICS, TENSORBOARD, WANDB, LAST, BEST):
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name}: exists, and is not of a run: {RUN} is missing or says nothing "
                "of one. Choose another folder, or move it away"
            )


def _remove_drafts(folder: Path) -> None:
    """Remove files that a killed process was about to put in their places."""
    for name in (RUN, METRICS):
        for draft in folder.glob(beside(folder / name, "[0-9a-f]" * 8).name):
            draft.unlink()


def _remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for name in (CHECKPOINTS, TENSORBOARD, WANDB, LAST, BEST):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (METRICS, RUN):  # what tells a run from other files goes last
        (folder / name).unlink(missing_ok=True)


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in [*old, *(k for k in new if k not in old)]:
            out += _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return out
    return [] if old == new else [(name, old, new)]


# --- Checkpoints ----------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of a run's folder, the last `keep` of them."""

    def __init__(self, folder: Path, config: TrainingConfig):
        import orbax.checkpoint as ocp  # a second; not for everybody who imports the library

        self._args = ocp.args
        self.folder = (folder / CHECKPOINTS).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, pending: Mapping[str, float] | None = None) -> None:
        """Begin to write; training may go on. Waits for the write before it.

        Args:
          pending: what was measured since the last line of metrics.

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
            args = self._args.Composite(
                state=self._args.StandardSave(state),
                pending=self._args.JsonSave(dict(pending or {})),
            )
            self._manager.save(step, args=args)

    def wait(self) -> None:
        """Wait until what was begun is on disk. Raises OSError if it could not be written."""
        with _writing(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, like: Any) -> State:
        """Read the last checkpoint.

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

    def pending(self) -> dict[str, float]:
        """What the last checkpoint has of the line of metrics to come."""
        step = self.latest
        if step is None or not (self.folder / str(step) / _PENDING).exists():
            return {}
        args = self._args.Composite(pending=self._args.JsonRestore())
        return self._manager.restore(step, args=args)[_PENDING]

    def begin(self, config: TrainingConfig, params: dict, mesh: Mesh) -> tuple[State, Any]:
        """Give the state of the last checkpoint, or the one that training starts with.

        Args:
          params: of the model that training starts from.

        Returns:
          the state on the devices of `mesh`, and its shardings.
        """
        shapes = jax.eval_shape(lambda params: init_state(config, params), params)
        shardings = parameter_sharding(mesh, shapes, fsdp=config.fsdp)
        if self.latest is None:
            start = jax.tree.map(np.asarray, params)
            init = jax.jit(lambda params: init_state(config, params), out_shardings=shardings)
            return init(jax.device_put(start, shardings["params"])), shardings
        like = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            shapes,
            shardings,
        )
        return self.restore(like), shardings

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Name the place in errors of writing, and say that nothing is lost."""
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise OSError(
            f"{place}: the checkpoint could not be written: {error}. Earlier checkpoints are "
            "whole: run the same command again, which goes on from the last of them"
        ) from error


# --- Metrics --------------------------------------------------------------------------------


class Metrics:
    """`metrics.jsonl` of a run's folder, and callbacks: written and told by one process."""

    def __init__(
        self,
        folder: Path,
        start: int,
        run: Mapping[str, Any],
        callbacks: Sequence[Callback] = (),
        *,
        write: bool = True,
    ):
        """
        Args:
          start: the step that the run goes on from; what is logged of later ones is dropped.
          run, callbacks: what the run is, and who is told beside.
          write: False in all processes but the first.
        """
        self._file = None
        self._callbacks: list[Callback] = []
        path = folder / METRICS
        self._kept: list[str] = []
        if present(path):
            lines = path.read_text("utf-8").splitlines()
            self._kept = [line for line in lines if _step(line) <= start]
        if not write:
            return
        with replacing(path) as stream:
            stream.writelines(f"{line}\n" for line in self._kept)
        self._file = path.open("a", encoding="utf-8")
        try:
            for one in [*([TensorBoard()] if TensorBoard.is_installed() else []), *callbacks]:
                one.begin(folder, run, start)
                self._callbacks.append(one)
        except BaseException:
            self._end(failed=True)
            raise

    def evaluated(self, step: int) -> bool:
        """Whether the run measured itself on the dev collection at a step before it stopped."""
        lines = (line for line in self.history() if line["step"] == step)
        return any(name.startswith(DEV) for line in lines for name in line)

    def history(self) -> list[dict[str, float]]:
        """What the run logged before it stopped."""
        return [json.loads(line) for line in self._kept]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log what is known after `step` steps."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for one in self._callbacks:
            one.log(step, values)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._end(failed=error is not None)

    def _end(self, failed: bool) -> None:
        with ExitStack() as stack:  # all of them, whatever one raises
            if self._file is not None:
                stack.callback(self._file.close)
            for one in self._callbacks:
                stack.callback(one.end, failed)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line, cut short
        return float("inf")


# --- Models ---------------------------------------------------------------------------------


def save_model(model: ColBERT, folder: Path, config: TrainingConfig, step: int) -> None:
    """Write the model; what was there before goes when the new one is complete."""
    with publishing(folder, replace=True) as draft:
        model.save_pretrained(draft, metadata=dataclasses.asdict(config) | {"steps": step})


class Best:
    """The best measures on the dev collections so far.

    Attributes:
      folder: of the best model.
      measured: by name; None before the first evaluation.
      before: what was measured before the first step, if it was.
    """

    def __init__(self, folder: Path, history: list[dict[str, Any]], measure: str):
        """
        Args:
          history: what the run logged before it stopped.
          measure: that is to be high.
        """
        self.folder, self._measure = folder / BEST, measure
        self.measured: dict[str, float] | None = None
        self.before: dict[str, float] | None = None
        for values in history if self.folder.exists() else ():
            found = {k[len(DEV) :]: v for k, v in values.items() if k.startswith(DEV)}
            if found:
                self.improves(found, values["step"])

    def improves(self, measured: dict[str, float], step: int) -> bool:
        """Whether these, of the model after `step` steps, are better than all before; remembers
        them if so."""
        if step == 0:
            self.before = measured
        if self.measured and measured[self._measure] <= self.measured[self._measure]:
            return False
        self.measured = measured
        return True
