"""However a run is stopped, it ends as one that never was: best, last and metrics."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import support

from colbert_jax import ColBERT
from colbert_jax import files as publishing
from colbert_jax.cli import main
from colbert_jax.config import TrainingConfig
from colbert_jax.evaluation.dev import DevCollection
from colbert_jax.training import Task, run, trainer
from colbert_jax.training.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_length", "shared_programs")]
SETTINGS = TrainingConfig(
    nway=4,
    bsize=8,
    lr=1e-2,
    warmup=1,
    maxsteps=8,
    save_every=4,
    eval_every=2,
    log_every=3,
    length_groups=1,
    seed=3,
)


class Killed(Exception):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture(scope="module")
def dev(files):
    return DevCollection.read(files["collection"], files["queries"], files["qrels"])


@pytest.fixture(scope="module")
def go(shallow_folder, source, dev):
    """Train into a folder, with a dev collection and a second task."""
    task = Task("pairs", source, 0.4, {"loss": "cross-entropy", "use_ib_negatives": False})
    devices = jax.devices()[:1]
    fresh = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=devices)
    first = jax.tree.map(np.asarray, fresh.params)

    def run_in(folder: Path, model: ColBERT | None = None, **changes):
        if model is None:
            model = fresh  # its programs are there already
            model.set_params(first)
        config = dataclasses.replace(SETTINGS, **changes)
        return train(model, source, folder, config, tasks=[task], dev=dev, devices=devices)

    return run_in


def bytes_of(folder: Path) -> dict:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines_of(folder: Path) -> list:
    """Names and values in their order, without the time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[(k, v) for k, v in x.items() if k != "examples_per_second"] for x in lines]


@pytest.fixture(scope="module")
def whole(go, tmp_path_factory, one_length) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    go(folder)
    # The best model is replaced once, and is not the last one.
    first, second, *rest = (
        dict(line)["dev/nDCG@10"] for line in lines_of(folder) if "dev/" in str(line)
    )
    assert first < second and len(rest) == 2 and second > max(rest)
    return folder


def assert_alike(folder: Path, whole: Path) -> None:
    for name in ("best", "last"):
        assert bytes_of(folder / name) == bytes_of(whole / name), name
    assert lines_of(folder) == lines_of(whole)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.fixture
def at_step(monkeypatch):
    """Do something in each step, or in one, counted from 1."""

    def set_up(act, step: int | None = None):
        original = trainer.make_step

        def making(*args):
            learn = original(*args)

            def acting(state, number, *rest):
                if step is None or number + 1 == step:
                    act()
                return learn(state, number, *rest)

            return acting

        monkeypatch.setattr(trainer, "make_step", making)

    return set_up


class Terminated(Exception):
    pass


def end(*_):
    raise Terminated


@pytest.mark.parametrize("step", [1, 4, 6])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_like_a_run_that_never_stopped(
    number, step, go, whole, shallow_folder, tmp_path, at_step
):
    """Where nothing is due, where a checkpoint and an evaluation are, where an evaluation is: with
    the same model object again, as in a notebook."""
    devices = jax.devices()[:1]
    model = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=devices)
    before = signal.signal(signal.SIGTERM, end)
    at_step(lambda: signal.raise_signal(number), step)
    try:
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step} of 8, which"):
                go(tmp_path, model)
        else:
            with pytest.raises(Terminated):
                go(tmp_path, model)
        assert signal.getsignal(signal.SIGTERM) is end
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == step
    go(tmp_path, model)
    assert_alike(tmp_path, whole)


def test_a_signal_in_the_last_step(go, whole, tmp_path, at_step):
    """Comes too late to stop anything: all is done, and then the process is interrupted."""
    at_step(lambda: signal.raise_signal(signal.SIGINT), 8)
    with pytest.raises(KeyboardInterrupt, match=r"training was done: the model is in .*last"):
        go(tmp_path)
    assert_alike(tmp_path, whole)


def test_the_second_interrupt_ends_at_once(go, whole, tmp_path, at_step, caplog):
    def press():
        signal.raise_signal(signal.SIGINT)
        assert "training stops after this step" in caplog.text
        signal.raise_signal(signal.SIGINT)

    at_step(press, 2)
    with pytest.raises(KeyboardInterrupt) as ended:
        go(tmp_path)
    assert not str(ended.value) and not list((tmp_path / "checkpoints").iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_interrupts_stay_ignored(go, tmp_path, at_step):
    """As nohup and a shell's background jobs have it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_step(lambda: signal.raise_signal(signal.SIGINT), 1)
        assert go(tmp_path, maxsteps=2, warmup=1).step == 2
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_killed_before_an_evaluation(number, go, whole, tmp_path, monkeypatch):
    """Its checkpoint is on disk, where there is one at that step."""
    count, original = 0, DevCollection.evaluate

    def evaluate(self, model, measures):
        nonlocal count
        count += 1
        if count == number:
            raise Killed
        return original(self, model, measures)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DevCollection, "evaluate", evaluate)
        go(tmp_path)
    trained = go(tmp_path)
    assert_alike(tmp_path, whole)
    assert trained.model == tmp_path / "best"
    again = go(tmp_path)  # and nothing is measured once more
    assert again == trained and lines_of(tmp_path) == lines_of(whole)


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_killed_while_the_best_model_is_replaced(moment, go, whole, tmp_path, monkeypatch):
    """Before its first rename, between the two, or before the line that says what was measured."""
    replaced, original = 0, publishing.replace_folder

    def replace(new, folder):
        nonlocal replaced
        replaced += folder.name == "best"
        if replaced == 2 and moment == "before":
            raise Killed
        if replaced == 2 and moment == "between":
            os.rename(folder, publishing.previous_folder(folder))
            raise Killed
        original(new, folder)
        if replaced == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(publishing, "replace_folder", replace)
        go(tmp_path)
    assert (tmp_path / "best").exists() == (moment != "between")
    go(tmp_path)
    assert_alike(tmp_path, whole)


def test_checkpoints_by_the_clock(go, whole, tmp_path, stopped_after):
    """After every step here; they change neither the model nor the lines of metrics. A run may go
    on with other minutes."""
    with stopped_after(5):
        go(tmp_path, save_minutes=1e-9, save_every=100, eval_every=2)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "5"}
    shutil.rmtree(tmp_path / "checkpoints" / "5")  # of a step within a window of metrics, too
    go(tmp_path, save_minutes=None)
    for name in ("best", "last"):  # whose settings name the minutes
        file = f"{name}/model.safetensors"
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()
    assert lines_of(tmp_path) == lines_of(whole)


def test_minutes_pass(go, tmp_path, monkeypatch, at_step):
    """Four a step, ten between two checkpoints."""
    minutes, real, saved = 0, time.monotonic, []
    save = run.Checkpoints.save

    def pass_by():
        nonlocal minutes
        minutes += 4

    def note(self, step, *rest):
        saved.append(step)
        save(self, step, *rest)

    at_step(pass_by)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: real() + 60 * minutes)
    monkeypatch.setattr(run.Checkpoints, "save", note)
    go(tmp_path, save_every=100, eval_every=100)
    assert saved == [3, 6, 8]
    with pytest.raises(ValueError, match="save_minutes must be positive"):
        TrainingConfig(save_minutes=0)


def test_drafts_of_a_killed_process_go(go, whole, tmp_path, stopped_after):
    with stopped_after(2):
        go(tmp_path)
    for name in (".metrics.jsonl.0123abcd.colbert_jax", ".run.json.ffffffff.colbert_jax"):
        (tmp_path / name).write_text("{")
    go(tmp_path)
    assert_alike(tmp_path, whole)


def test_interrupted_at_the_command_line(files, tmp_path, capsys, shallow_folder, at_step, caplog):
    """Status 130 and what is kept; the same command goes on."""
    pairs = [{"query": f"heat {i}", "positive": f"metals of {i} rivers"} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ["train", "contrastive", "--checkpoint", shallow_folder, "--pairs"]
    command += [tmp_path / "p.jsonl", "--folder", tmp_path / "run", "--bsize", 8, "--maxsteps", 4]
    at_step(lambda: signal.raise_signal(signal.SIGINT), 2)
    assert main(list(map(str, command))) == 130
    assert "run again, training goes on from its last checkpoint" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert main(list(map(str, command))) == 0


SCRIPT = """
import dataclasses, json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
from colbert_jax import ColBERT
from colbert_jax.config import TrainingConfig
from colbert_jax.runtime import enable_compilation_cache
from colbert_jax.training import DevCollection, Task, loader
from colbert_jax.data.examples import stanford_examples
from colbert_jax.training.trainer import train
enable_compilation_cache()
loader._LADDER = (48, 512)
settings, checkpoint, folder, examples, queries, collection, qrels = sys.argv[1:]
source = stanford_examples(examples, queries, collection)
task = Task("pairs", source, 0.4, {"loss": "cross-entropy", "use_ib_negatives": False})
model = ColBERT.from_pretrained(checkpoint, dtype="float32")
dev = DevCollection.read(collection, queries, qrels)
train(model, source, folder, TrainingConfig(**json.loads(settings)), tasks=[task], dev=dev)
"""


@pytest.mark.skipif(not os.environ.get("COLBERT_JAX_LONG"), reason=support.LONG)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_to_a_process(number, shallow_folder, files, tmp_path):
    """At moments that the clock chooses, until the run is through."""

    def start(folder: Path) -> subprocess.Popen:
        settings = dataclasses.asdict(SETTINGS) | {"maxsteps": 16}
        names = [files[name] for name in ("examples", "queries", "collection", "qrels")]
        command = [sys.executable, "-c", SCRIPT, json.dumps(settings), shallow_folder, folder]
        return subprocess.Popen(
            [*map(str, command), *map(str, names)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def seconds() -> float:
        begin = time.monotonic()
        with start(tmp_path / "whole") as process:
            out, _ = process.communicate()
        assert process.returncode == 0, out
        return time.monotonic() - begin

    span = seconds()
    folder = tmp_path / "cut"
    for part in (0.6, 0.7, 0.8, 0.9):
        with start(folder) as process:
            try:
                out, _ = process.communicate(timeout=part * span)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                out, _ = process.communicate()
                assert process.returncode in (-number, 0), out  # 0: it had just ended
    with start(folder) as process:
        out, _ = process.communicate()
    assert process.returncode == 0, out
    assert_alike(folder, tmp_path / "whole")
