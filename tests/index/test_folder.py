"""The folder of an index: nothing of the user's is taken over because of its name."""

import json
import shutil

import numpy as np
import pytest
from support import unit_rows

from colbert_jax import Index
from colbert_jax.index import build
from colbert_jax.index.folder import building_folder, state_name
from colbert_jax.index.layouts.convert import convert_index


def ready():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 20)
    return dict(embeddings=unit_rows(rng, lengths.sum(), 16), lengths=lengths)


class Killed(BaseException):
    pass


def never():
    raise AssertionError("was read")
    yield


@pytest.fixture
def source(tmp_path):
    """A Stanford index to be converted."""
    Index.build(tmp_path / "first", **ready())
    convert_index(tmp_path / "first", tmp_path / "source", "stanford")
    shutil.rmtree(tmp_path / "first")
    return tmp_path / "source"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", ["thesis.txt", "build.json", "metadata.json"])
def test_a_building_folder_of_the_users_is_refused(tmp_path, model, source, content, overwrite):
    mine = tmp_path / "i.building"
    mine.mkdir()
    (mine / content).write_text('{"scripts": {}}')
    with pytest.raises(FileExistsError, match=r"i\.building: exists and is no unfinished build"):
        Index.build(tmp_path / "i", model, never(), overwrite=overwrite)
    with pytest.raises(FileExistsError, match=r"i\.building: exists and is no unfinished build"):
        convert_index(source, tmp_path / "i", overwrite=overwrite)
    assert [file.name for file in mine.iterdir()] == [content]
    assert {file.name for file in tmp_path.iterdir()} == {"i.building", "source"}


def test_a_file_in_place_of_the_building_folder(tmp_path):
    (tmp_path / "i.building").write_text("mine")
    with pytest.raises(FileExistsError, match="no unfinished build"):
        Index.build(tmp_path / "i", **ready())
    assert (tmp_path / "i.building").read_text() == "mine"


def test_similar_names_stay(tmp_path, source):
    """While an index is built, replaced and converted."""
    names = [f"i{end}" for end in (".previous", ".old", ".new", ".tmp", ".lock", ".building.lock")]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.json").write_text("mine")
    Index.build(tmp_path / "i", **ready())
    Index.build(tmp_path / "i", **ready(), overwrite=True)
    convert_index(source, tmp_path / "i", overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"i", "source", *names}
    assert {(tmp_path / name / "metadata.json").read_text() for name in names} == {"mine"}


@pytest.mark.parametrize("files", [["metadata.json"], ["metadata.json", "codes.txt"], ["x.npy"]])
def test_a_folder_that_is_no_index_is_not_replaced(tmp_path, source, files):
    """Though it has a `metadata.json`, as many folders have."""
    (tmp_path / "i").mkdir()
    for name in files:
        (tmp_path / "i" / name).write_text("{}")
    for _ in range(2):
        with pytest.raises(FileExistsError, match="exists and is not an index"):
            Index.build(tmp_path / "i", **ready(), overwrite=True)
        with pytest.raises(FileExistsError, match="exists and is not an index"):
            convert_index(source, tmp_path / "i", overwrite=True)
    assert sorted(file.name for file in (tmp_path / "i").iterdir()) == sorted(files)


def test_an_index_of_another_layout_is_replaced(tmp_path, source):
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        Index.build(source, **ready())
    assert len(Index.build(source, **ready(), overwrite=True)) == 20


@pytest.mark.parametrize("to", ["native", "stanford"])
def test_a_conversion_forgets_a_build_that_was_under_way(tmp_path, monkeypatch, source, to):
    """What a build had committed is gone, so it must not go on from there."""
    if to == "stanford":
        convert_index(source, tmp_path / "ours")
        source = tmp_path / "ours"
    path = tmp_path / "i"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(build, "publish", raise_killed)
        Index.build(path, **ready())
    module = "colbert_jax.index.layouts.convert"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"{module}.publish", raise_killed)
        patch.setattr(f"{module}.discard", lambda folder: None)  # a kill discards nothing
        convert_index(source, path, to)
    state = json.loads((building_folder(path) / state_name(0)).read_text())
    assert state == {"made_by": "colbert_jax"}
    Index.build(path, **ready()).verify()
    assert not building_folder(path).exists() and not (path / state_name(0)).exists()


def raise_killed(*args):
    raise Killed
