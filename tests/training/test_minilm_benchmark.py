"""`benchmarks/train_minilm.py` from texts to the model of round two, on a tiny model and texts."""

import dataclasses
import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import support

from colbert_jax import ColBERT

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "train_minilm.py"
SMALL = dict(WEB_PASSAGES=12, WEB_QUERIES=6, WIKIPEDIA=8, ABSTRACTS=8, ANSWERS=8)


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("train_minilm", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = dict(bsize=2, maxsteps=8, warmup=1, save_every=4, freeze_layers=1, log_every=1)
    module.ROUND = dataclasses.replace(module.ROUND, **own)
    module.NEIGHBOURS |= {"bsize": 2}
    module.ROUND_POOL |= {"bsize": 2, "nway": 4}
    own = dict(bsize=2, maxsteps=6, warmup=1)
    for name, ways in (("WIDE", 1), ("WIDE_NEIGHBOURS", module.WAYS), ("WIDE_POOL", 4)):
        setattr(module, name, dataclasses.replace(getattr(module, name), nway=ways, **own))
    module.TEXT = dict(query_maxlen=16, doc_maxlen=40)
    module.DIM, module.SHORT, module.POOL_WAYS, module.POOL_DRAWS = 8, 30, 4, 2
    for name, value in SMALL.items():
        setattr(module, name, value)
    module.NEAREST, module.DRAWS = 10, 2
    module.WIDE_LONG = module.WIDE_SHORT = 14
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    pool = folder / "msmarco_v2_pool"
    pool.mkdir()

    def write(name: str, rows: list[dict]) -> None:
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    texts, short = support.passages(80, seed=1), support.passages(80, seed=2, longest=8)
    two = [f"{a[:-1]} and some. {b}" for a, b in zip(texts, reversed(texts), strict=True)]
    pairs = list(zip(short, two, strict=True))
    write("acl_title_abstract", [{"title": q, "abstract": p} for q, p in pairs[:20]])
    write("medquad", [{"question": q, "answer": p} for q, p in pairs[20:40]])
    articles = [{"title": q, "description": None, "text": p} for q, p in pairs[40:60]]
    write("wikipedia_vital10k", articles)
    with gzip.open(pool / "collection.tsv.gz", "wt") as file:
        file.writelines(f"{i}\t{text}\n" for i, text in enumerate(texts[:30]))
    queries = [f"{i}\t{text}\n" for i, text in enumerate(short[:20])]
    (pool / "queries.tsv").write_text("".join(queries[:3]))
    (pool / "dev_small_queries.tsv").write_text("".join(queries))
    scored = [[qid, *([pid, float(-pid)] for pid in range(8))] for qid in range(3)]
    (pool / "examples_64way.jsonl").write_text("".join(json.dumps(x) + "\n" for x in scored))
    return folder


@pytest.mark.usefixtures("one_device", "one_length")
def test_from_texts_to_round_two(recipe, data, tmp_path, monkeypatch):
    checkpoint = support.write_plain(tmp_path / "plain")
    folder = tmp_path / "run"
    command = [SCRIPT.name, str(data), "--checkpoint", str(checkpoint), "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", command)
    recipe.run()
    wide, narrow = (ColBERT.from_pretrained(folder / name) for name in ("wide", "narrow"))
    assert (wide.dim, narrow.dim) == (32, 8)
    before = narrow
    for name in recipe.ROUNDS:
        written = (folder / name / "run" / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in written.splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 9))
        assert {"loss", "coupled_tokens", "pool/distillation", "sentences/loss"} <= {
            key for line in lines for key in line
        }
        after = ColBERT.from_pretrained(folder / name / "run" / "last")
        frozen, moved = (
            np.abs(
                np.asarray(after.params["backbone"]["layers"][n]["output"]["kernel"])
                - np.asarray(before.params["backbone"]["layers"][n]["output"]["kernel"])
            ).max()
            for n in (0, 1)
        )
        assert frozen == 0 and moved > 0
        before = after
        examples = (folder / name / "pairs.jsonl").read_text().splitlines()
        for qid, *pids in map(json.loads, examples):
            assert pids[0] == qid and len(set(pids)) == recipe.WAYS
    one, two = ((folder / "data" / name / "long.tsv").read_text() for name in recipe.ROUNDS)
    texts = [{line.split("\t")[1] for line in file.splitlines()} for file in (one, two)]
    assert len(texts[0]) == 16 and not texts[0] & texts[1]


def test_whitening(recipe):
    """Components come in order of variance, and the fourth root of the variance is left of each."""
    rng = np.random.default_rng(0)
    scales = np.array([4.0, 2.0, 1.0, 0.5])
    tokens = rng.normal(size=(20_000, 4)) * scales
    made = tokens @ recipe.whitened(tokens, np.ones(len(tokens)))
    second = made.T @ made / len(made)
    np.testing.assert_allclose(second, np.diag(scales), atol=0.1)
