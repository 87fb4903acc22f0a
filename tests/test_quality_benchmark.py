"""benchmarks/quality.py as the README runs it, on a tiny collection and a tiny model."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import support

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "quality.py"


@pytest.fixture
def data(tmp_path):
    texts = support.passages(30)
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    (folder / "collection.tsv").write_text("".join(f"{n}\t{t}\n" for n, t in enumerate(texts)))
    (folder / "queries.tsv").write_text("".join(f"q{n}\t{texts[n]}\n" for n in range(5)))
    (folder / "qrels.tsv").write_text("".join(f"q{n}\t0\t{n}\t1\n" for n in range(5)))
    return tmp_path / "data"


@pytest.mark.slow
def test_quality(data, tmp_path, stanford_folder):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(data), "--checkpoint", str(stanford_folder)]
        + ["--collections", "tiny", "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["tiny"]
    assert set(rows) >= {"exact, raw", "PLAID, 2 bits", "exact, 4 bits"}
    assert all(0 <= row["nDCG@10"] <= 1 for row in rows.values())
    assert "| tiny |" in done.stdout


def test_spread(data, tmp_path, stanford_folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    quality = importlib.import_module("quality")
    monkeypatch.delitem(sys.modules, "quality")
    file = tmp_path / "out.json"
    call = [str(data), "--checkpoint", str(stanford_folder), "--collections", "tiny"]
    quality.main([*call, "--spread", "1", "--nbits", "4", "--json", str(file)])
    rows = json.loads(file.read_text())["tiny"]
    kinds = {name.partition(", seed")[0] for name in rows}
    assert kinds == {"raw", "4 bits, optimal", "4 bits, quantile", "4 bits, noise"}
    assert "| tiny | 4 bits, noise | 0.99" in capsys.readouterr().out

    model = quality.ColBERT.from_pretrained(stanford_folder)
    collection = quality.Collection(data / "tiny", model, tmp_path / "work")
    candidates, documents = collection.search_raw().positions, collection.documents
    shuffled = np.random.default_rng(0).permuted(candidates, axis=1)
    same = quality.reranked(collection, shuffled, documents.__getitem__)
    np.testing.assert_array_equal(same, candidates)
    cosines = np.linspace(0.1, 0.9, len(documents.values), dtype=np.float32)
    noisy = quality.with_noise(documents, cosines, (0, 1), 3)
    np.testing.assert_allclose(np.linalg.norm(noisy, axis=1), 1, rtol=1e-5)
    part = slice(*documents.offsets[3:5])
    np.testing.assert_allclose((noisy * documents[3]).sum(1), cosines[part], rtol=1e-4)
