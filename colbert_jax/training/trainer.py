"""The training loop: examples in, a folder with checkpoints, metrics and the trained model out.

A run's folder holds `run.json` (what the run is), `checkpoints/` (to go on from), `metrics.jsonl`
and `tensorboard/`, `last/` (the model at the end) and `best/` (the model that did best on the dev
collection). Run the same command again and it goes on from its last checkpoint, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
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
from colbert_jax.progress import progress_bar
from colbert_jax.training.batch import ExampleBatch
from colbert_jax.training.loader import Loader, check_divides
from colbert_jax.training.metrics import Metrics
from colbert_jax.training.state import (
    FOLDER,
    Checkpoints,
    check_run,
    parameter_sharding,
)
from colbert_jax.training.step import CoupledTeacher, init_state, make_gradients, make_update
from colbert_jax.training.tasks import TASK_SETTINGS, Mixture, Task

BEST = "nDCG@10"  # what "best" means


class Trained(NamedTuple):
    """What a run left behind.

    model: folder of the trained model; the best one where there is a dev collection.
    step: steps done. dev: the best model's measures on the dev collection, if there is one.
    """

    model: Path
    step: int
    dev: dict[str, float] | None


def train(
    model: ColBERT,
    examples: ExampleSource,
    folder: str | Path,
    config: TrainingConfig | None = None,
    *,
    tasks: Sequence[Task] = (),
    teacher: ColBERT | Sequence[ColBERT] | None = None,
    dev: DevCollection | None = None,
    devices: Sequence[jax.Device] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Trained:
    """Train a model, or go on where a run in `folder` stopped.

    The model's parameters are replaced by the trained ones. SIGTERM saves a checkpoint before the
    process ends. Under `jax.distributed` every process makes this call; `folder` must be on storage
    that all of them see.

    Args:
      model: what training starts from.
      examples: see `data.examples`.
      folder: of the run.
      config: None: the defaults, those of ColBERTv2.
      tasks: further sources, each with a loss of its own and a share of the steps; `examples` have
        the rest of them.
      teacher: of `coupled_weight`; several score as one whose similarity of two tokens is the mean
        of theirs. It is given the model's tokens, so it must have the model's word pieces, under
        whichever ids, and settings of texts.
      dev: a small collection to evaluate on every `eval_every` steps.
      devices: None: all of the job.
      overwrite: remove a run that is in `folder` first.
      progress: None: a bar on a terminal.

    Raises:
      ValueError: settings and examples that do not fit together, or another run in `folder`.
      OSError: a checkpoint could not be written.
      FloatingPointError: the loss is not a number any more.
    """
    config = TrainingConfig() if config is None else config
    folder = Path(folder)
    encoder = model.encoder_config
    devices = list(jax.devices() if devices is None else devices)
    local = sum(device.process_index == jax.process_index() for device in devices)
    shares = [1 - sum(task.share for task in tasks), *(task.share for task in tasks)]
    if shares[0] <= 0 or len({task.name for task in tasks}) < len(tasks):
        raise ValueError(
            "tasks need names of their own, and shares whose sum is less than 1: got "
            f"{', '.join(f'{task.name} {task.share}' for task in tasks)}"
        )
    sources = [examples, *(task.examples for task in tasks)]
    configs = [_check(model, examples, config, local)]
    for task in tasks:
        try:
            configs.append(_check(model, task.examples, task.config(config), local))
        except ValueError as error:
            raise ValueError(f"task {task.name}: {error}") from None
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, ColBERT) else [*teacher]
    translations = _check_teachers(teachers, model, configs)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    dtype = runtime.compute_dtype() if config.dtype is None else jnp.dtype(config.dtype)

    with processes.group("training") as group, ExitStack() as stack:
        if overwrite and group.is_first and folder.exists():
            _remove_run(folder)
        group.exchange("folder")
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "training": dataclasses.asdict(configs[0]),
            "encoder": dataclasses.asdict(encoder),
            "text": dataclasses.asdict(model.config.text),
            "start": model.fingerprint(),
            "examples": examples.fingerprint,
            "teacher": " ".join(t.fingerprint() for t in teachers) or None,
            "tasks": [
                {"name": task.name, "share": task.share, "examples": task.examples.fingerprint}
                | {name: getattr(own, name) for name in TASK_SETTINGS}
                for task, own in zip(tasks, configs[1:], strict=True)
            ],
        }
        check_run(folder, about, group)

        # State: parameters and moments, on all devices or spread over them.
        shapes = jax.eval_shape(lambda params: init_state(config, params), model.params)
        shardings = parameter_sharding(mesh, shapes, fsdp=config.fsdp)
        checkpoints = stack.enter_context(Checkpoints(folder, config))
        if checkpoints.latest is None:
            start = jax.tree.map(np.asarray, model.params)
            make = jax.jit(lambda params: init_state(config, params), out_shardings=shardings)
            state = make(jax.device_put(start, shardings["params"]))
        else:
            like = jax.tree.map(
                lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
                shapes,
                shardings,
            )
            state = checkpoints.restore(like)
        first = int(state["step"])

        fixed = [
            _fixed(t, ids, mesh, config) for t, ids in zip(teachers, translations, strict=True)
        ]
        encoders = [t.encoder_config for t in teachers]
        gradients = [
            make_gradients(encoder, own, dtype, mesh, shardings["params"], encoders)
            for own in configs
        ]
        update = make_update(config, shardings)
        add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        put, take = _batch_putter(mesh), _taker(model, mesh)
        parts = tuple(part for part, values in state["params"].items() if jax.tree.leaves(values))

        metrics = stack.enter_context(Metrics(folder, first, write=group.is_first))
        best = _Best(folder, metrics.history())
        steps = Mixture(
            shares,
            [
                partial(_loader, model, source, own, local, group)
                for source, own in zip(sources, configs, strict=True)
            ],
            first,
        )
        bar = progress_bar(config.maxsteps, "training", "step", progress)
        bar.update(first)
        done, clock, latest, before = first, _Clock(), {}, None
        with steps, bar, _terminated() as terminated:
            for turn, step in steps if first < config.maxsteps else ():
                trained = ("head",) if step.number < config.warmup_bert else parts
                total = None
                for number, batch in enumerate(step.batches):
                    part = gradients[turn](
                        state["params"],
                        put(batch),
                        np.int32(step.number),
                        np.int32(number),
                        trained=trained,
                        fixed=fixed,
                    )
                    total = part if total is None else add(total, part)
                assert total is not None
                grads, logged = total
                state, more = update(state, grads)
                done = step.number + 1
                # The devices are kept busy by the step just begun. Further ahead of them, a signal
                # would wait for all the steps that were begun before it.
                jax.block_until_ready(before)
                before = logged
                bar.update()
                if terminated.is_set():
                    steps.request_stop()
                clock.add(configs[turn].bsize)
                latest[turn] = logged
                stop = step.stop or (group.count == 1 and terminated.is_set())

                last = done == config.maxsteps or stop
                saving = done % config.save_every == 0 or last
                evaluating = dev is not None and (
                    done % (config.eval_every or config.save_every) == 0 or done == config.maxsteps
                )
                if done % config.log_every == 0 or saving or evaluating:
                    values = {name: float(x) for name, x in more.items()}
                    for turn, figures in latest.items():
                        prefix = f"{tasks[turn - 1].name}/" if turn else ""
                        _check_finite(
                            float(figures["loss"]), values["grad_norm"], done, checkpoints
                        )
                        values |= {prefix + name: float(x) for name, x in figures.items()}
                    values["examples_per_second"] = clock.rate()
                    bar.set_postfix(loss=f"{float(logged['loss']):.4f}", refresh=False)
                    metrics.write(done, values)
                    latest = {}
                if saving:
                    checkpoints.save(done, state)
                if evaluating and not stop:
                    assert dev is not None
                    take(state["params"])
                    measured = dev.evaluate(model)
                    metrics.write(done, {f"dev/{name}": x for name, x in measured.items()})
                    if best.improves(measured) and group.is_first:
                        _save(model, folder / "best", config, done)
                    clock.pause()
                if last:
                    break
            checkpoints.wait()
        if done < config.maxsteps:
            # Saved, in all processes; now end as the signal asks, with its exit status.
            signal.raise_signal(signal.SIGTERM)
        take(state["params"])
        if group.is_first:
            _save(model, folder / "last", config, done)
        group.exchange("saved")
        if terminated.is_set():  # it came too late to stop this run
            signal.raise_signal(signal.SIGTERM)
        chosen = folder / ("best" if (folder / "best").exists() else "last")
        return Trained(chosen, done, best.measured)


def _check(
    model: ColBERT, examples: ExampleSource, config: TrainingConfig, devices: int
) -> TrainingConfig:
    """What must fit together; the settings with the number of documents a query filled in."""
    check_divides(config.bsize, config.accumsteps, jax.process_count(), devices)
    nway = examples.nway if config.nway is None else config.nway
    if nway > examples.nway:
        raise ValueError(f"nway is {nway}, but the examples have {examples.nway} documents a query")
    if config.loss in ("distillation", "margin-mse") and not examples.scored:
        raise ValueError(
            f"the loss {config.loss!r} learns from a teacher's scores, and the examples have none: "
            "score them (training.mining) or choose another loss"
        )
    if config.loss in ("distillation", "margin-mse", "cross-entropy") and nway < 2:
        raise ValueError(f"the loss {config.loss!r} needs at least 2 documents a query, not {nway}")
    if model.query_params is not model.params:
        raise ValueError("a model with an encoder of its own for queries cannot be trained")
    if model.quantization is not None:
        raise ValueError(
            f"the weights were quantised to {model.quantization} when they were loaded; load the "
            "checkpoint without quantization to train it"
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
    return dataclasses.replace(config, nway=nway)


def _check_teachers(
    teachers: Sequence[ColBERT], model: ColBERT, configs: Sequence[TrainingConfig]
) -> list[np.ndarray | None]:
    """Each teacher's ids of the model's word pieces."""
    weight = max(config.coupled_weight for config in configs)
    if bool(teachers) != (weight > 0):
        raise ValueError(
            f"coupled_weight is {weight} and there is {'a' if teachers else 'no'} coupled "
            "teacher: give both or none"
        )
    translations = []
    for number, teacher in enumerate(teachers, 1):
        name = "the coupled teacher" if len(teachers) == 1 else f"coupled teacher {number}"
        if teacher.quantization is not None or teacher.query_params is not teacher.params:
            raise ValueError(
                f"{name} must be one encoder for queries and documents, loaded without quantization"
            )
        try:
            translations.append(model.tokenizer.translation(teacher.tokenizer))
        except ValueError as error:
            raise ValueError(f"{name} cannot read the model's tokens: {error}") from None
        theirs, ours = (dataclasses.asdict(m.config.text) for m in (teacher, model))
        other = [f"{k} {theirs[k]!r}, not {ours[k]!r}" for k in ours if theirs[k] != ours[k]]
        if other:
            raise ValueError(
                f"{name} makes other tokens of a text: {', '.join(other)}; load it with the "
                "model's settings"
            )
    return translations


def _fixed(
    teacher: ColBERT, ids: np.ndarray | None, mesh: Mesh, config: TrainingConfig
) -> CoupledTeacher:
    """A coupled teacher on the devices, spread over them as the model is."""
    where = parameter_sharding(mesh, teacher.params, fsdp=config.fsdp)
    params = jax.device_put(jax.tree.map(np.asarray, teacher.params), where)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return CoupledTeacher(params, None if ids is None else jax.device_put(ids, everywhere))


def _loader(
    model: ColBERT,
    source: ExampleSource,
    config: TrainingConfig,
    devices: int,
    group: processes.Group,
    start: int,
) -> Loader:
    return Loader(
        source,
        model.tokenizer,
        bsize=config.bsize,
        nway=config.nway,
        accumsteps=config.accumsteps,
        seed=config.seed,
        shuffle=config.shuffle,
        start=start,
        devices=devices,
        group=group,
        length_groups=config.length_groups,
        longest=model.encoder_config.backbone.max_length,
    )


def _batch_putter(mesh: Mesh):
    """A function that puts a batch, of which this process has its rows, onto the devices."""
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def put(batch: ExampleBatch) -> ExampleBatch:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    return put


def _taker(model: ColBERT, mesh: Mesh):
    """A function that gives the model the parameters of the moment."""
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def take(params: dict) -> None:
        whole = gather(params)
        model.set_params(jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole))

    return take


def _save(model: ColBERT, folder: Path, config: TrainingConfig, step: int) -> None:
    """Write the model; what was there before goes when the new one is complete."""
    new, old = (folder.with_name(f"{folder.name}.{end}") for end in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    model.save_pretrained(new, metadata=dataclasses.asdict(config) | {"steps": step})
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for name in (FOLDER, "tensorboard", "best", "last", "best.new", "best.old", "last.new"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("run.json", "metrics.jsonl", "metrics.new"):
        (folder / name).unlink(missing_ok=True)


def _check_finite(loss: float, grad_norm: float, step: int, checkpoints: Checkpoints) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise FloatingPointError(
        f"at step {step} the loss is {loss} and the gradient's norm {grad_norm}; the last "
        f"checkpoint is of step {checkpoints.latest}. Lower lr, or look at the examples' scores"
    )


class _Best:
    """The best measures on the dev collection so far."""

    def __init__(self, folder: Path, history: list[dict[str, Any]]):
        self.measured: dict[str, float] | None = None
        for values in history if (folder / "best").exists() else ():
            found = {k[4:]: v for k, v in values.items() if k.startswith("dev/")}
            if found:
                self.improves(found)

    def improves(self, measured: dict[str, float]) -> bool:
        """Whether these are better than all before; remembers them if so."""
        if self.measured is not None and measured[BEST] <= self.measured[BEST]:
            return False
        self.measured = measured
        return True


class _Clock:
    """Examples a second since the last time it was asked."""

    def __init__(self) -> None:
        self._time, self._examples = time.perf_counter(), 0

    def add(self, examples: int) -> None:
        self._examples += examples

    def rate(self) -> float:
        now = time.perf_counter()
        rate = self._examples / (now - self._time)
        self._time, self._examples = now, 0
        return rate

    def pause(self) -> None:
        """What has passed since the last time does not count."""
        self._time, self._examples = time.perf_counter(), 0


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """Set when SIGTERM has come, which then does not end the process."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
