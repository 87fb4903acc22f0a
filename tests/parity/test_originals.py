"""Checkpoints that the original libraries saved, and what those libraries make of the same texts.

The folders of tests/golden/checkpoints hold both; see tests/golden/README.md.
"""

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from colbert_jax import ColBERT, batching
from colbert_jax.checkpoints import LAYOUTS, detect_layout
from colbert_jax.scoring import maxsim_all_pairs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "checkpoints"
TEXTS = json.loads((GOLDEN / "texts.json").read_text(encoding="utf-8"))
FOLDERS = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
POSITIONS = 40  # of every golden encoder

BOTH = {"pylate", "sentence-transformers"}


def layout_of(name: str) -> str:
    library = name.partition("_")[0]
    if name.endswith("_single"):
        return "single-vector"
    return "huggingface" if library == "transformers" else library


def writable(name: str) -> set[str]:
    """The layouts of other libraries that can say what the golden checkpoint says."""
    own = layout_of(name)
    if own == "stanford":
        return BOTH | {"stanford"} | ({"flmr"} if name == "stanford_bert" else set())
    if own == "flmr":
        return {"flmr"} if name == "flmr_bert_separate" else BOTH | {"stanford", "flmr"}
    if own == "pylate":  # the others have biases, prompts, no expansion or a skiplist of their own
        return BOTH | ({"stanford"} if name in ("pylate_bert", "pylate_bert_cased") else set())
    if own == "sentence-transformers":  # the others: "min" expansion, masks that PyLate lacks
        if name == "sentence-transformers_bert":  # its prompts are markers
            return BOTH | {"stanford"}
        own_pylate = name.rpartition("_")[2] in ("electra", "modernbert")
        return BOTH if own_pylate else {"sentence-transformers"}
    return BOTH


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    """Queries and documents in one shape: a program for each architecture."""
    monkeypatch.setattr(batching, "LADDER", (POSITIONS,))


def load(folder: Path, like: ColBERT | None = None, **settings) -> ColBERT:
    model = ColBERT.from_pretrained(folder, dtype="float32", devices=jax.devices()[:1], **settings)
    if like is not None and like._checkpoint.encoder == model._checkpoint.encoder:
        model.encode_ids = like.encode_ids  # spare a compilation
    return model


@cache
def golden(name: str) -> ColBERT:
    lengths = {}
    if layout_of(name) in ("huggingface", "single-vector"):  # which have none of their own
        lengths = {key: TEXTS[key] for key in ("query_maxlen", "doc_maxlen")}
    return load(GOLDEN / name, **lengths)


def encoded(model: ColBERT) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The rows of each query and of each document."""
    encoded = model.encode_queries(TEXTS["queries"], allow_blank=True)
    queries = [q[np.abs(q).sum(axis=1) > 0] for q in encoded]
    return queries, list(model.encode_documents(TEXTS["documents"]))


def padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    block = np.zeros((len(rows), POSITIONS, rows[0].shape[1]), np.float32)
    for target, row in zip(block, rows, strict=True):
        target[: len(row)] = row
    lengths = np.array([len(row) for row in rows])
    return block, np.arange(POSITIONS) < lengths[:, None]


@pytest.mark.parametrize("name", FOLDERS)
def test_same_as_the_original(name):
    expected = np.load(GOLDEN / name / "expected.npz")
    ours = encoded(golden(name))
    for rows, values, lengths in zip(
        ours, ("queries", "documents"), ("query_lengths", "document_lengths"), strict=True
    ):
        assert [len(row) for row in rows] == expected[lengths].tolist()
        np.testing.assert_allclose(np.concatenate(rows), expected[values], rtol=0, atol=1e-5)
    queries, _ = padded(ours[0])  # a row of zeros adds nothing to a score
    scores = maxsim_all_pairs(queries, *padded(ours[1]))
    np.testing.assert_allclose(scores, expected["scores"], rtol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_layout(name):
    assert detect_layout(GOLDEN / name) == layout_of(name)


@pytest.mark.parametrize("name", FOLDERS)
def test_written_and_read_again(tmp_path, name):
    model = golden(name)
    before = encoded(model)
    for layout in {"native", layout_of(name)} & LAYOUTS.keys():
        model.save_pretrained(tmp_path / layout, layout)
        assert detect_layout(tmp_path / layout) == layout
        again = encoded(load(tmp_path / layout, model))
        for old, new in zip(before, again, strict=True):
            np.testing.assert_allclose(np.concatenate(new), np.concatenate(old), atol=1e-6)


@pytest.mark.parametrize("name", FOLDERS)
def test_other_layouts(tmp_path, name):
    """Written and equal, or refused with nothing left."""
    model = golden(name)
    before = encoded(model)
    for layout in ("stanford", "flmr", "pylate", "sentence-transformers"):
        folder = tmp_path / layout
        if layout not in writable(name):
            with pytest.raises(ValueError, match=rf"the {layout} layout|another"):
                model.save_pretrained(folder, layout)
            continue
        model.save_pretrained(folder, layout)
        again = encoded(load(folder, model))
        for kind, old, new in zip(("queries", "documents"), before, again, strict=True):
            for text, a, b in zip(TEXTS[kind], old, new, strict=True):
                if kept_as_it_is(name, text):
                    np.testing.assert_allclose(b, a, atol=1e-5, err_msg=text)
    assert {path.name for path in tmp_path.iterdir()} == writable(name)


def kept_as_it_is(name: str, text: str) -> bool:
    """Whether all layouts agree on what happens to a text before it is tokenised.

    PyLate strips texts, the others do not; WordPiece and SentencePiece do so anyway, byte-level BPE
    does not. And PyLate's do_lower_case takes special tokens in the text along.
    """
    if name.endswith("_lower") and "[" in text:
        return False
    byte_level = "roberta" in name.split("_")[1:] or "modernbert" in name
    return not byte_level or (text != "" and text == text.strip())


# --- convert/ -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verify():
    spec = importlib.util.spec_from_file_location("verify", ROOT / "convert" / "verify.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verify_tells_differences(verify):
    folder = GOLDEN / "stanford_bert"
    theirs, versions = verify.read_encoded(folder / "expected.npz")
    assert versions.startswith("colbert-ai")
    ours = verify.encode(golden("stanford_bert"), TEXTS["queries"], TEXTS["documents"])
    assert all(difference.passed for difference in verify.differences(ours, theirs))
    documents = [*ours.documents[:-1], ours.documents[-1] + 2e-5]
    found = verify.differences(ours._replace(documents=documents), theirs)
    assert [d.what for d in found if not d.passed] == ["documents"]
    found = verify.differences(ours._replace(queries=[q[1:] for q in ours.queries]), theirs)
    assert [d.what for d in found if not d.passed] == ["queries"]
    assert "number 0 has [11, 8] and [12, 8]" in found[0].note
    found = verify.differences(ours._replace(scores=ours.scores * 1.0002), theirs)
    assert [d.what for d in found if not d.passed] == ["scores"]


def test_verify_prints_a_table(verify, monkeypatch, capsys):
    folder = str(GOLDEN / "stanford_bert")
    answer = verify.read_encoded(GOLDEN / "stanford_bert" / "expected.npz")
    monkeypatch.setattr(verify, "TEXTS", {k: TEXTS[k] for k in ("queries", "documents")})
    monkeypatch.setattr(verify, "run_original", lambda *_: answer)
    assert verify.main([folder]) == 0
    printed = capsys.readouterr().out
    assert "stanford layout, compared with colbert-ai" in printed
    assert printed.count("PASS") == 3
    monkeypatch.setattr(verify, "EMBEDDING_TOLERANCE", 0.0)
    assert verify.main([folder]) == 1
    assert verify.main([str(GOLDEN / "flmr_bert_tied")]) == 2
    assert "no original" in capsys.readouterr().err


def test_verify_published(verify, monkeypatch, capsys):
    scores = verify.encode(golden("pylate_bert"), [verify.QUERY], verify.DOCUMENTS).scores[0]
    printed = " ".join(f"{score:.2f}" for score in scores)
    monkeypatch.setattr(verify, "PUBLISHED", {"some/model": printed, "other/model": printed})
    monkeypatch.setattr(verify, "PUBLISHED_THREE_WAYS", {})
    places = [f"some/model={GOLDEN / 'pylate_bert'}", "other/model=./missing"]
    assert verify.main(["--published", *places]) == 0
    printed = capsys.readouterr().out
    assert printed.count("PASS") == 4
    assert "not at hand" in printed
    with pytest.raises(SystemExit):
        verify.main(["--published", "unknown/model=here"])


def test_verify_names_each_published_model_once(verify):
    assert len(verify.PUBLISHED) == 10
    assert {len(scores.split()) for scores in verify.PUBLISHED.values()} == {4}
    for ways in verify.PUBLISHED_THREE_WAYS.values():
        rows = {weights: np.array(scores.split(), float) for weights, scores in ways.items()}
        assert {len(row) for row in rows.values()} == {4}
        parts = np.stack([rows[1, 0, 0], rows[0, 1, 0], rows[0, 0, 1]])
        np.testing.assert_allclose(
            np.array([0.4, 0.2, 0.4]) @ parts, rows[0.4, 0.2, 0.4], atol=2e-5
        )


def test_an_original_that_is_not_installed(tmp_path):
    if importlib.util.find_spec("pylate"):
        pytest.skip("PyLate is installed here")
    script = ROOT / "convert" / "originals.py"
    folder, texts = GOLDEN / "pylate_bert", GOLDEN / "texts.json"
    ran = subprocess.run(
        [sys.executable, script, "pylate", folder, texts, tmp_path / "out.npz"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 3
    assert "Install pylate" in ran.stderr
    assert not (tmp_path / "out.npz").exists()


def test_transformers_runs_through_the_script(verify):
    pytest.importorskip("torch")
    folder = GOLDEN / "transformers_roberta"
    theirs, _ = verify.run_original("transformers", folder, TEXTS, sys.executable)
    expected, _ = verify.read_encoded(folder / "expected.npz")
    assert all(difference.passed for difference in verify.differences(expected, theirs))
