"""The training loop on a tiny model: resuming, devices, memory settings, what is kept, errors."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import support
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from colbert_jax import ColBERT
from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import stanford_examples
from colbert_jax.evaluation.dev import DevCollection
from colbert_jax.models.activations import ACTIVATIONS
from colbert_jax.training.batch import ExampleBatch, TokenBatch
from colbert_jax.training.run import Checkpoints
from colbert_jax.training.step import make_gradients
from colbert_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_length", "shared_programs")
SMALL = TrainingConfig(
    nway=4, bsize=8, lr=1e-3, warmup=2, maxsteps=6, save_every=2, log_every=1, length_groups=2
)


def changed(**changes) -> TrainingConfig:
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture
def start(shallow_folder):
    """A fresh model each time: training replaces its parameters."""

    def load(**arguments) -> ColBERT:
        devices = jax.devices()[:1]
        return ColBERT.from_pretrained(
            shallow_folder, dtype="float32", devices=devices, **arguments
        )

    return load


def run(start, source, folder, config=SMALL, devices=1, **arguments) -> list[dict]:
    """Train; returns the metrics."""
    model = start()
    train(model, source, folder, config, devices=jax.devices()[:devices], **arguments)
    return metrics(folder)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> np.ndarray:
    return np.array([line["loss"] for line in lines if "loss" in line])


def weights(folder: Path) -> bytes:
    return (folder / "last" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(shallow_folder, source, tmp_path_factory, one_length) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    model = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=jax.devices()[:1])
    train(model, source, folder, SMALL, devices=jax.devices()[:1])
    return folder


@pytest.mark.parametrize("steps", [3])
@pytest.mark.slow
def test_interrupted_run_goes_on_bit_for_bit(
    steps, start, source, uninterrupted, tmp_path, stopped_after
):
    """Stopped after any step, with dropout and a shuffled order: the same weights in the end."""
    with stopped_after(steps):
        run(start, source, tmp_path)
    lines = run(start, source, tmp_path)
    assert weights(tmp_path) == weights(uninterrupted)
    np.testing.assert_array_equal(losses(lines), losses(metrics(uninterrupted)))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_finished_run_is_left_alone(start, source, uninterrupted):
    before = weights(uninterrupted)
    model = start()
    trained = train(model, source, uninterrupted, SMALL, devices=jax.devices()[:1])
    assert trained.step == 6 and trained.model == uninterrupted / "last"
    assert weights(uninterrupted) == before
    loaded = ColBERT.from_pretrained(trained.model, dtype="float32", devices=jax.devices()[:1])
    np.testing.assert_array_equal(
        model.encode_queries(["heat flow"]), loaded.encode_queries(["heat flow"])
    )


SCRIPT = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from colbert_jax import ColBERT
from colbert_jax.config import TrainingConfig
from colbert_jax.runtime import enable_compilation_cache
from colbert_jax.training import loader
from colbert_jax.data.examples import stanford_examples
from colbert_jax.training.trainer import train
enable_compilation_cache()
loader._LADDER = (48, 512)
checkpoint, examples, queries, collection, folder, maxsteps = sys.argv[1:]
config = TrainingConfig(nway=4, bsize=8, lr=1e-3, warmup=2, maxsteps=int(maxsteps), save_every=7,
                        log_every=1, length_groups=2)
model = ColBERT.from_pretrained(checkpoint, dtype="float32")
train(model, stanford_examples(examples, queries, collection), folder, config)
"""


def start_process(shallow_folder, files, folder, maxsteps=24) -> subprocess.Popen:
    names = [files[name] for name in ("examples", "queries", "collection")]
    command = [sys.executable, "-c", SCRIPT, shallow_folder, *names, folder, str(maxsteps)]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if (folder / "metrics.jsonl").is_file() and any(
            line["step"] >= step for line in complete_lines(folder)
        ):
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached: {process.communicate()[0]}")


def complete_lines(folder: Path) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.slow
def test_killed_and_terminated_processes(shallow_folder, files, tmp_path):
    """SIGKILL anywhere, then SIGTERM, which saves; the end is the same to the byte."""
    whole = start_process(shallow_folder, files, tmp_path / "whole")
    folder = tmp_path / "cut"
    killed = start_process(shallow_folder, files, folder)
    wait_for_step(folder, 10, killed)
    killed.kill()
    killed.wait()
    terminated = start_process(shallow_folder, files, folder)
    wait_for_step(folder, 16, terminated)
    terminated.send_signal(signal.SIGTERM)
    assert terminated.wait(300) == -signal.SIGTERM, terminated.communicate()[0]
    saved = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert saved == complete_lines(folder)[-1]["step"] and saved >= 16
    last = start_process(shallow_folder, files, folder)
    assert last.wait(300) == 0, last.communicate()[0]
    assert whole.wait(300) == 0, whole.communicate()[0]
    assert weights(folder) == weights(tmp_path / "whole")
    for process in (whole, killed, terminated, last):
        process.stdout.close()


@pytest.fixture(scope="module")
def one_group(shallow_folder, source, tmp_path_factory, one_length) -> np.ndarray:
    """Losses of a run on one device, its documents padded to one length."""
    folder = tmp_path_factory.mktemp("run") / "one"
    model = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=jax.devices()[:1])
    train(model, source, folder, changed(length_groups=1), devices=jax.devices()[:1])
    return losses(metrics(folder))


@pytest.mark.slow
def test_any_number_of_devices(start, source, one_group, tmp_path, eight_devices, monkeypatch):
    """Two devices; then the run goes on with eight and its parameters spread over them (FSDP)."""
    config = changed(length_groups=1)
    np.testing.assert_allclose(
        losses(run(start, source, tmp_path, config, devices=2)), one_group, rtol=2e-4
    )
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    monkeypatch.setattr("colbert_jax.training.step._SMALLEST_SHARDED", 256)
    config = changed(length_groups=1, fsdp=True)
    np.testing.assert_allclose(
        losses(run(start, source, tmp_path, config, devices=8)), one_group, rtol=2e-4
    )


@pytest.mark.slow
def test_own_documents_on_two_devices(start, source, tmp_path, eight_devices):
    config = changed(loss="margin-mse", use_ib_negatives=False, maxsteps=2, length_groups=1)
    one, two = (losses(run(start, source, tmp_path / str(n), config, devices=n)) for n in (1, 2))
    np.testing.assert_allclose(two, one, rtol=2e-4)


@pytest.mark.slow
def test_contrast(start, source, tmp_path):
    config = changed(
        loss="contrastive", use_ib_negatives=False, dropout=0.0, maxsteps=8, length_groups=1
    )
    lines = run(start, source, tmp_path, config)
    assert losses(lines)[-3:].mean() < losses(lines)[:3].mean()


@pytest.mark.slow
def test_memory_settings_change_nothing_else(start, source, uninterrupted, tmp_path):
    """Recomputed layers; chunks of 5, of which the 16 documents of a group leave a rest."""
    lines = run(start, source, tmp_path, changed(remat=True, chunk=5))
    np.testing.assert_allclose(losses(lines), losses(metrics(uninterrupted)), rtol=1e-4)


@pytest.mark.slow
def test_micro_batches(start, source, tmp_path):
    """Without in-batch negatives and dropout, cutting a batch up changes nothing."""
    config = changed(use_ib_negatives=False, dropout=0.0, length_groups=1)
    whole = losses(run(start, source, tmp_path / "whole", config))
    config = changed(use_ib_negatives=False, dropout=0.0, length_groups=1, accumsteps=4)
    np.testing.assert_allclose(
        losses(run(start, source, tmp_path / "cut", config)), whole, rtol=1e-4
    )


@pytest.mark.slow
def test_frozen_backbone(start, source, tmp_path):
    before = jax.tree.map(np.asarray, start().params)
    model = start()
    config = changed(warmup_bert=6)
    train(model, source, tmp_path, config, devices=jax.devices()[:1])
    same = jax.tree.map(
        lambda a, b: np.array_equal(a, np.asarray(b)), before["backbone"], model.params["backbone"]
    )
    assert all(jax.tree.leaves(same))
    head = jax.tree.leaves(model.params["head"])[0]
    assert not np.array_equal(jax.tree.leaves(before["head"])[0], np.asarray(head))
    assert "lr" not in metrics(tmp_path)[0] and "head_lr" in metrics(tmp_path)[0]


@pytest.mark.slow
def test_frozen_layers(stanford_folder, source, tmp_path):
    """Embeddings and the first layer stay, weight decay or not; the second layer is trained."""
    model = ColBERT.from_pretrained(stanford_folder, dtype="float32", devices=jax.devices()[:1])
    before = jax.tree.map(np.asarray, model.params)
    config = changed(freeze_layers=1, weight_decay=0.1, maxsteps=3, length_groups=1)
    train(model, source, tmp_path, config, devices=jax.devices()[:1])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, np.asarray(b)), before, model.params)
    backbone = moved["backbone"]
    assert not any(jax.tree.leaves([backbone["embeddings"], backbone["layers"][0]]))
    assert all(jax.tree.leaves([backbone["layers"][1]["output"], moved["head"]]))
    assert metrics(tmp_path)[1]["lr"] > 0


def some_batch() -> ExampleBatch:
    """Two queries with four documents each."""
    ids = np.random.default_rng(0).integers(10, 200, (8, 12)).astype(np.int32)
    rows = TokenBatch(ids, np.full(8, 12, np.int32), np.ones((8, 12), bool))
    return ExampleBatch(
        TokenBatch(*(x[:2] for x in rows)), (rows,), np.arange(8, dtype=np.int32), None
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_on_two_devices(activation, start, eight_devices):
    """JAX refuses the derivatives of some functions where it checks what differs by device."""
    model = start()
    backbone = dataclasses.replace(model.encoder_config.backbone, hidden_act=activation)
    encoder = dataclasses.replace(model.encoder_config, backbone=backbone)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=eight_devices[:2])
    gradients = make_gradients(encoder, changed(remat=True, chunk=1), "float32", mesh)
    batch = some_batch()._replace(scores=np.zeros((2, 4), np.float32))
    traced = gradients.trace(model.params, batch, 0, 0, trained=("backbone", "head"))
    assert jax.tree.structure(traced.out_info[0]) == jax.tree.structure(model.params)


@pytest.mark.slow
def test_gradients_of_what_is_not_frozen(stanford_folder):
    """They are those of training everything."""
    model = ColBERT.from_pretrained(stanford_folder, dtype="float32", devices=jax.devices()[:1])
    batch = some_batch()

    def of(freeze_layers: int) -> dict:
        config = changed(loss="cross-entropy", freeze_layers=freeze_layers)
        gradients = make_gradients(model.encoder_config, config, "float32")
        return gradients(model.params, batch, 0, 0, ("backbone", "head"))[0]

    some, every = of(1), of(0)
    assert set(some["backbone"]) == {"layers"} and set(some["backbone"]["layers"]) == {1}
    every["backbone"] = {"layers": {1: every["backbone"]["layers"][1]}}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), some, every)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> ColBERT:
    """Another model for the same token ids, of another architecture."""
    folder = support.write_stanford(tmp_path_factory.mktemp("teacher"), seed=5, dim=24)
    return ColBERT.from_pretrained(folder, dtype="float32", devices=jax.devices()[:1])


def matches(files, *models: ColBERT) -> list[np.ndarray]:
    """Of each query of the first batch float[Lq, N]: the best similarity, by the models' mean, of
    its tokens in every document of the batch."""
    lines = [json.loads(line) for line in files["examples"].read_text().splitlines()[:8]]
    queries = dict(line.split("\t") for line in files["queries"].read_text().splitlines())
    passages = dict(line.split("\t") for line in files["collection"].read_text().splitlines())
    asked = [queries[str(qid)] for qid, *_ in lines]
    texts = [passages[str(pid)] for _, *scored in lines for pid, _ in scored]
    q = [model.encode_queries(asked) for model in models]
    d = [list(model.encode_documents(texts, progress=False)) for model in models]

    def best(query: tuple, document: tuple) -> np.ndarray:
        return np.mean([x @ y.T for x, y in zip(query, document, strict=True)], 0).max(1)

    documents = list(zip(*d, strict=True))
    return [np.stack([best(x, y) for y in documents], 1) for x in zip(*q, strict=True)]


def divergence(files, student: ColBERT, *teachers: ColBERT) -> float:
    """Of the first batch's scores at a temperature of 2; the teachers' mean similarity counts."""

    def log_probabilities(*models: ColBERT) -> np.ndarray:
        scores = [tokens.sum(0) for tokens in matches(files, *models)]
        return np.asarray(jax.nn.log_softmax(np.array(scores, np.float64) / 2.0))

    p, q = log_probabilities(*teachers), log_probabilities(student)
    return (np.exp(p) * (p - q)).sum(1).mean()


@pytest.mark.slow
def test_coupled_teacher(start, source, files, teacher, tmp_path, eight_devices):
    """The loss of the first step is the divergence over all pairs of the batch, it falls, and it
    does not depend on the number of devices."""
    config = changed(
        coupled_weight=1.0,
        temperature=2.0,
        dropout=0.0,
        shuffle=False,
        maxsteps=8,
        length_groups=1,
    )
    expected = divergence(files, start(), teacher)
    lines = run(start, source, tmp_path / "one", config, teacher=teacher)
    assert lines[0]["coupled"] == pytest.approx(expected, rel=1e-4)
    assert [line["coupled"] for line in lines] == pytest.approx(losses(lines))
    assert losses(lines)[-1] < 0.9 * losses(lines)[0]
    config = dataclasses.replace(config, fsdp=True, chunk=4, maxsteps=2)
    two = run(start, source, tmp_path / "two", config, devices=2, teacher=teacher)
    np.testing.assert_allclose(losses(two)[:1], losses(lines)[:1], rtol=2e-4)

    config = dataclasses.replace(config, coupled_weight=0.8, coupled_tokens=0.5)
    line = run(start, source, tmp_path / "tokens", config, devices=2, teacher=teacher)[0]
    pairs = zip(matches(files, start()), matches(files, teacher), strict=True)
    tokens = np.mean([((s - t) / 2.0).var(axis=1).sum() / 2 for s, t in pairs])
    assert line["coupled"] == pytest.approx(expected, rel=1e-4)
    assert line["coupled_tokens"] == pytest.approx(tokens, rel=1e-4)
    own = lines[0]["distillation"] + lines[0].get("in_batch", 0)
    learned = line["coupled"] + 0.5 * line["coupled_tokens"]
    assert line["loss"] == pytest.approx(0.2 * own + 0.8 * learned, rel=1e-4)


def with_other_ids(folder: Path, copy: Path) -> Path:
    """The same model, whose word pieces have other ids."""
    shutil.copytree(folder, copy)
    words = (folder / "vocab.txt").read_text().split()
    order = np.random.default_rng(0).permutation(len(words))
    (copy / "vocab.txt").write_text("".join(f"{words[n]}\n" for n in order))
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][order])
    save_file(tensors, copy / "model.safetensors")
    return copy


@pytest.mark.slow
def test_several_coupled_teachers(start, source, files, tmp_path, eight_devices):
    """They score with their embeddings side by side, and a teacher's own ids change nothing."""
    one, two = (
        support.write_stanford(tmp_path / name, seed=seed, dim=dim)
        for name, seed, dim in (("one", 6, 16), ("two", 7, 40))
    )
    other = with_other_ids(two, tmp_path / "other")
    load = partial(ColBERT.from_pretrained, dtype="float32", devices=jax.devices()[:1])
    config = changed(
        coupled_weight=1.0,
        temperature=2.0,
        dropout=0.0,
        shuffle=False,
        maxsteps=1,
        warmup=1,
        length_groups=1,
    )

    def coupled(name: str, *teachers: Path, devices: int = 1) -> float:
        models = [load(folder) for folder in teachers]
        folder = tmp_path / "runs" / name
        return run(start, source, folder, config, devices, teacher=models)[0]["coupled"]

    both = coupled("both", one, two)
    assert both == pytest.approx(divergence(files, start(), load(one), load(two)), rel=1e-4)
    assert both == pytest.approx(coupled("turned", other, one, devices=8), rel=2e-4)
    assert both != pytest.approx(coupled("one", one), rel=0.01)
    alone = coupled("two", two)
    assert both != pytest.approx(alone, rel=0.01)

    assert coupled("twice", two, other) == pytest.approx(alone, rel=2e-4)
    with pytest.raises(ValueError, match="another run"):
        coupled("both", two, one)


def test_coupled_teacher_that_does_not_fit(start, source, tmp_path):
    def fails(config: TrainingConfig, teacher: ColBERT | list | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train(start(), source, tmp_path / "run", config, teacher=teacher)

    coupled = changed(coupled_weight=0.5)
    fails(coupled, None, "there is no coupled teacher: give both or none")
    fails(changed(), start(), "coupled_weight is 0.0 and there is a coupled teacher")
    fails(coupled, start(doc_maxlen=20), "other tokens of a text: doc_maxlen 20, not 48")
    fails(coupled, start(quantization="int8"), "loaded without quantization")
    fails(coupled, [start(), start(doc_maxlen=20)], "coupled teacher 2 makes other tokens")
    more = support.write_stanford(tmp_path / "more", {"num_hidden_layers": 1})
    (more / "vocab.txt").write_text((more / "vocab.txt").read_text().replace("##ing", "##gni"))
    fails(coupled, ColBERT.from_pretrained(more), "lacks 1 of .* pieces: '##ing'")
    fails(changed(freeze_layers=1), None, "freeze_layers is 1, but the model has 1 layers")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_learns_and_keeps_the_best(start, source, files, tmp_path):
    """The dev collection is the training data: its quality must rise."""
    dev = DevCollection.read(files["collection"], files["queries"], files["qrels"])
    before = dev.evaluate(start())["nDCG@10"]
    config = changed(loss="cross-entropy", maxsteps=20, eval_every=4, dropout=0.0, save_every=20)
    model = start()
    trained = train(model, source, tmp_path, config, dev=dev, devices=jax.devices()[:1])
    curve = [line["dev/nDCG@10"] for line in metrics(tmp_path) if "dev/nDCG@10" in line]
    assert len(curve) == 5
    assert trained.model == tmp_path / "best"
    assert trained.dev["nDCG@10"] == max(curve) > before + 0.2
    best = ColBERT.from_pretrained(trained.model, dtype="float32", devices=jax.devices()[:1])
    assert dev.evaluate(best)["nDCG@10"] == pytest.approx(max(curve))
    assert best.config.metadata["steps"] in range(4, 21, 4)
    assert losses(metrics(tmp_path))[-1] < losses(metrics(tmp_path))[0]


@pytest.mark.slow
def test_last_checkpoints_are_kept(uninterrupted):
    kept = sorted(int(path.name) for path in (uninterrupted / "checkpoints").iterdir())
    assert kept == [4, 6]
    assert not (uninterrupted / "best").exists()


@pytest.mark.slow
def test_tensorboard(uninterrupted):
    pytest.importorskip("tensorboardX")
    assert sum(file.stat().st_size for file in (uninterrupted / "tensorboard").iterdir()) > 500


@pytest.mark.parametrize(
    "config, message",
    [
        (changed(nway=5), "nway is 5, but the examples have 4 documents"),
        (changed(bsize=9), "bsize 9 must be a multiple of 2"),
    ],
)
def test_settings_that_do_not_fit_the_examples(config, message, start, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(start(), source, tmp_path / "run", config, devices=jax.devices()[:2])


def test_scores_are_needed(start, files, tmp_path):
    names = (files["examples"], files["queries"], files["collection"])
    source = stanford_examples(*names, scores=False)
    with pytest.raises(ValueError, match="the examples have none: score them"):
        train(start(), source, tmp_path / "run", SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_run_in_the_folder(start, source, uninterrupted, plain_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    before = weights(folder)
    with pytest.raises(ValueError, match=r"another run.*training.lr was 0.001, is now 0.01"):
        train(start(), source, folder, changed(lr=1e-2), devices=jax.devices()[:1])
    other = ColBERT.from_pretrained(plain_folder, dim=8, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"encoder.head.*choose another folder"):
        train(other, source, folder, SMALL, devices=jax.devices()[:1])
    assert weights(folder) == before
    # What is logged and kept may change.
    train(start(), source, folder, changed(log_every=3), devices=jax.devices()[:1])


@pytest.mark.slow
def test_overwrite_removes_the_run_and_nothing_else(start, source, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "notes.txt").write_text("mine")
    lines = run(start, source, folder, changed(maxsteps=2, lr=1e-2), overwrite=True)
    assert [line["step"] for line in lines] == [1, 2]
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "checkpoints", "best", "last"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_are_no_runs_are_left_alone(start, source, tmp_path, name, overwrite):
    """Their names alone do not make them a run's: training begins elsewhere."""
    if "." in name:
        (tmp_path / name).write_text('{"mine": 1}')
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match=f"{name}: exists, and is not of a run"):
        run(start, source, tmp_path, overwrite=overwrite)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


# tensorstore's own futures, which nobody asks after the first of them has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_damaged_checkpoint(start, source, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for file in (folder / "checkpoints" / "6").rglob("*"):
        if file.is_file() and "ocdbt" in str(file):
            file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoints/6: this checkpoint cannot be restored"):
        train(start(), source, folder, SMALL, devices=jax.devices()[:1])
    # As the message says: without it the run goes on from the one before.
    shutil.rmtree(folder / "checkpoints" / "6")
    run(start, source, folder)
    assert weights(folder) == weights(uninterrupted)


@pytest.mark.slow
def test_full_disk(start, source, uninterrupted, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match="the disk has 0 MB left"):
            run(start, source, tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    run(start, source, tmp_path)
    assert weights(tmp_path) == weights(uninterrupted)


@pytest.mark.slow
def test_failing_writes(start, source, uninterrupted, tmp_path):
    """The file system refuses to write on; what was saved before is whole."""
    resource = pytest.importorskip("resource")
    run_script = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from colbert_jax.training.run import Checkpoints\n"
        "from colbert_jax.config import TrainingConfig\n"
        "import numpy as np, jax, sys\n"
        "from pathlib import Path\n"
        "kept = Checkpoints(Path(sys.argv[1]), TrainingConfig())\n"
        "state = {'step': jax.numpy.zeros((), int), 'x': jax.numpy.ones(100)}\n"
        "kept.save(1, state, {}); kept.wait()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "big = {'step': state['step'], 'x': jax.random.normal(jax.random.key(0), 100000)}\n"
        "try:\n"
        "    kept.save(2, big, {}); kept.wait()\n"
        "except OSError as error:\n"
        "    print('OSError', error)\n"
    )
    assert resource
    done = subprocess.run(
        [sys.executable, "-c", run_script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert "OSError" in done.stdout and "could not be written" in done.stdout, done.stderr[-2000:]
    with Checkpoints(tmp_path, SMALL) as left:
        assert left.latest == 1


@pytest.mark.slow
def test_loss_that_is_no_number(start, source, tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step \d the loss is .*nan") as raised:
        run(start, source, tmp_path, changed(lr=1e30, warmup=None, maxsteps=6, save_every=6))
    assert "; no checkpoint was saved. Lower lr" in str(raised.value)


def test_quantised_and_two_encoder_models(start, source, tmp_path):
    with pytest.raises(ValueError, match="quantised to int8"):
        train(start(quantization="int8"), source, tmp_path / "run", SMALL)
    folder = support.write_flmr(tmp_path / "flmr", separate=True)
    model = ColBERT.from_pretrained(folder, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="encoder of its own for queries"):
        train(model, source, tmp_path / "run", SMALL)
