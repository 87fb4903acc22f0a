"""The training loop: examples in, a folder with checkpoints, metrics and the trained model out.

Run the same command again and it goes on from its last checkpoint, bit for bit. `training.run` says
what is in the folder.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from colbert_jax import processes, runtime
from colbert_jax.colbert import ColBERT
from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import ExampleSource
from colbert_jax.evaluation.dev import DevCollection
from colbert_jax.evaluation.metrics import MEASURES, parse_measures
from colbert_jax.progress import LOGGER, progress_bar
from colbert_jax.training.callbacks import Callback
from colbert_jax.training.loader import TASK_SETTINGS, Loader, Mixture, Step, Task, check_divides
from colbert_jax.training.memory import Room, fitting_batch, free_memory
from colbert_jax.training.run import (
    BEST,
    DEV,
    LAST,
    Best,
    Checkpoints,
    Metrics,
    earlier_settings,
    open_run,
    save_model,
)
from colbert_jax.training.step import (
    CoupledTeacher,
    Logged,
    Loss,
    gradients_of,
    init_state,
    make_gather,
    make_loss,
    make_step,
    parameter_sharding,
    put_teacher,
)


class Trained(NamedTuple):
    """What a run left behind.

    model: folder of the trained model; the best one where there is a dev collection.
    step: steps done. dev: the best model's measures on the dev collections, if there are any: of
      several, their means, and those of each with its name and a slash before.
    before: the same of the model before the first step, where `eval_first` measured them.
    """

    model: Path
    step: int
    dev: dict[str, float] | None
    before: dict[str, float] | None = None


def train(
    model: ColBERT,
    examples: ExampleSource,
    folder: str | Path,
    config: TrainingConfig | None = None,
    *,
    tasks: Sequence[Task] = (),
    teacher: ColBERT | Sequence[ColBERT] | None = None,
    dev: DevCollection | Mapping[str, DevCollection] | None = None,
    callbacks: Sequence[Callback] = (),
    devices: Sequence[jax.Device] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Trained:
    """Train a model, or go on where a run in `folder` stopped.

    The model's parameters are replaced by the trained ones; a run that ends early leaves them as
    they were, so that the same call goes on. SIGTERM and Ctrl-C end a run after the step at hand,
    with a checkpoint; a second Ctrl-C ends it at once. Under `jax.distributed` every process makes
    this call; `folder` must be on storage that all of them see.

    Args:
      model: what training starts from.
      examples: see `data.examples`.
      folder: of the run.
      config: if None, the defaults, those of ColBERTv2.
      tasks: further sources, each with a loss of its own and a share of the steps; `examples` have
        the rest of them.
      teacher: the coupled teacher of `coupled_weight`, or several, which score as one whose
        similarity of two tokens is the mean of theirs. It reads the model's tokens, so it must have
        the model's word pieces, under whichever ids, and text settings.
      dev: a small collection to evaluate on every `eval_every` steps, or several by name: the best
        model has the highest mean.
      callbacks: told what the run measures, see `training.callbacks`.
      devices: if None, all of the job.
      overwrite: remove a run that is in `folder` first.
      progress: whether to show a bar; if None, on a terminal.

    Raises:
      ValueError: settings and examples that do not fit together, or another run in `folder`.
      FileExistsError: files in `folder` have the names of a run's and belong to no run.
      OSError: a checkpoint could not be written.
      FloatingPointError: the loss or the gradient is not finite.
      KeyboardInterrupt: Ctrl-C; says what is kept.
    """
    # --- What must fit together: checked before anything is written
    config = TrainingConfig() if config is None else config
    devices = list(jax.devices() if devices is None else devices)
    text = model.config.text
    collections = {"": dev} if isinstance(dev, DevCollection) else dict(dev or {})
    measures = list(dict.fromkeys([*MEASURES, config.best_measure]))
    if collections:
        parse_measures(measures)

    def save(place: Path, params: dict, step: int) -> None:
        with _parameters(model, params):
            save_model(model, place, job.configs[0], step)

    def evaluate(params: dict) -> dict[str, float]:
        with _parameters(model, params):
            found = {name: one.evaluate(model, measures) for name, one in collections.items()}
        if len(found) == 1:
            return next(iter(found.values()))
        means = {m: sum(one[m] for one in found.values()) / len(found) for m in measures}
        each = {f"{name}/{m}": one[m] for name, one in found.items() for m in measures}
        return means | each

    def job_of(config: TrainingConfig) -> Job:
        plan = _plan(model, examples, config, tasks, devices)
        teachers, translations = _check_teachers(teacher, model, plan.configs)
        return Job(
            configs=plan.configs,
            prefixes=plan.prefixes,
            about=_describe(model, plan, tasks, teachers),
            params=model.params,
            lengths=(text.query_maxlen, text.doc_maxlen),
            fixed=partial(_fixed, plan.configs[0], teachers, translations),
            make_loss=partial(_make_loss, model, teachers),
            mixture=partial(_mixture, model, plan),
            take=model.set_params,
            save=save,
            evaluate=evaluate if collections else None,
        )

    if config.bsize == "auto":
        earlier = {} if overwrite else earlier_settings(Path(folder))
        size = earlier.get("bsize") or _fitting_batch(job_of, config, len(examples), devices)
        config = dataclasses.replace(config, bsize=size)
    job = job_of(config)
    return run_job(
        job, folder, devices, callbacks=callbacks, overwrite=overwrite, progress=progress
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run trains, and on what.

    configs: the settings of each task; those of the first are the run's.
    prefixes: of the names of each task's metrics.
    about: what the run is, JSON: `run.json`.
    params: what is trained, as it is before.
    lengths: the most tokens of a query and of a document.
    fixed: of (mesh): what the loss takes beside the parameters, on the devices.
    make_loss: of (config, mesh): see `step.Loss`.
    mixture: of (start, group): the steps of the run, from step `start` on.
    take: of (params): the model has these from now on.
    save: of (place, params, step): write the model with these parameters.
    evaluate: of (params): measures of the model with these parameters. If None, nothing is
      evaluated.
    """

    configs: Sequence[TrainingConfig]
    prefixes: Sequence[str]
    about: dict[str, Any]
    params: dict
    lengths: tuple[int, int]
    fixed: Callable[[Mesh], Any]
    make_loss: Callable[[TrainingConfig, Mesh], Loss]
    mixture: Callable[[int, processes.Group], Mixture]
    take: Callable[[dict], None]
    save: Callable[[Path, dict, int], None]
    evaluate: Callable[[dict], dict[str, float]] | None = None


@runtime.apart()
def run_job(
    job: Job,
    folder: str | Path,
    devices: Sequence[jax.Device],
    *,
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
    progress: bool | None = None,
) -> Trained:
    """Do a job, or go on with it; everything else as for `train`."""
    folder, config = Path(folder), job.configs[0]
    with processes.group("training") as group, runtime.memory_kept(), ExitStack() as stack:
        # --- The folder: a new run, or the same one again
        open_run(folder, job.about, group, overwrite=overwrite)
        checkpoints = stack.enter_context(Checkpoints(folder, config))

        # --- Parameters and moments: as the model has them, or of the last checkpoint
        mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        state, shardings = checkpoints.begin(config, job.params, mesh)
        done = int(state["step"])

        # --- Programs
        to_host = make_gather(mesh)
        room = _room(job, devices, group)
        fixed = job.fixed(mesh)
        train_step = make_step(job.make_loss, job.configs, mesh, shardings, fixed, room)

        # --- Metrics and progress
        metrics = stack.enter_context(
            Metrics(folder, done, job.about, callbacks, write=group.is_first)
        )
        best = Best(folder, metrics.history(), config.best_measure)
        show = progress if group.is_first else False
        bar = progress_bar(config.steps, "training", "step", show, initial=done)
        window = _Window(job.prefixes, checkpoints, metrics, bar)

        # --- Evaluation; before the first step if it is asked for, and once more where the run was
        # stopped behind a checkpoint, before it was measured. All processes go by what the first
        # one has read.
        evaluation = _Evaluation(job, best, metrics, write=group.is_first)
        missed = evaluation.is_due(done) and not metrics.evaluated(done)
        if group.exchange("evaluation", missed)[0]:
            evaluation.run(done, to_host(state["params"]))

        # --- Data
        mixture = job.mixture(done, group)
        with mixture, bar, _signals() as came:
            schedule = _Schedule(config, evaluation, mixture, came, group)
            stop, previous = False, None
            while done < config.steps and not stop:
                # --- Learn
                task, step = next(mixture)
                state, losses, rates = train_step(state, step.number, task, step.batches)
                done = step.number + 1
                # The devices are kept busy by the step just begun. Further ahead of them, a signal
                # would wait for all the steps that were begun before it.
                jax.block_until_ready(previous)
                previous = losses
                window.add(task, losses, job.configs[task].batch_size)

                # --- Log, save, evaluate
                log, save, evaluate, stop = schedule.due(step)
                if log:
                    window.log(rates, done)
                if save:
                    checkpoints.save(done, state, window.measured(rates, done))
                    schedule.saved()
                if evaluate:
                    evaluation.run(done, to_host(state["params"]))
                    window.pause()
            checkpoints.wait()

        # --- The end
        if done < config.steps:
            # Saved, in all processes; now end as the signal asks, with its exit status.
            came.end(
                f"training stopped after step {done} of {config.steps}, which is saved in "
                f"{folder}: run the same again, and it goes on from there"
            )
        params = to_host(state["params"])
        job.take(params)
        if group.is_first:
            job.save(folder / LAST, params, done)
        group.exchange("saved")
        if came.stop:  # too late to stop this run
            came.end(f"training was done: the model is in {folder / LAST}")
        kept = folder / (BEST if (folder / BEST).exists() else LAST)
        return Trained(kept, done, best.measured, best.before)


# --- What must fit together -----------------------------------------------------------------


class _Plan(NamedTuple):
    """What is trained on: the run's examples first, then those of each task.

    shares: of the steps. local: devices of this process.
    """

    sources: list[ExampleSource]
    shares: list[float]
    configs: list[TrainingConfig]
    prefixes: list[str]  # of the metrics
    local: int


def _plan(
    model: ColBERT,
    examples: ExampleSource,
    config: TrainingConfig,
    tasks: Sequence[Task],
    devices: Sequence[jax.Device],
) -> _Plan:
    """Raises ValueError for settings, examples and a model that do not fit together."""
    shares = [1 - sum(task.share for task in tasks), *(task.share for task in tasks)]
    if shares[0] <= 0 or len({task.name for task in tasks}) < len(tasks):
        raise ValueError(
            "tasks need names of their own, and shares whose sum is less than 1: got "
            f"{', '.join(f'{task.name} {task.share}' for task in tasks)}"
        )
    local = sum(device.process_index == jax.process_index() for device in devices)
    if config.maxsteps is None:
        passes = config.epochs * len(examples) / shares[0]
        config = dataclasses.replace(config, maxsteps=max(1, math.ceil(passes / config.batch_size)))
        LOGGER.info(
            "%d steps: %g times through %d examples, %d a step; maxsteps makes it fewer",
            *(config.steps, config.epochs, len(examples), config.batch_size),
        )
    configs = [_check(model, examples, config, local)]
    for task in tasks:
        try:
            configs.append(_check(model, task.examples, task.config(config), local))
        except ValueError as error:
            raise ValueError(f"task {task.name}: {error}") from None
    sources = [examples, *(task.examples for task in tasks)]
    return _Plan(sources, shares, configs, ["", *(f"{task.name}/" for task in tasks)], local)


def _check(
    model: ColBERT, examples: ExampleSource, config: TrainingConfig, devices: int
) -> TrainingConfig:
    """Raise ValueError for what does not fit together; give the settings with what the loss and the
    examples decide filled in."""
    check_divides(config.batch_size, config.accumsteps, jax.process_count(), devices)
    nway = examples.nway if config.nway is None else config.nway
    if nway > examples.nway:
        raise ValueError(f"nway is {nway}, but the examples have {examples.nway} documents a query")
    if config.loss in ("distillation", "margin-mse") and not examples.scored:
        raise ValueError(
            f"the loss {config.loss!r} learns from a teacher's scores, and the examples have none: "
            "score them (colbert_jax.mining) or choose another loss"
        )
    if config.loss in ("distillation", "margin-mse", "cross-entropy") and nway < 2:
        raise ValueError(f"the loss {config.loss!r} needs at least 2 documents a query, not {nway}")
    if config.loss == "contrastive" and nway == 1 and config.bsize == config.accumsteps:
        raise ValueError(
            f"bsize {config.bsize} and accumsteps {config.accumsteps} leave one query in a micro-"
            "batch, and nway is 1: the loss 'contrastive' has nothing to tell a positive from. "
            "Raise bsize, or give negatives"
        )
    if model.query_params is not model.params:
        raise ValueError("a model with an encoder of its own for queries cannot be trained")
    if model.quantization is not None:
        raise ValueError(
            f"the weights were quantised to {model.quantization} when they were loaded; load the "
            "checkpoint without quantization to train it"
        )
    if model.images is not None:
        raise ValueError(
            "only the text part of a model with images is trained here: load it with images=False; "
            "train_flmr (colbert-jax train preflmr) trains it on questions about images"
        )
    if config.warmup_bert and not model.encoder_config.head:
        raise ValueError(
            f"warmup_bert is {config.warmup_bert}, but the model has no projection to train "
            "meanwhile: load it with dim="
        )
    layers = model.encoder_config.backbone.num_hidden_layers
    if config.freeze_layers >= layers:
        raise ValueError(
            f"freeze_layers is {config.freeze_layers}, but the model has {layers} layers: fewer "
            "must be frozen; warmup_bert=maxsteps trains the projection alone"
        )
    return dataclasses.replace(
        config, nway=nway, use_ib_negatives=config.in_batch, warmup=config.warmup_steps
    )


def _check_teachers(
    teacher: ColBERT | Sequence[ColBERT] | None, model: ColBERT, configs: Sequence[TrainingConfig]
) -> tuple[list[ColBERT], list[np.ndarray | None]]:
    """The coupled teachers, and each one's ids of the model's word pieces, None for the same ids.

    Raises ValueError for teachers that do not fit.
    """
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, ColBERT) else [*teacher]
    weight = max(config.coupled_weight for config in configs)
    if bool(teachers) != (weight > 0):
        raise ValueError(
            f"coupled_weight is {weight} and there is {'a' if teachers else 'no'} coupled "
            "teacher: give both or none"
        )
    translations = []
    for number, one in enumerate(teachers, 1):
        name = "the coupled teacher" if len(teachers) == 1 else f"coupled teacher {number}"
        if one.quantization is not None or one.query_params is not one.params:
            raise ValueError(
                f"{name} must be one encoder for queries and documents, loaded without quantization"
            )
        try:
            translations.append(model.tokenizer.translation(one.tokenizer))
        except ValueError as error:
            raise ValueError(f"{name} cannot read the model's tokens: {error}") from None
        theirs, ours = (dataclasses.asdict(m.config.text) for m in (one, model))
        other = [f"{k} {theirs[k]!r}, not {ours[k]!r}" for k in ours if theirs[k] != ours[k]]
        if other:
            raise ValueError(
                f"{name} makes other tokens of a text: {', '.join(other)}; load it with the "
                "model's settings"
            )
    return teachers, translations


def _describe(
    model: ColBERT, plan: _Plan, tasks: Sequence[Task], teachers: Sequence[ColBERT]
) -> dict[str, Any]:
    """What the run is: `run.json`."""
    return {
        "training": dataclasses.asdict(plan.configs[0]),
        "encoder": dataclasses.asdict(model.encoder_config),
        "text": dataclasses.asdict(model.config.text),
        "start": model.fingerprint(),
        "examples": plan.sources[0].fingerprint,
        "teacher": " ".join(t.fingerprint() for t in teachers) or None,
        "tasks": [
            {"name": task.name, "share": task.share, "examples": task.examples.fingerprint}
            | {name: getattr(own, name) for name in TASK_SETTINGS}
            for task, own in zip(tasks, plan.configs[1:], strict=True)
        ],
    }


@contextmanager
def _parameters(model: ColBERT, params: dict) -> Iterator[None]:
    """The model has other parameters for a while; its own wait on the host."""
    own = jax.tree.map(np.asarray, model.params)
    model.set_params(params)
    try:
        yield
    finally:
        model.set_params(own)


# --- Programs and data ----------------------------------------------------------------------


def compute_dtype(config: TrainingConfig) -> Any:
    """What the dense layers compute in."""
    return runtime.compute_dtype() if config.dtype is None else jnp.dtype(config.dtype)


def _make_loss(
    model: ColBERT, teachers: Sequence[ColBERT], config: TrainingConfig, mesh: Mesh
) -> Loss:
    encoders = [teacher.encoder_config for teacher in teachers]
    return make_loss(model.encoder_config, config, compute_dtype(config), mesh, encoders)


def _fixed(
    config: TrainingConfig,
    teachers: Sequence[ColBERT],
    translations: Sequence[np.ndarray | None],
    mesh: Mesh,
) -> list[CoupledTeacher]:
    """The coupled teachers, on the devices."""
    return [
        put_teacher(teacher.params, ids, mesh, fsdp=config.fsdp)
        for teacher, ids in zip(teachers, translations, strict=True)
    ]


def _room(job: Job, devices: Sequence[jax.Device], group: processes.Group) -> Room:
    """What there is for a step; of the process with the least, so that all say the same."""
    free = [one for one in group.exchange("memory", free_memory(devices)) if one is not None]
    return Room(min(free, default=None), job.lengths)


def _fitting_batch(
    job_of: Callable[[TrainingConfig], Job],
    config: TrainingConfig,
    examples: int,
    devices: Sequence[jax.Device],
) -> int:
    """`bsize` for "auto"; the same in all processes."""
    least = len(devices) * config.accumsteps * (2 if config.loss == "contrastive" else 1)
    job = job_of(dataclasses.replace(config, bsize=least))
    own = job.configs[0]
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    shapes = jax.eval_shape(lambda params: init_state(own, params), job.params)
    shardings = parameter_sharding(mesh, shapes, fsdp=own.fsdp)
    state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )
    gradients: Any = gradients_of(job.make_loss(own, mesh), own, shardings["params"])
    trained = tuple(part for part, leaves in state["params"].items() if jax.tree.leaves(leaves))
    fixed, zero = job.fixed(mesh), np.int32(0)

    def compiled(batch: Any) -> Any:
        return gradients.lower(
            state["params"], batch, zero, zero, trained=trained, fixed=fixed
        ).compile()

    with processes.group("batch size") as group:
        room = _room(job, devices, group)
        with job.mixture(0, group) as mixture:
            _, step = next(mixture)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), step.batches[0])
    return fitting_batch(own, batch, state, examples // 8, devices, room, compiled)


def _mixture(model: ColBERT, plan: _Plan, start: int, group: processes.Group) -> Mixture:
    """The steps of the run, from step `start` on."""

    def loader(source: ExampleSource, config: TrainingConfig, start: int) -> Loader:
        return Loader(
            source,
            model.tokenizer,
            bsize=config.batch_size,
            nway=config.nway,
            accumsteps=config.accumsteps,
            seed=config.seed,
            shuffle=config.shuffle,
            start=start,
            devices=plan.local,
            group=group,
            length_groups=config.length_groups,
            longest=model.encoder_config.backbone.max_length,
        )

    pairs = zip(plan.sources, plan.configs, strict=True)
    return Mixture(plan.shares, [partial(loader, *pair) for pair in pairs], start)


# --- What is due ----------------------------------------------------------------------------


class _Evaluation:
    """What a job measures, if it does, and the best model by that."""

    def __init__(self, job: Job, best: Best, metrics: Metrics, *, write: bool):
        """
        Args:
          write: this process saves the best model.
        """
        self._job, self._config = job, job.configs[0]
        self._best, self._metrics, self._write = best, metrics, write

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps."""
        every = self._config.eval_every or self._config.save_every
        due = step % every == 0 or step == self._config.steps
        if step == 0:
            due = self._config.eval_first
        return self._job.evaluate is not None and due

    def run(self, step: int, params: dict) -> None:
        """Measure what `step` steps made of the model.

        The best model is there before the line that says so, so that a run that was killed between
        the two measures again.
        """
        assert self._job.evaluate is not None
        measured = self._job.evaluate(params)
        if self._best.improves(measured, step) and self._write:
            self._job.save(self._best.folder, params, step)
        self._metrics.write(step, {DEV + name: x for name, x in measured.items()})


class _Due(NamedTuple):
    """What follows a step. stop: the run ends early."""

    log: bool
    save: bool
    evaluate: bool
    stop: bool


class _Schedule:
    """Decides what follows a step; the same in all processes."""

    def __init__(
        self,
        config: TrainingConfig,
        evaluation: _Evaluation,
        mixture: Mixture,
        came: _Signals,
        group: processes.Group,
    ):
        self._config, self._evaluation = config, evaluation
        self._mixture, self._came, self._group = mixture, came, group
        self.saved()

    def saved(self) -> None:
        """The clock of `save_minutes` starts anew."""
        self._saved = time.monotonic()

    def due(self, step: Step) -> _Due:
        """What is due after a step."""
        config, done = self._config, step.number + 1
        stop, late = self._asked(step)
        stop = stop and done < config.steps
        planned = done == config.steps or done % config.save_every == 0
        evaluate = self._evaluation.is_due(done)
        return _Due(
            # The same steps, wherever a run was stopped.
            log=planned or evaluate or done % config.log_every == 0,
            save=planned or stop or late,
            evaluate=evaluate and not stop,
            stop=stop,
        )

    def _asked(self, step: Step) -> tuple[bool, bool]:
        """Whether a signal asks to stop, and the clock for a checkpoint: a signal to one process
        ends the run in all, and the clock of one decides for all."""
        minutes, stop = self._config.save_minutes, self._came.stop
        late = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        if self._group.count == 1:
            return stop, late
        if stop:
            self._mixture.request_stop()
        if late and self._group.is_first:
            self._mixture.request_save()
            self.saved()
        return step.stop, step.save


# --- Metrics and signals --------------------------------------------------------------------


class _Window:
    """What has been measured since the last line of metrics."""

    def __init__(
        self, prefixes: Sequence[str], checkpoints: Checkpoints, metrics: Metrics, bar: Any
    ):
        """
        Args:
          prefixes: of the names of each task's metrics.
          checkpoints: the last one has what was measured before the run stopped.
          metrics, bar: where to say it.
        """
        self._prefixes, self._before = prefixes, checkpoints.pending()
        self._checkpoints, self._metrics, self._bar = checkpoints, metrics, bar
        self._losses: dict[int, Logged] = {}
        self._last: Logged = {}
        self.pause()

    def add(self, task: int, losses: Logged, examples: int) -> None:
        """Note a step: its task, the parts of its loss, how many queries it had."""
        self._losses[task] = self._last = losses
        self._examples += examples
        self._bar.update()

    def pause(self) -> None:
        """Leave the time that has passed out of the examples per second."""
        self._time, self._examples = time.perf_counter(), 0

    def measured(self, rates: Logged, step: int) -> dict[str, float]:
        """The last losses of each task, by the names that they have in metrics.

        Raises:
          FloatingPointError: a loss or the gradient's norm is not finite.
        """
        values = dict(self._before)
        for task, losses in self._losses.items():
            loss, norm = float(losses["loss"]), float(rates["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                last = self._checkpoints.latest
                saved = "no checkpoint was saved" if last is None else f"step {last} is saved"
                raise FloatingPointError(
                    f"at step {step} the loss is {loss} and the gradient's norm {norm}; {saved}. "
                    "Lower lr, or look at the examples' scores"
                )
            values |= {self._prefixes[task] + name: float(x) for name, x in losses.items()}
        return values

    def log(self, rates: Logged, step: int) -> None:
        """Write the line of metrics after `step` steps; what follows belongs to the next one."""
        values = {name: float(x) for name, x in rates.items()}
        values |= self.measured(rates, step)
        rate = values["examples_per_second"] = self._examples / (time.perf_counter() - self._time)
        self._metrics.write(step, values)
        shown = {"loss": f"{float(self._last['loss']):.4f}", "examples/s": f"{rate:.4g}"}
        self._bar.set_postfix(shown, refresh=False)
        self._losses, self._before = {}, {}
        self.pause()


class _Signals:
    """SIGTERM and SIGINT (Ctrl-C), which end a run after the step at hand.

    stop: one of them came.
    """

    def __init__(self) -> None:
        self.stop = False
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take both over, but not what is ignored: a run in the background of a shell."""
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._come)

    def leave(self) -> None:
        """Give both back."""
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def end(self, message: str) -> None:
        """End as the signal asks: KeyboardInterrupt with the message, or by SIGTERM."""
        if self._interrupted:
            raise KeyboardInterrupt(message)
        LOGGER.warning(message)
        signal.raise_signal(signal.SIGTERM)

    def _come(self, number: int, _: Any) -> None:
        self.stop = True
        if number == signal.SIGINT:
            self._interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            LOGGER.warning("training stops after this step, with a checkpoint; Ctrl-C ends it now")


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Listens in the main thread; no other gets signals."""
    signals = _Signals()
    if threading.current_thread() is threading.main_thread():
        signals.listen()
    try:
        yield signals
    finally:
        signals.leave()
