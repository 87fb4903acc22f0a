"""The recipes from the command line, on tiny models and data, to the end and again."""

import dataclasses
import json
import re
import runpy
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import support
from PIL import Image

from colbert_jax import ColBERT, Index
from colbert_jax.cli import main
from colbert_jax.data.lines import Lines
from colbert_jax.flmr import FLMRModelForRetrieval
from colbert_jax.settings import make, merge
from colbert_jax.training import recipes
from colbert_jax.training.recipes import RECIPES, TEACHER, Recipe

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
    pairs = [
        {"query": q, "positive": texts[3 * i], "negatives": [texts[3 * i + 1], texts[3 * i + 2]]}
        for i, q in enumerate(queries)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts_tsv = "".join(f"{q}\t{texts[3 * i]}\t{texts[3 * i + 1]}\n" for i, q in enumerate(queries))
    (folder / "triples.tsv").write_text(texts_tsv)
    support.write_plain(folder / "plain", {"num_hidden_layers": 1})
    return folder


pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_device", "one_length", "shared_programs"),
]


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


@pytest.mark.parametrize("negatives", [[], ["--negatives", "negatives"]])
def test_contrastive(negatives, files, tmp_path):
    """At a high temperature each document of the batch is as likely as any other."""
    run(
        *("contrastive", "--checkpoint", files / "plain", "--dim", 8, "--doc-maxlen", 32, *SHORT),
        *("--pairs", files / "pairs.jsonl", "--folder", tmp_path, *negatives, *dev(files)),
        *("--temperature", 1000.0),
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    documents = 4 * 3 if negatives else 4
    assert lines[0]["step"] == 0 and "dev/nDCG@10" in lines[0]  # before the first step
    assert lines[1]["loss"] == pytest.approx(np.log(documents), abs=0.05)
    assert any("dev/nDCG@10" in line for line in lines)
    assert ColBERT.from_pretrained(tmp_path / "best").dim == 8


def test_contrastive_on_a_data_set(files, stanford_folder, tmp_path):
    """By column names, from a late-interaction checkpoint."""
    datasets = pytest.importorskip("datasets")
    pairs = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    renamed = [{"q": x["query"], "d": x["positive"], "n": x["negatives"][0]} for x in pairs]
    datasets.Dataset.from_list(renamed).save_to_disk(tmp_path / "pairs")
    run(
        *("contrastive", "--checkpoint", stanford_folder, "--pairs", tmp_path / "pairs", *SHORT),
        *("--query", "q", "--positive", "d", "--negatives", "n", "--folder", tmp_path / "run"),
    )
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert kept["negatives"] == ["n"] and kept["training"]["nway"] is None
    assert ColBERT.from_pretrained(tmp_path / "run" / "last").config.text.doc_maxlen == 48


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


@pytest.mark.parametrize(
    "name", [n for n, (kind, _) in RECIPES.items() if issubclass(kind, Recipe)]
)
def test_a_querys_own_passage_is_left_out(name, files, tmp_path):
    """Queries of the evaluation may be passages themselves."""
    kind, _ = RECIPES[name]
    needed = {f.name: "x" for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    flags = list(map(str, dev(files)))
    values = {k[2:].replace("-", "_"): v for k, v in zip(flags[::2], flags[1::2], strict=True)}
    for ignore_self in (False, True):
        made = make(kind, needed | values | {"ignore_self": ignore_self})
        collection = recipes._dev(made)
        assert collection is not None and collection.ignore_self == ignore_self


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
    assert "give dev_collection with it" in fails(*command, "--ignore-self", "true")
    assert "nway" in fails(*command, "--nway", "1")
    assert "coupled_weight belong together" in fails(*command, "--coupled-weight", "0.5")
    (tmp_path / "bad.jsonl").write_text("[0,0,1]\n[0,0,999]\n")
    message = fails(*command, "--triples", tmp_path / "bad.jsonl")
    assert "bad.jsonl, line 2" in message and "999" in message
    assert not (tmp_path / "run").exists()


SCRIPTS = ["colbertv1", "contrastive", "distill", "denoised_supervision", "preflmr"]


def test_every_script_is_tested():
    assert sorted(SCRIPTS) == sorted(file.stem for file in (ROOT / "train").glob("*.py"))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "preflmr"])
def test_scripts_run(script, files, tmp_path, monkeypatch):
    """Each as it is, but for what makes it small. No file is read twice."""
    opened, read = Counter[str](), Lines.__init__

    def count(self, path):
        opened[Path(path).name] += 1
        read(self, path)

    monkeypatch.setattr(Lines, "__init__", count)
    rows = [[q, [3 * q, 2.0], [3 * q + 1, 1.0]] for q in range(12)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {
        "colbertv1": ["--triples", files / "triples.tsv"],
        "contrastive": ["--pairs", files / "pairs.jsonl"],
        "distill": [*data(files), "--examples", tmp_path / "examples.jsonl", "--nway", 2],
        "denoised_supervision": [
            *(*data(files), "--positives", files / "qrels.tsv", "--teacher", files / "plain"),
            *("--teacher-maxlen", 32, "--warm-triples", files / "triples.jsonl", "--k", 6),
            *("--warm-bsize", 4, "--warm-maxsteps", 1, "--first-bsize", 4, "--first-maxsteps", 1),
            *("--first-nway", 3, "--nway", 3, "--first-warmup", 1),
        ],
    }[script]
    folder = tmp_path / "run"
    small = ["--checkpoint", files / "plain", "--dim", 8, "--doc-maxlen", 32, *SHORT]
    command = [script, *inputs, *small, "--folder", folder]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    file = ROOT / "train" / f"{script}.py"
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert not ended.value.code
    rounds = [folder / "round1", folder / "round2"]
    last = rounds[-1] / "run" if script == "denoised_supervision" else folder
    assert ColBERT.from_pretrained(last / "last").dim == 8
    if script == "denoised_supervision":
        assert (opened["collection.tsv"], opened["queries.tsv"]) == (1, 1)
        # The files that its docstring names.
        named = re.search(r"leaves plain files: (.*?) \(", file.read_text())
        assert named is not None
        for name in named[1].split(", "):
            assert all((place / name).is_file() for place in rounds), name


def test_preflmr_runs(files, tmp_path, monkeypatch):
    """Its script as it is, on questions about pictures."""
    support.write_preflmr(tmp_path / "checkpoint", config={"num_hidden_layers": 1})
    rows = [
        {"question_id": i, "question": "what is this?", "img_path": f"{i}.png", "pos_item_ids": [i]}
        for i in range(4)
    ]
    for i in range(4):
        Image.new("RGB", (31, 20), (i, 90, 0)).save(tmp_path / f"{i}.png")
    passages = [{"passage_id": i, "passage_content": t} for i, t in enumerate(support.passages(9))]
    for name, table in (("q", rows), ("p", passages)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    inputs = ["--data", tmp_path / "q.jsonl", "--passages", tmp_path / "p.jsonl"]
    inputs += ["--images", tmp_path, "--checkpoint", tmp_path / "checkpoint", "--nway", 2]
    command = ["preflmr", *inputs, *SHORT, "--accumsteps", 2, "--folder", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train" / "preflmr.py"), run_name="__main__")
    assert not ended.value.code
    trained = FLMRModelForRetrieval.from_pretrained(tmp_path / "run" / "last")
    assert trained.images is not None and (tmp_path / "run" / "settings.json").is_file()


def test_the_teacher_has_one_name():
    """The cross-encoder's hub id is spelt alike wherever it is named."""
    files = [
        file
        for place in ("colbert_jax", "train", "tests", "docs", "notebooks", "benchmarks")
        for file in (ROOT / place).rglob("*")
        if file.suffix in (".py", ".md", ".ipynb")
    ]
    names = {
        name
        for file in [*files, *ROOT.glob("*.md")]
        for name in re.findall(r"ms-marco-MiniLM-L[-\w]+", file.read_text("utf-8"))
    }
    assert names == {TEACHER.removeprefix("cross-encoder/")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_say_the_recipes_values(script):
    """What a script spells out is what the library does by default."""
    names = runpy.run_path(str(ROOT / "train" / f"{script}.py"))
    from colbert_jax.cli import _parser
    from colbert_jax.settings import given

    recipe = script.replace("_", "-")
    kind, _ = RECIPES[recipe]
    needed = {
        "folder": "f",
        "pairs": "p",
        "triples": "t",
        "data": "d",
        "passages": "p",
        "examples": "e",
        "queries": "q",
        "collection": "c",
    }
    fields = kind.__dataclass_fields__
    needed = {name: value for name, value in needed.items() if name in fields}
    said = given(_parser().parse_args(["train", recipe, *names["SETTINGS"]]))
    default, spelt = make(kind, needed), make(kind, merge(needed, said))
    for part in ("training", "first", "warm", "rounds", "k", "nbits", "teacher", "teacher_maxlen"):
        if part in fields:
            assert getattr(spelt, part) == getattr(default, part), part
    assert recipe == "preflmr" or spelt.text.doc_maxlen == 180
    usage = [line for line in names["__doc__"].splitlines() if line.startswith("    ")]
    command = " ".join(usage).replace("\\", "")
    first, *uses = command.split(f"python train/{script}.py")
    assert uses and not first.strip()
    for arguments in uses:
        _parser().parse_args(["train", recipe, *shlex.split(arguments)])
