"""Ids and texts: written in one pass, found by position and by id."""

import threading

import numpy as np
import pytest
from support import unit_rows

from colbert_jax import Index
from colbert_jax.index.columns import Strings, write_documents, write_fields
from colbert_jax.index.fields import FIELDS, FieldStore
from colbert_jax.index.index import UnknownIdError
from colbert_jax.index.sources import EmbeddingSource, TextSource
from colbert_jax.processes import Group


def files(path):
    return {f.name: f.read_bytes() for f in path.iterdir() if f.name != "metadata.json"}


def test_pairs_are_texts_with_their_ids(tmp_path, model, texts):
    ids = [f"doc-{n}" for n in range(len(texts))]
    read = []

    def pairs():
        for pair in zip(ids, texts, strict=True):
            read.append(pair)
            yield pair

    one = Index.build(tmp_path / "one", model, pairs())
    two = Index.build(tmp_path / "two", model, texts, ids=ids)
    assert len(read) == len(texts)
    assert list(one.ids) == ids and list(one.texts) == texts
    assert files(one.path) == files(two.path)
    bare = Index.build(tmp_path / "bare", model, [[n, t] for n, t in enumerate(texts)])
    assert bare.ids[7] == "7" and not (bare.path / "pids.npy").exists()


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([("a", "x"), "y"], TypeError, r"document 1 is a string, but document 0 is a pair"),
        (["x", ("a", "y")], TypeError, r"document 1 is a pair .*, but document 0 is a string"),
        ([("a", "x"), ("b", None)], TypeError, r"document 1 \(id 'b'\): its text must be a string"),
        ([("a", "x", "y")], TypeError, "document 0 must be a string or a pair .*, got tuple"),
        ([("a", "x"), ("b", "\ud800")], ValueError, "document 1 is not valid Unicode"),
        ([("a", "x"), ("\ud800", "y")], ValueError, "the id of document 1 is not valid Unicode"),
        ([("a", "x"), ("b", "y"), ("a", "z")], ValueError, "duplicate .* 'a': documents 1 and 3"),
        ([(1, "x"), ("1", "y")], ValueError, "duplicate document id '1'"),
    ],
)
def test_bad_documents(tmp_path, model, monkeypatch, documents, error, message):
    def encode_windows(self, windows, bar=None):
        raise AssertionError("a document was encoded")

    monkeypatch.setattr(type(model), "encode_windows", encode_windows)
    with pytest.raises(error, match=message):
        Index.build(tmp_path / "i", model, documents)
    assert list(tmp_path.iterdir()) == []


def test_ids_given_twice(tmp_path, model):
    with pytest.raises(TypeError, match="so ids= must be left out"):
        Index.build(tmp_path / "i", model, [("a", "x")], ids=["a"])
    assert list(tmp_path.iterdir()) == []


def with_ids(path, ids):
    rng = np.random.default_rng(0)
    n = 30
    return Index.build(path, embeddings=unit_rows(rng, n, 8), lengths=[1] * n, ids=ids, nbits=4)


def test_position(tmp_path):
    ids = ["", "é", "a", "aa", "5", "05", "a b", "\u0000", *(f"{n}" * n for n in range(6, 28))]
    index = with_ids(tmp_path / "i", ids)
    assert [index.position(i) for i in ids] == list(range(30))
    assert all(index.ids[index.position(i)] == i for i in ids)
    for unknown in ("aaa", "29", "\ud800"):
        with pytest.raises(KeyError) as caught:
            index.position(unknown)
        assert isinstance(caught.value, UnknownIdError)
        assert str(caught.value) == f"{tmp_path / 'i'}: no document has the id {unknown!r}"
    with pytest.raises(TypeError, match="id is a string, got 5"):
        index.position(5)


def test_position_without_ids_of_its_own(tmp_path):
    index = with_ids(tmp_path / "i", None)
    assert [index.position(str(n)) for n in range(30)] == list(range(30))
    for unknown in ("30", "-1", "05", "+5", " 5", "5.0", "", "²", "٣", "9" * 5000):
        with pytest.raises(UnknownIdError, match="no document has the id"):
            index.position(unknown)


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_equal_hashes_are_told_apart(tmp_path, monkeypatch, block):
    monkeypatch.setattr("colbert_jax.index.columns._HASHED", block)
    monkeypatch.setattr("colbert_jax.index.columns.hash", len, raising=False)
    words = ["", "a", "bb", "cc", "dd", "e", "fff", "cc2"]
    encoded = [word.encode() for word in words]
    offsets = np.cumsum([0, *map(len, encoded)])
    column = Strings(tmp_path, "pid", np.frombuffer(b"".join(encoded), np.uint8), offsets)
    assert [column.position(word) for word in words] == list(range(8))
    assert column.position("ee") is None and column.position("ffff") is None


def test_position_from_several_threads(tmp_path):
    index = with_ids(tmp_path / "i", [f"d{n}" for n in range(30)])
    found, start = [], threading.Barrier(8)

    def look():
        start.wait()
        found.append([index.position(f"d{n}") for n in range(30)])

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(30))] * 8


RECORDS = [("a", "x", {"n": 1}), ("b", "y"), ["c", "z", {}], (4, "", {"tags": ["t"]})]


def fields_of(folder, n):
    store = FieldStore(folder / FIELDS, n)
    found = [store.fields(i) for i in range(n)]
    store.close()
    return found


def test_fields_are_written_beside_the_texts(tmp_path):
    (tmp_path / FIELDS).write_text("left by a killed run")
    written = write_documents(tmp_path, iter(RECORDS))
    assert written.has_fields and written.num_documents == 4
    assert fields_of(tmp_path, 4) == [{"n": 1}, {}, {}, {"tags": ["t"]}]
    apart = tmp_path / "apart"
    apart.mkdir()
    given = [{"n": 1}, None, {}, {"tags": ["t"]}]
    pairs = [(one[0], one[1]) for one in RECORDS]
    assert write_documents(apart, pairs, fields=iter(given)) == written
    without = write_documents(apart, pairs)
    assert not without.has_fields and not (apart / FIELDS).exists()
    assert without == write_documents(apart, [(*pair, {}) for pair in pairs])
    assert written.fingerprint != without.fingerprint
    changed = [*RECORDS[:3], (4, "", {"tags": ["u"]})]
    assert write_documents(apart, changed).fingerprint != written.fingerprint


def test_fields_of_texts_without_ids(tmp_path):
    written = write_documents(tmp_path, ["x", (None, "y", {"n": 1}), "z"])
    assert written.ids.num_bytes is None and fields_of(tmp_path, 3) == [{}, {"n": 1}, {}]
    again = write_documents(tmp_path, [(None, "y", {"n": 1}), "z"], ids=["a", "b"])
    assert again.ids.num_bytes == 2 and fields_of(tmp_path, 2) == [{"n": 1}, {}]


@pytest.mark.parametrize(
    ("documents", "fields", "error", "message"),
    [
        (
            [("a", "x"), ("b", "y", {"v": [1]})],
            None,
            TypeError,
            r"document 1 \(id 'b'\): field 'v'",
        ),
        (["x", (None, "y", {"v": [1]})], None, TypeError, r"document 1: field 'v'"),
        ([("a", "x", {"n": 1}), (None, "y", {})], None, TypeError, "document 1 is a string, but"),
        ([("a", "x", {"n": 1})], [{"n": 2}], TypeError, "fields= must be left out"),
        (["x", "y"], [{"n": 2}], ValueError, "fields= has fewer entries .*: 1 fit"),
        (["x"], [{"n": 2}, None], ValueError, "fields= has more entries .*: 1 fit"),
    ],
)
def test_bad_fields(tmp_path, documents, fields, error, message):
    with pytest.raises(error, match=message):
        write_documents(tmp_path, documents, fields=fields)
    assert not (tmp_path / FIELDS).exists()


def test_fields_beside_ready_embeddings(tmp_path):
    assert write_fields(tmp_path, None, 3) is None
    assert write_fields(tmp_path, [None, {}, {"a": None}], 3) is None
    assert list(tmp_path.iterdir()) == []
    first = write_fields(tmp_path, iter([None, {"a": 1}]), 2)
    assert first is not None and fields_of(tmp_path, 2) == [{}, {"a": 1}]
    assert write_fields(tmp_path, [{"a": 1}, None], 2) != first
    with pytest.raises(ValueError, match="fields= has 2 entries for 3 documents"):
        write_fields(tmp_path, [{"a": 1}, None], 3)
    assert list(tmp_path.iterdir()) == []


def test_sources_say_whether_there_are_fields(tmp_path, model):
    rows = unit_rows(np.random.default_rng(0), 4, 8)
    fingerprints = set()
    for n, fields in enumerate((None, [None, {"a": 1}], [None, {"a": 2}])):
        folder = tmp_path / str(n)
        folder.mkdir()
        source = EmbeddingSource(rows, [2, 2], fields=fields)
        source.prepare(folder, Group(), False)
        assert source.has_fields == (folder / FIELDS).exists() == (fields is not None)
        texts = TextSource(model, ["a", "b"], fields=fields)
        texts.prepare(folder, Group(), False)
        assert texts.has_fields == (folder / FIELDS).exists() == (fields is not None)
        fingerprints |= {source.fingerprint, texts.fingerprint}
    assert len(fingerprints) == 6
