"""Damage to indexes that were changed, and changes of damaged ones."""

import contextlib
import json
import os
import shutil
import zlib

import numpy as np
import pytest
from support import unit_rows, write_stanford

from colbert_jax import Index, Retriever
from colbert_jax.index import changes
from colbert_jax.index.fields import FieldStore
from colbert_jax.index.format import METADATA, IndexFormatError, own_checksum

DIM = 16


def ready(seed, n, prefix=None, **others):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, n)
    ids = None if prefix is None else [f"{prefix}{i}" for i in range(n)]
    rows = unit_rows(rng, lengths.sum(), DIM)
    return dict(embeddings=rows, lengths=lengths, ids=ids, progress=False, **others)


def years(n):
    return [{"year": 2000 + i} for i in range(n)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An index of documents that were built, added and deleted, all with fields."""
    path = tmp_path_factory.mktemp("whole") / "i"
    index = Index.build(path, **ready(0, 40, "d", fields=years(40)), nbits=4, num_centroids=16)
    return index.add(**ready(1, 10, "e", fields=years(10))).delete(["d3", "e4"]).path


@pytest.fixture
def path(source, tmp_path):
    return shutil.copytree(source, tmp_path / "i")


def file_of(path, array):
    return path / json.loads((path / METADATA).read_text())["change"]["files"][array]


def flip(file, place=-1):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def edit(path, change):
    """Change the metadata, and give them and all arrays the right checksums."""
    fields = json.loads((path / METADATA).read_text())
    change(fields)
    for file in fields["checksums"]:
        if file.endswith(".npy"):
            fields["checksums"][file] = zlib.crc32((path / file).read_bytes())
    fields["checksums"][METADATA] = own_checksum(fields)
    (path / METADATA).write_text(json.dumps(fields))


CHANGES = {
    "add": lambda index: index.add(**ready(2, 5, "f")),
    "upsert": lambda index: index.upsert(**ready(2, 5, "d")),
    "delete": lambda index: index.delete("d7"),
    "compact": lambda index: index.compact(False),
}


@contextlib.contextmanager
def refused(path, match):
    """An error that names the file, and an index that stays as it is."""
    before = (path / METADATA).read_bytes()
    with pytest.raises(IndexFormatError, match=match):
        yield
    assert (path / METADATA).read_bytes() == before


# --- Opening and verify ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation": 1}, r"deleted-2\.npy is newer than 'change\.generation'"),
        ({"generation": 10**17}, r"'change\.generation' is missing or damaged"),
        ({"num_outliers": 10**6}, "num_outliers exceeds num_added_tokens"),
        ({"num_listed_documents": 51}, "num_listed_documents exceeds num_documents"),
    ],
)
def test_metadata_of_changes(path, change, message):
    edit(path, lambda fields: fields["change"].update(change))
    with pytest.raises(IndexFormatError, match=rf"metadata\.json: .*{message}"):
        Index.open(path)


@pytest.mark.parametrize(
    "name", ["../codes.npy", "residuals.npy", "codes-0.npy", "codes-7.npy\n", "codes-9.npy"]
)
def test_files_that_metadata_must_not_name(path, name):
    def change(fields):
        fields["change"]["files"]["codes"] = name
        fields["checksums"][name] = fields["checksums"].pop("codes.npy")

    fields = json.loads((path / METADATA).read_text())
    change(fields)
    (path / METADATA).write_text(json.dumps(fields))
    shutil.copyfile(path / "codes.npy", path / "codes-9.npy")
    with pytest.raises(IndexFormatError, match=r"metadata\.json: damaged"):
        Index.open(path)


def test_documents_without_centroids(path):
    """An index without any is one that begins: the first documents would replace it."""
    edit(path, lambda fields: fields.update(num_centroids=0))
    with pytest.raises(IndexFormatError, match=r"metadata\.json: damaged: 50 documents, but no c"):
        Index.open(path)


def test_numbers_without_ids(tmp_path):
    path = Index.build(tmp_path / "i", **ready(0, 20), num_centroids=16).delete("3").path
    edit(path, lambda fields: fields["change"].update(next_id=20))
    with pytest.raises(IndexFormatError, match=r"metadata\.json: .*next_id', but there are no ids"):
        Index.open(path)


@pytest.mark.parametrize("listed", [0, 39, 41, 50])
def test_lists_that_cover_other_documents(path, listed):
    edit(path, lambda fields: fields["change"].update(num_listed_documents=listed))
    with pytest.raises(IndexFormatError, match=r"lists\.npy: damaged: holds (other|a) document"):
        Index.open(path).verify()


@pytest.mark.parametrize("array", ["codes", "lists", "list_offsets"])
def test_right_checksums_of_wrong_values(path, array):
    """What no search need meet, `verify` does."""
    file = path / f"{array}.npy"
    rows = np.load(file, mmap_mode="r+")
    rows[5] = {"codes": 99, "lists": 39, "list_offsets": rows[4]}[array]
    del rows
    edit(path, lambda fields: None)
    name = "codes" if array == "codes" else "lists"
    with pytest.raises(IndexFormatError, match=rf"{name}\.npy: damaged: holds"):
        Index.open(path).verify()


def test_garbage_behind_what_counts(path):
    index = Index.open(path)
    query = unit_rows(np.random.default_rng(5), 4, DIM)[None]
    hits = index.search(query, 50, mode="exact")
    grown = [file for file in path.glob("*.npy") if file.name not in ("lists.npy",)]
    for file in grown:
        with file.open("ab") as stream:
            stream.write(b"\xff" * 4321)
    again = Index.open(path)
    again.verify()
    np.testing.assert_array_equal(again.search(query, 50, mode="exact").positions, hits.positions)
    after = again.add(**ready(2, 5, "f"))
    after.verify()
    assert after.position("f3") == 53


@pytest.mark.parametrize("array", ["codes", "residuals", "offsets", "pids"])
def test_cut_within_what_an_add_wrote(path, array):
    """The header still fits: it says what the file began with."""
    file = path / f"{array}.npy"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(IndexFormatError, match=rf"{array}\.npy: truncated"):
        Index.open(path)


def test_a_header_of_another_size(path):
    """A checksum covers a header of 128 bytes and the rows that count."""
    file = path / "codes.npy"
    data = file.read_bytes()
    padded = data[:8] + (182).to_bytes(2, "little") + data[10:127] + b" " * 64 + b"\n" + data[128:]
    file.write_bytes(padded)
    with pytest.raises(IndexFormatError, match=r"codes\.npy: damaged.*: a header of 192"):
        Index.open(path)


# --- Fields ---------------------------------------------------------------------------------


def test_a_lost_log_of_fields(path):
    """The file without its log is whole in itself; what was added last is missing."""
    index = Index.open(path)
    held = index._fields._connection
    held.execute("BEGIN")
    held.execute("SELECT count(*) FROM documents").fetchall()
    index.add(**ready(2, 5, "f", fields=years(5))).verify()
    copy = shutil.copytree(path, path.with_name("copy"))
    held.execute("COMMIT")
    Index.open(shutil.copytree(copy, path.with_name("other"))).verify()
    for end in ("wal", "shm"):
        (copy / f"fields.sqlite-{end}").unlink()
    with pytest.raises(IndexFormatError, match=r"fields\.sqlite: damaged: its checksum .*-wal"):
        Index.open(copy).verify()
    lost = Index.open(copy)
    with refused(copy, r"fields\.sqlite: damaged: its checksum differs"):
        lost.compact(False)
    more = lost.add(**ready(3, 5, "g", fields=years(5)))
    with pytest.raises(IndexFormatError, match=r"fields\.sqlite: damaged: its checksum differs"):
        more.verify()


def test_fields_of_another_state(path):
    shutil.copyfile(path / "fields.sqlite", path.with_name("earlier"))
    Index.open(path).add(**ready(2, 5, "f", fields=years(5)))
    for file in path.glob("fields*"):
        file.unlink()
    os.rename(path.with_name("earlier"), path / "fields.sqlite")
    with pytest.raises(IndexFormatError, match=r"fields\.sqlite: damaged: its checksum differs"):
        Index.open(path).verify()


def test_fields_without_a_checksum(path):
    """As indexes had them at first: they get one with the next change."""
    edit(path, lambda fields: fields["checksums"].pop("fields.sqlite"))
    after = Index.open(path).add(**ready(2, 5, "f", fields=years(5)))
    after.verify()
    assert "fields.sqlite" in after.metadata.checksums
    copied = after.delete("f0").compact(False)
    copied.verify()
    assert copied.metadata.fields in copied.metadata.checksums


def test_an_empty_file_of_fields_is_no_new_one(path):
    index = Index.open(path)
    for file in path.glob("fields*"):
        file.unlink()
    (path / "fields.sqlite").touch()
    with refused(path, r"fields\.sqlite: damaged"):
        index.add(**ready(2, 5, "f", fields=years(5)))
    (path / "fields.sqlite").unlink()
    before = (path / METADATA).read_bytes()
    with pytest.raises(FileNotFoundError, match=r"fields\.sqlite"):
        index.add(**ready(2, 5, "f", fields=years(5)))
    assert (path / METADATA).read_bytes() == before


# --- Changes of damaged indexes -------------------------------------------------------------


READ = {
    "add": ["centroids", "bucket_cutoffs", "bucket_weights", "pids", "pid_offsets", "deleted"],
    "upsert": ["centroids", "bucket_cutoffs", "bucket_weights", "pids", "pid_offsets", "deleted"],
    "delete": ["pids", "pid_offsets", "deleted"],
    "compact": ["codes", "residuals", "offsets", "pids", "pid_offsets", "deleted"],
}


@pytest.mark.parametrize(
    ("change", "array"), [(change, array) for change, arrays in READ.items() for array in arrays]
)
def test_what_is_made_of_damage_does_not_look_whole(path, change, array):
    """The damage may be such that nothing else is wrong with it."""
    index, file = Index.open(path), file_of(path, array)
    whole = file.read_bytes()
    shutil.copyfile(file, path / "copy")  # mapped bytes stay
    os.replace(path / "copy", file)
    if array == "deleted":  # as many, but others
        bits = np.unpackbits(np.frombuffer(whole[128:], np.uint8))
        file.write_bytes(whole[:128] + np.packbits(np.roll(bits, 2)).tobytes())
    else:
        flip(file)
    with refused(path, rf"{file.name}: (damaged|truncated)"):
        CHANGES[change](index)
    file.write_bytes(whole)
    CHANGES[change](Index.open(path)).verify()


def test_damage_elsewhere_stays_known(path):
    flip(path / "residuals.npy")
    for name in ("add", "upsert", "delete"):
        after = CHANGES[name](Index.open(path))
        with pytest.raises(IndexFormatError, match=r"residuals\.npy: damaged: its checksum"):
            after.verify()


@pytest.mark.parametrize("array", ["lists", "list_offsets", "codes", "offsets"])
def test_lists_that_are_joined(path, array, monkeypatch):
    monkeypatch.setattr(changes, "_UNLISTED", 0)
    monkeypatch.setattr(changes, "_UNLISTED_SHARE", 1 << 30)
    file = path / f"{array}.npy"
    rows = np.load(file, mmap_mode="r+")
    rows[5] = rows[4]
    del rows
    with refused(path, rf"{array}\.npy: damaged"):
        CHANGES["add"](Index.open(path))


@pytest.mark.parametrize("change", ["add", "upsert", "delete", "compact"])
def test_edited_metadata_are_not_made_right(path, change):
    fields = json.loads((path / METADATA).read_text())
    fields["settings"]["seed"] += 1
    (path / METADATA).write_text(json.dumps(fields))
    index = Index.open(path)
    with refused(path, r"metadata\.json: damaged: its checksum differs"):
        CHANGES[change](index)


def test_settings_of_a_wrong_type(path):
    edit(path, lambda fields: fields["settings"].update(kmeans_niters={}))
    with refused(path, r"metadata\.json: field 'settings' is damaged: kmeans_niters must be int"):
        CHANGES["add"](Index.open(path))


@pytest.mark.parametrize("next_id", [0, 19])
def test_numbers_that_are_given_already(tmp_path, next_id):
    index = Index.build(tmp_path / "i", **ready(0, 20), num_centroids=16).delete("3")
    index = index.compact(False)
    assert index.metadata.change.next_id == 20
    edit(index.path, lambda fields: fields["change"].update(next_id=next_id))
    with refused(index.path, r"metadata\.json: damaged: 'change\.next_id' is \d+, the last id is"):
        Index.open(index.path).add(**ready(1, 3))


@pytest.mark.parametrize("kind", ["cut", "header", "pipe", "missing"])
def test_files_damaged_since_they_were_opened(path, kind):
    index, file = Index.open(path), path / "residuals.npy"
    data = file.read_bytes()
    file.unlink()
    if kind == "cut":
        file.write_bytes(data[:-1])
    elif kind == "header":
        file.write_bytes(data.replace(b"|u1", b"|i1"))
    elif kind == "pipe":
        os.mkfifo(file)
    with refused(path, r"residuals\.npy"):
        CHANGES["add"](index)


@pytest.mark.parametrize("change", CHANGES)
def test_what_links_lead_to_stays(path, change):
    aside = path.with_name("aside")
    shutil.copytree(path, aside)
    for file in list(path.iterdir()):
        if file.suffix in (".npy", ".sqlite"):
            file.unlink()
            file.symlink_to(aside / file.name)
    before = {file.name: file.read_bytes() for file in aside.glob("*.npy")}
    after = CHANGES[change](Index.open(path))
    after.verify()
    assert {file.name: file.read_bytes() for file in aside.glob("*.npy")} == before
    Index.open(aside).verify()
    with contextlib.closing(FieldStore(aside / "fields.sqlite", 100)) as store:
        assert store.fields(49) == {"year": 2009} and not store.fields(52)


def test_a_folder_with_the_name_of_a_former_file(path):
    (path / "lists-1.npy").mkdir()
    after = CHANGES["delete"](Index.open(path))
    assert len(after) == 47


def test_texts_that_are_encoded_again(tmp_path):
    checkpoint = write_stanford(tmp_path / "model", {"num_hidden_layers": 1})
    retriever = Retriever.build(
        tmp_path / "i", checkpoint, ["a river", "a bird"] * 9, num_centroids=16, progress=False
    )
    before = (retriever.index.path / METADATA).read_bytes()
    flip(retriever.index.path / "texts.npy")
    with pytest.raises(IndexFormatError, match=r"texts\.npy: damaged: its checksum differs"):
        retriever.compact(retrain=True, progress=False)
    assert (retriever.index.path / METADATA).read_bytes() == before
