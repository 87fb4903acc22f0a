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
    assert list(ours) == list(theirs) and list(ours["checksums"]) == list(theirs["checksums"])
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
    ],
)
def test_metadata_out_of_range(tmp_path, change):
    folder = shutil.copytree(EARLIER, tmp_path / "i")
    (folder / "metadata.json").write_text(json.dumps(json.loads(metadata(EARLIER)) | change))
    with pytest.raises(IndexFormatError, match=rf"field '{next(iter(change))}' is missing or dam"):
        read_metadata(folder)
