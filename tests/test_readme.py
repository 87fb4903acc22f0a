"""Every command and snippet of the README, word for word; a tiny model stands behind the hub id."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import support

from colbert_jax.checkpoints import hub
from colbert_jax.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "" for line in text.splitlines() if line]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, one_device):
    """A working folder with the files that the commands name, and a checkpoint for every hub id."""
    folders = {
        "colbert-ir/colbertv2.0": support.write_stanford(tmp_path / "checkpoint"),
        "LinWeizheDragon/ColBERT-v2": support.write_flmr(tmp_path / "flmr"),
    }
    original = hub.resolve
    monkeypatch.setattr(
        hub,
        "resolve",
        lambda name, **kwargs: folders.get(str(name)) or original(name, **kwargs),
    )
    monkeypatch.chdir(tmp_path)
    Path("passages.tsv").write_text(
        "".join(f"{n}\t{t}\n" for n, t in enumerate(support.passages(30)))
    )
    Path("queries.tsv").write_text("q1\theat flow\nq2\trunning cats\n")
    Path("qrels.tsv").write_text("q1\t0\t3\t1\nq2\t0\t4\t2\n")
    Path("triples.jsonl").write_text('["q1", 3, 4]\n["q2", 4, 5]\n')
    scored = [
        [q, *([pid, -float(pid)] for pid in range(n, n + 4))] for n, q in ((3, "q1"), (4, "q2"))
    ]
    Path("examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scored))
    (settings,) = [text for kind, text in BLOCKS if kind == "json"]
    short = json.loads(settings)
    short["text"]["doc_maxlen"] = 48  # the tiny model has 96 positions
    Path("short.json").write_text(json.dumps(short))


def test_all_blocks_are_covered():
    assert {kind for kind, _ in BLOCKS} == {"", "json", "python", "text"}
    others = [c for c in COMMANDS if not c.startswith("colbert-jax ")]
    assert others == [
        "make demo",
        "make test",
        "pip install -e .",
        "python convert/index.py fastplaid-index copy.index --to native",
        "python convert/checkpoint.py colbert-ir/colbertv2.0 native-folder --to native",
        "python convert/verify.py pylate-folder --python INTERPRETER",
        "python benchmarks/quality.py DATA --checkpoint sentence-transformers/all-MiniLM-L6-v2",
        "python benchmarks/passages.py DATA --checkpoint sentence-transformers/all-MiniLM-L6-v2 "
        "--cache CACHE",
        "python benchmarks/search.py CACHE --passages 10000 --queries 128 --seconds 3 "
        "--peer fast-plaid=PYTHON --peer colbert-ai=PYTHON --peer torch=PYTHON",
    ]
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo:" in makefile and "\ntest:" in makefile


def test_commands(elsewhere, capsys):
    for command in COMMANDS:
        if command.startswith("colbert-jax "):
            assert main(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)


def test_scripts(elsewhere, capsys):
    """The conversion scripts, as modules, since the hub is replaced in this process."""
    for command in COMMANDS:
        if command.startswith("python convert/checkpoint.py"):
            script = runpy.run_path(str(ROOT / "convert" / "checkpoint.py"))
            assert script["main"](["convert", *shlex.split(command)[2:]]) == 0
    assert "native-folder: native" in capsys.readouterr().out


def test_snippets(elsewhere, capsys):
    names: dict = {}
    for snippet in PYTHON:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["index"].texts[0].startswith("Dune")
    assert "[CLS]" in capsys.readouterr().out


def test_no_figure_is_missing():
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]{3,}\b", re.sub(r"`[^`]*`", "", README))


def test_links_point_to_files():
    for name in re.findall(r"`((?:notebooks|benchmarks|colbert_jax|tests)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
