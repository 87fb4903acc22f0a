"""The files of an index: an earlier commit's are read, and written alike."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from colbert_jax import Index
from colbert_jax.cli import main
from colbert_jax.index.format import IndexFormatError, read_metadata

GOLDEN = Path(__file__).parents[1] / "golden"
EARLIER = GOLDEN / "native_index"
sys.path.insert(0, str(GOLDEN))
from make_native import IDS, TEXTS, Encoder  # noqa: E402


def test_an_index_of_an_earlier_commit(capsys):
    index = Index.open(EARLIER)
    index.verify()
    assert list(index.ids) == IDS and list(index.texts) == TEXTS
    assert index.metadata.num_empty_documents == 1 and index.lengths[2] == 0
    answers = np.load(EARLIER / "answers.npz")
    hits = index.search(answers["queries"], k=5, mode="exact")
    np.testing.assert_array_equal(hits.positions, answers["positions"])
    np.testing.assert_allclose(hits.scores, answers["scores"], rtol=1e-5)
    assert main(["info", str(EARLIER), "--json"]) == 0
    assert capsys.readouterr().out == json.dumps(json.loads(metadata(EARLIER))) + "\n"


def metadata(folder: Path) -> str:
    return (folder / "metadata.json").read_text("utf-8")


def test_the_files_are_those_of_an_earlier_commit(tmp_path):
    """Names, types, shapes, strings and the metadata's fields; floats may differ by rounding."""
    pairs = list(zip(IDS, TEXTS, strict=True))
    path = Index.build(tmp_path / "i", Encoder(), pairs, num_centroids=8).path
    names = {file.name for file in EARLIER.iterdir()} - {"answers.npz"}
    assert {file.name for file in path.iterdir()} == names
    for file in EARLIER.glob("*.npy"):
        ours, theirs = np.load(path / file.name), np.load(file)
        assert ours.dtype == theirs.dtype, file.name
        if file.name not in ("lists.npy",):  # as long as the centroids make it
            assert ours.shape == theirs.shape, file.name
        if file.name.startswith(("pid", "text")):
            assert ours.tobytes() == theirs.tobytes(), file.name
    ours, theirs = (json.loads(metadata(folder)) for folder in (path, EARLIER))
    assert 0 < ours.pop("outlier_distance") < 2  # not known to that commit
    assert list(ours) == list(theirs)
    assert list(ours["checksums"]) == [*theirs["checksums"], "metadata.json"]  # since then
    for name in ("settings", "model", "text_columns", "num_pid_bytes", "num_text_bytes"):
        assert ours[name] == theirs[name]


@pytest.mark.parametrize(
    "change",
    [
        {"num_documents": -1},
        {"num_tokens": 1.5},
        {"dim": True},
        {"nbits": 3},
        {"nbits": 10**9},
        {"text_columns": ["../pid"]},
        {"text_columns": [[]]},
        {"num_pid_bytes": None},
        {"settings": []},
        {"model": "bert"},
        {"num_documents": 0},
        {"num_documents": 2**31},
        {"num_documents": 10**400},
        {"num_tokens": 0},
        {"num_centroids": 0},
        {"num_centroids": 2**40},
        {"num_list_entries": -1},
        {"dim": 0},
        {"dim": 10**30},
        {"nbits": 10**10},
        {"nbits": 0},
        {"nbits": -2},
        {"nbits": 2.0},
        {"nbits": True},
        {"nbits": "2"},
        {"nbits": [2]},
        {"text_columns": ["centroid"]},
        {"text_columns": ["title"]},
        {"text_columns": ["pid", "pid"]},
        {"text_columns": "pid"},
        {"checksums": {"codes.npy": "x"}},
        {"origin": [1]},
    ],
)
def test_metadata_out_of_range(tmp_path, change):
    folder = shutil.copytree(EARLIER, tmp_path / "i")
    (folder / "metadata.json").write_text(json.dumps(json.loads(metadata(EARLIER)) | change))
    with pytest.raises(IndexFormatError, match=rf"field '{next(iter(change))}' is missing or dam"):
        read_metadata(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_empty_documents": 10**6}, "documents are empty"),
        ({"dim": 15, "nbits": 1}, "do not fill whole bytes"),
        ({"model": {}}, "field 'model' is damaged: 'load' names no checkpoint"),
        ({"model": {"load": {"name_or_path": 3}}}, "field 'model' is damaged: 'load' names no"),
        ({"model": {"load": {"name_or_path": "x"}}}, "'fingerprint' is no string"),
        ({"model": {"load": {"name_or_path": "x"}, "fingerprint": "0"}}, "'search' is no object"),
    ],
)
def test_metadata_that_does_not_fit_together(tmp_path, change, message):
    folder = shutil.copytree(EARLIER, tmp_path / "i")
    (folder / "metadata.json").write_text(json.dumps(json.loads(metadata(EARLIER)) | change))
    with pytest.raises(IndexFormatError, match=rf"metadata\.json: .*{message}"):
        read_metadata(folder)


def test_another_number_of_empty_documents(tmp_path):
    folder = shutil.copytree(EARLIER, tmp_path / "i")
    fields = json.loads(metadata(EARLIER)) | {"num_empty_documents": 3}
    (folder / "metadata.json").write_text(json.dumps(fields))
    with pytest.raises(IndexFormatError, match=r"offsets\.npy: damaged: 1 documents have no token"):
        Index.open(folder)


@pytest.mark.parametrize("text", ["[" * 10**5, "1" * 10**5, "[1]", '"x"', "null", "", "\ufeff{}"])
def test_metadata_that_is_no_object(tmp_path, text):
    folder = shutil.copytree(EARLIER, tmp_path / "i")
    (folder / "metadata.json").write_text(text, "utf-8")
    with pytest.raises(IndexFormatError, match=r"metadata\.json: damaged"):
        read_metadata(folder)
    (folder / "metadata.json").write_bytes(b"\xff{}")
    with pytest.raises(IndexFormatError, match=r"metadata\.json: damaged"):
        read_metadata(folder)
