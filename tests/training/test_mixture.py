"""Several sources in one run: which step learns from which, resuming, what does not fit."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from colbert_jax import ColBERT
from colbert_jax.config import TrainingConfig
from colbert_jax.training import Task, pair_examples, train
from colbert_jax.training.loader import Mixture, Step, task_order

pytestmark = pytest.mark.usefixtures("one_length", "shared_programs")
SETTINGS = TrainingConfig(
    loss="contrastive",
    use_ib_negatives=False,
    nway=1,
    bsize=8,
    lr=1e-3,
    warmup=1,
    maxsteps=6,
    save_every=2,
    log_every=2,
    length_groups=1,
)


@pytest.mark.parametrize("shares", [[1.0], [0.7, 0.3], [0.5, 0.1, 0.4], [0.02, 0.98]])
def test_shares(shares):
    done = np.zeros(len(shares))
    for step, task in enumerate(itertools.islice(task_order(shares), 1000), 1):
        done[task] += 1
        assert np.abs(done - np.array(shares) * step).max() < 1.0 + 1e-9


class Numbers:
    """A loader whose steps tell which they are."""

    def __init__(self, task: int, start: int):
        self._numbers = itertools.count(start)
        self._task, self.stop_requested, self.closed = task, False, False

    def __next__(self) -> Step:
        return Step(next(self._numbers), [], self.stop_requested, np.array([self._task]))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True


@pytest.mark.parametrize("start", [0, 1, 7, 20])
def test_turns_go_on(start):
    """No step of a source is left out or given twice, wherever the run begins again."""

    def run(start: int):
        made = []

        def maker(task):
            def make(first):
                made.append(Numbers(task, first))
                given.append(first)
                return made[-1]

            return make

        given: list[int] = []
        with Mixture([0.6, 0.4], [maker(0), maker(1)], start) as steps:
            taken = list(itertools.islice(steps, 30 - start))
        assert all(loader.closed for loader in made)
        assert [step.number for _, step in taken] == list(range(start, 30))
        assert all(step.examples[0] == task for task, step in taken)
        return [task for task, _ in taken], given

    whole, given = run(0)
    assert given == [0, 0] and whole.count(1) == 12
    rest, given = run(start)
    assert whole[start:] == rest and given == [whole[:start].count(k) for k in (0, 1)]


def test_every_loader_hears_of_a_stop():
    with Mixture([0.5, 0.5], [lambda n: Numbers(0, n), lambda n: Numbers(1, n)]) as steps:
        assert not next(steps)[1].stop
        steps.request_stop()
        assert [next(steps)[1].stop for _ in range(3)] == [True] * 3


@pytest.fixture(scope="module")
def sources(files, source, tmp_path_factory):
    """Pairs, and four-way examples with scores."""
    queries, texts = (
        [line.split("\t")[1] for line in files[name].read_text().splitlines()]
        for name in ("queries", "collection")
    )
    pairs = [{"query": q, "positive": texts[2 * i]} for i, q in enumerate(queries)]
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pair_examples(file), source


def lists(examples, **settings) -> Task:
    own = {"loss": "distillation", "nway": 4, "bsize": 2, "use_ib_negatives": True} | settings
    return Task("lists", examples, 0.4, own)


def test_two_losses_in_one_run(sources, shallow_folder, tmp_path, stopped_after):
    """Both are learned from; stopped and started again, the run ends with the same weights."""
    pairs, examples = sources

    def run(folder: Path, task: Task) -> bytes:
        devices = jax.devices()[:1]
        model = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=devices)
        train(model, pairs, folder, SETTINGS, tasks=[task], devices=devices)
        return (folder / "last" / "model.safetensors").read_bytes()

    whole = run(tmp_path / "whole", lists(examples))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    keys = {"contrastive", "loss", "lists/loss", "lists/distillation", "lists/in_batch", "lr"}
    assert keys <= set().union(*(json.loads(line) for line in lines))

    with stopped_after(3):
        run(tmp_path / "cut", lists(examples))
    assert run(tmp_path / "cut", lists(examples)) == whole

    with pytest.raises(ValueError, match=r"tasks was \[.*another run|another run.*tasks was"):
        run(tmp_path / "cut", lists(examples, bsize=4))


def test_errors(sources, model, tmp_path):
    pairs, examples = sources
    with pytest.raises(ValueError, match="task lists: lr cannot differ between tasks"):
        lists(examples, lr=1e-3)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\), got 1.5"):
        Task("lists", examples, 1.5)
    with pytest.raises(ValueError, match="a word without a slash, and not dev: got 'dev'"):
        Task("dev", examples, 0.5)

    def fails(message: str, *tasks: Task) -> None:
        with pytest.raises(ValueError, match=message):
            train(model, pairs, tmp_path / "run", SETTINGS, tasks=tasks, devices=jax.devices()[:1])

    fails(
        "shares whose sum is less than 1: got a 0.5, b 0.5",
        *(Task(name, pairs, 0.5) for name in "ab"),
    )
    fails("names of their own", Task("a", pairs, 0.1), Task("a", pairs, 0.1))
    fails("task lists: nway is 5, but the examples have 4", lists(examples, nway=5))
    fails("task lists: the loss 'distillation' learns from a teacher's", lists(pairs, nway=None))
    assert not (tmp_path / "run").exists()
