"""The recipes from the command line, on tiny models and data, to the end and again."""

import json
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import support

from colbert_jax import ColBERT, Index
from colbert_jax.cli import main
from colbert_jax.settings import make, merge
from colbert_jax.training.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--bsize", "4", "--maxsteps", "3", "--warmup", "1", "--lr", "1e-3", "--save-every", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts, queries = support.passages(50, seed=1), support.passages(12, seed=2, longest=8)
    (folder / "collection.tsv").write_text("".join(f"{i}\t{t}\n" for i, t in enumerate(texts)))
    (folder / "queries.tsv").write_text("".join(f"{i}\t{t}\n" for i, t in enumerate(queries)))
    (folder / "qrels.tsv").write_text("".join(f"{i} 0 {3 * i} 1\n" for i in range(12)))
    (folder / "triples.jsonl").write_text(
        "".join(f"[{i},{3 * i},{3 * i + 1}]\n" for i in range(12))
    )
    pairs = [{"query": q, "positive": texts[3 * i]} for i, q in enumerate(queries)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts_tsv = "".join(f"{q}\t{texts[3 * i]}\t{texts[i]}\n" for i, q in enumerate(queries))
    (folder / "triples.tsv").write_text(texts_tsv)
    support.write_plain(folder / "plain", {"num_hidden_layers": 1})
    return folder


pytestmark = pytest.mark.usefixtures("one_device", "one_length")


def run(*arguments) -> None:
    assert main(["train", *map(str, arguments)]) == 0


def data(files: Path) -> list:
    return ["--queries", files / "queries.tsv", "--collection", files / "collection.tsv"]


def dev(files: Path) -> list:
    names = {"collection": "collection", "queries": "queries", "qrels": "qrels"}
    return [x for n, f in names.items() for x in (f"--dev-{n}", files / f"{f}.tsv")]


def test_denoised_supervision(files, tmp_path, capsys):
    settings = {
        "checkpoint": str(files / "plain"),
        "dim": 16,
        "text": {"doc_maxlen": 24, "query_maxlen": 12},
        "teacher": str(files / "plain"),
        "teacher_maxlen": 32,
        "k": 8,
        "rounds": 2,
        "warm": {"loss": "contrastive", "nway": None, "bsize": 4, "maxsteps": 2},
        "first": {"nway": 4, "bsize": 4, "maxsteps": 2, "warmup": 1},
        "training": {"nway": 6, "bsize": 4, "maxsteps": 3, "warmup": 1},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    folder = tmp_path / "run"
    command = [
        *("denoised-supervision", "--settings", tmp_path / "settings.json", *data(files)),
        *("--warm-pairs", files / "pairs.jsonl", "--positives", files / "qrels.tsv"),
        *("--folder", folder, *dev(files)),
    ]
    run(*command)
    assert "round2/run/best: 3 steps" in capsys.readouterr().out
    for number, ways in ((1, 4), (2, 6)):
        place = folder / f"round{number}"
        assert len(Index.open(place / "index")) == 50
        lines = [json.loads(t) for t in (place / "examples.jsonl").read_text().splitlines()]
        assert {len(line) for line in lines} == {1 + ways}
        # The labelled passage is the positive.
        assert all(line[1][0] == 3 * line[0] for line in lines)
    kept = json.loads((folder / "settings.json").read_text())
    assert kept["training"]["lr"] == 1e-5 and kept["first"]["nway"] == 4
    model = ColBERT.from_pretrained(folder / "round2" / "run" / "last")
    assert (model.dim, model.config.text.doc_maxlen) == (16, 24)
    assert model.config.text.query_token_id == "[unused0]"

    # Again: nothing is made anew.
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.suffix in (".npy", ".jsonl")}
    run(*command)
    after = {f: f.stat().st_mtime_ns for f in before if "metrics" not in f.name}
    assert after == {f: time for f, time in before.items() if f in after}


@pytest.mark.parametrize("triples", ["triples.jsonl", "triples.tsv"])
def test_colbertv1(triples, files, tmp_path):
    """Triples of ids, and of texts."""
    with_ids = data(files) if triples == "triples.jsonl" else []
    run(
        *("colbertv1", "--checkpoint", files / "plain", "--dim", 8, "--triples", files / triples),
        *(*with_ids, "--folder", tmp_path, "--query-maxlen", 16, "--doc-maxlen", 32, *SHORT),
    )
    model = ColBERT.from_pretrained(tmp_path / "last")
    assert model.dim == 8 and model.config.metadata["loss"] == "cross-entropy"


def test_contrast_with_a_coupled_teacher(files, tmp_path):
    """A plain encoder teaches by its tokens at their own width."""
    run(
        *("colbertv1", "--checkpoint", files / "plain", "--dim", 8, "--doc-maxlen", 32, *SHORT),
        *("--triples", files / "pairs.jsonl", "--folder", tmp_path, "--loss", "contrastive"),
        *("--nway", 1, "--coupled-teacher", files / "plain", "--coupled-weight", 0.5),
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx((lines[0]["contrastive"] + lines[0]["coupled"]) / 2)
    assert ColBERT.from_pretrained(tmp_path / "last").dim == 8


def test_distill_goes_on_from_a_late_interaction_checkpoint(files, stanford_folder, tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        [q, *([int(p), float(-n)] for n, p in enumerate(rng.choice(50, 4, replace=False)))]
        for q in range(12)
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        *("distill", "--checkpoint", stanford_folder, "--examples", tmp_path / "examples.jsonl"),
        *(*data(files), "--folder", tmp_path / "run", "--nway", "3", *SHORT),
    )
    model = ColBERT.from_pretrained(tmp_path / "run" / "last")
    # Its own lengths, not the recipe's.
    assert model.config.text.doc_maxlen == 48


def test_errors(files, tmp_path, capsys):
    def fails(*arguments) -> str:
        assert main(["train", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "have no default: folder, examples, queries, collection" in fails("distill")
    command = [
        *("colbertv1", "--checkpoint", files / "plain", "--triples", files / "triples.jsonl"),
        *(*data(files), "--folder", tmp_path / "run"),
    ]
    assert "dev_qrels belong together" in fails(*command, "--dev-queries", files / "queries.tsv")
    assert "nway" in fails(*command, "--nway", "1")
    assert "coupled_weight belong together" in fails(*command, "--coupled-weight", "0.5")
    (tmp_path / "bad.jsonl").write_text("[0,0,1]\n[0,0,999]\n")
    message = fails(*command, "--triples", tmp_path / "bad.jsonl")
    assert "bad.jsonl, line 2" in message and "999" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["colbertv1", "distill", "denoised_supervision"])
def test_scripts_say_the_recipes_values(script):
    """What a script spells out is what the library does by default."""
    names = runpy.run_path(str(ROOT / "train" / f"{script}.py"))
    from colbert_jax.cli import _parser
    from colbert_jax.settings import given

    recipe = script.replace("_", "-")
    kind, _ = RECIPES[recipe]
    needed = {"folder": "f", "triples": "t", "examples": "e", "queries": "q", "collection": "c"}
    fields = kind.__dataclass_fields__
    needed = {name: value for name, value in needed.items() if name in fields}
    said = given(_parser().parse_args(["train", recipe, *names["SETTINGS"]]))
    default, spelt = make(kind, needed), make(kind, merge(needed, said))
    for part in ("training", "first", "warm", "rounds", "k", "nbits", "teacher", "teacher_maxlen"):
        if part in fields:
            assert getattr(spelt, part) == getattr(default, part), part
    assert spelt.text.doc_maxlen == 180
    usage = [line for line in names["__doc__"].splitlines() if line.startswith("    ")]
    command = shlex.split(" ".join(usage).replace("\\", ""))
    assert command[:2] == ["python", f"train/{script}.py"]
    _parser().parse_args(["train", recipe, *command[2:]])
