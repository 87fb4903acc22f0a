"""benchmarks/quality.py as the README runs it, on a tiny collection and a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "quality.py"


@pytest.mark.slow
def test_quality(tmp_path, stanford_folder):
    texts = support.passages(30)
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    (folder / "collection.tsv").write_text("".join(f"{n}\t{t}\n" for n, t in enumerate(texts)))
    (folder / "queries.tsv").write_text("".join(f"q{n}\t{texts[n]}\n" for n in range(5)))
    (folder / "qrels.tsv").write_text("".join(f"q{n}\t0\t{n}\t1\n" for n in range(5)))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "data"), "--checkpoint", str(stanford_folder)]
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
