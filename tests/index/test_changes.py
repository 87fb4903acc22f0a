"""An index that is changed: what it holds after, what others see meanwhile, what a kill leaves."""

import itertools
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from campaigns.living_index import Killed, dying_after
from support import unit_rows

from colbert_jax import Index
from colbert_jax.index import changes, sources
from colbert_jax.index import format as fmt
from colbert_jax.index.columns import DuplicateIdError, UnknownIdError

DIM = 16


def ready(seed, n, **others):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, n)
    return dict(embeddings=unit_rows(rng, lengths.sum(), DIM), lengths=lengths, **others)


def named(seed, n, prefix="d"):
    return ready(seed, n, ids=[f"{prefix}{i}" for i in range(n)])


@pytest.fixture
def index(tmp_path):
    return Index.build(tmp_path / "i", **named(0, 40), nbits=4, num_centroids=16)


@pytest.fixture
def often(monkeypatch):
    """Lists on disk are made again at every change."""
    monkeypatch.setattr(changes, "_UNLISTED", 0)
    monkeypatch.setattr(changes, "_UNLISTED_SHARE", 1 << 30)


def left(path):
    """What lies beside an index."""
    return sorted(file.name for file in path.parent.iterdir() if file != path)


def answers(index, seed=99, k=12):
    """Ids and scores of exact search; scores rounded, so that equal ones are in order of ids."""
    queries = unit_rows(np.random.default_rng(seed), 5 * 4, DIM).reshape(5, 4, DIM)
    hits = index.search(queries, k, mode="exact")
    return [
        [(index.ids[p], round(float(s), 5)) for p, s in zip(positions, scores, strict=True)]
        for positions, scores in zip(hits.positions, hits.scores, strict=True)
    ]


def state(index):
    """All that an index holds, by id: no code ever changes its meaning."""
    arrays, offsets = index.arrays, index._files["offsets"]
    return {
        index.ids[i]: arrays.codes[offsets[i] : offsets[i + 1]].tobytes()
        + arrays.residuals[offsets[i] : offsets[i + 1]].tobytes()
        for i in np.flatnonzero(~index.deleted).tolist()
    }


# --- What changes do ---------------------------------------------------------------------


def test_add(index, tmp_path):
    before, known = answers(index), state(index)
    more = named(1, 10, "e")
    after = index.add(**more)
    assert len(after) == 50 and len(index) == 40 and index.refresh().metadata == after.metadata
    assert answers(index) == before  # who has it open keeps it
    assert state(after).items() >= known.items()
    offsets = np.r_[0, np.cumsum(more["lengths"])]
    for i in range(10):
        own = more["embeddings"][offsets[i] : offsets[i + 1]]
        hits = after.search(own[None], 1, mode="exact")
        assert after.ids[hits.positions[0, 0]] == f"e{i}"
        stored = after.document_embeddings(after.position(f"e{i}"))
        assert ((stored * own).sum(axis=1) > 0.9).all()
    after.verify()
    assert left(index.path) == []


def test_plaid_finds_what_was_added(index, often):
    """By its lists on disk, and by those made on opening: the same."""
    listed = index.add(**named(1, 30, "e"))
    assert listed.metadata.change.num_listed_documents == 70
    queries = unit_rows(np.random.default_rng(3), 24, DIM).reshape(6, 4, DIM)
    for one in (listed, listed.compact()):
        wide = one.search(queries, 70, ncells=16)
        exact = one.search(queries, 70, mode="exact")
        np.testing.assert_array_equal(wide.positions, exact.positions)


def test_lists_on_disk_and_in_memory(index, monkeypatch):
    queries = unit_rows(np.random.default_rng(3), 24, DIM).reshape(6, 4, DIM)
    shutil.copytree(index.path, index.path.with_name("j"))
    recent = index.add(**named(1, 30, "e"))
    assert recent.metadata.change.num_listed_documents == 40
    monkeypatch.setattr(changes, "_UNLISTED", 0)
    listed = Index.open(index.path.with_name("j")).add(**named(1, 30, "e"))
    assert listed.metadata.change.num_listed_documents == 70
    for mode in ("fast", "accurate"):
        for k in (1, 10):
            a, b = (one.search(queries, k, mode=mode) for one in (recent, listed))
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_array_equal(a.scores, b.scores)


def test_delete(index):
    gone = ["d3", "d0", "d39"]
    after = index.delete(gone)
    assert len(after) == 37 and len(index) == 40
    assert state(after).items() == {i: v for i, v in state(index).items() if i not in gone}.items()
    found = {id for row in answers(after, k=100) for id, _ in row}
    assert found == set(state(after))
    with pytest.raises(UnknownIdError, match=r"'d3'"):
        after.position("d3")
    with pytest.raises(UnknownIdError, match=r"has no document ids 'd3', 'x'$"):
        after.delete(["d1", "d3", "x"])
    assert len(after.refresh()) == 37
    assert len(after.delete("d1")) == 36  # one id, as a string
    after.refresh().verify()


def test_update_and_upsert(index):
    more = named(1, 10)
    with pytest.raises(UnknownIdError, match="'x'"):
        index.update(**(more | {"ids": ["x", *more["ids"][1:]]}))
    updated = index.update(**more)
    assert len(updated) == 40 and len(updated.ids) == 50
    assert updated.position("d3") == 43
    assert state(updated)["d3"] != state(index)["d3"] and state(updated)["d20"]
    both = updated.upsert(**(named(2, 4) | {"ids": ["d1", "x", "d39", "y"]}))
    assert len(both) == 42 and set(state(both)) == {f"d{i}" for i in range(40)} | {"x", "y"}
    again = both.delete("x").add(**(named(3, 1) | {"ids": ["x"]}))
    assert again.position("x") == 54
    again.verify()
    assert left(index.path) == []


def test_duplicate_ids_are_refused_before_anything_is_read(index, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("encoded")

    monkeypatch.setattr(sources.EmbeddingSource, "encode", fail)
    with pytest.raises(DuplicateIdError, match=r"already has the document ids 'd0', .* and 5 more"):
        index.add(**named(1, 10))
    with pytest.raises(DuplicateIdError, match="duplicate document id 'x'"):
        index.add(**(named(1, 2) | {"ids": ["x", "x"]}))
    with pytest.raises(ValueError, match="ids of their own: give pairs"):
        index.add(**ready(1, 2))
    with pytest.raises(ValueError, match="update replaces documents by their ids"):
        index.update(**ready(1, 2))
    with pytest.raises(ValueError, match="16 dimensions, these have 4"):
        index.add(embeddings=np.eye(4, dtype=np.float32), lengths=[4])
    assert index.refresh() is index and left(index.path) == []


def test_numbers_as_ids(tmp_path):
    """Positions, as long as nothing moves; then they stay the documents' own."""
    index = Index.build(tmp_path / "i", **ready(0, 10), num_centroids=8)
    index = index.add(**ready(1, 5))
    assert list(index.ids) == [str(i) for i in range(15)] and "pid" not in index.metadata.columns
    known = state(index)
    index = index.delete(["3", "14"]).compact()
    assert list(index.ids) == [str(i) for i in range(14) if i != 3]
    index = index.add(**ready(2, 2))  # no number is given twice
    assert list(index.ids)[-2:] == ["15", "16"]
    assert state(index).items() >= {i: v for i, v in known.items() if i not in ("3", "14")}.items()
    index = index.upsert(**ready(3, 2, ids=["x", "5"]))
    with pytest.raises(ValueError, match="ids of their own"):
        index.add(**ready(1, 2))
    index.verify()


def test_own_ids_beside_numbers(tmp_path):
    index = Index.build(tmp_path / "i", **ready(0, 10), num_centroids=8)
    index = index.upsert(**ready(1, 3, ids=["a", "7", "b"]))
    assert len(index) == 12 and index.position("7") == 11 and index.ids[7] == "7"
    index.verify()


def test_compact(index, often):
    changed = index.add(**named(1, 30, "e")).delete([f"d{i}" for i in range(0, 40, 2)])
    changed = changed.update(**named(2, 10, "e"))
    compact = changed.compact()
    assert state(compact) == state(changed) and answers(compact) == answers(changed)
    assert compact.metadata.num_deleted == 0 and len(compact.ids) == len(compact) == 50
    assert sum(f.stat().st_size for f in compact.path.iterdir()) < 14_000
    assert compact.compact() is compact  # nothing to do
    compact.verify()
    for name in ("codes", "residuals", "offsets"):  # a whole `.npy` file again
        file = compact.path / compact.metadata.file(name)
        np.testing.assert_array_equal(np.load(file), compact._files[name])


def test_from_nothing_and_back(tmp_path):
    from support import passages, write_stanford

    from colbert_jax import ColBERT, Retriever

    model = ColBERT.from_pretrained(write_stanford(tmp_path / "m"))
    retriever = Retriever.build(tmp_path / "i", model, [])
    assert len(retriever) == 0 and retriever.search("anything") == []
    retriever.index.verify()
    retriever.add([])
    with pytest.raises(KeyError, match="'a'"):
        retriever.delete("a")
    texts = passages(30)
    retriever.add([(f"a{i}", text) for i, text in enumerate(texts)])
    assert retriever.search(texts[3], k=1)[0].id == "a3"
    assert Retriever.open(tmp_path / "i", model).search(texts[3], k=1)[0].text == texts[3]
    retriever.delete([f"a{i}" for i in range(30)])
    assert len(retriever) == 0 and retriever.search("anything") == []
    retriever.compact()
    assert len(retriever) == 0 and retriever.search("anything") == []
    retriever.index.verify()
    retriever.add({"b": texts[4], "a3": texts[5]})
    assert [hit.id for hit in retriever.search(texts[5], k=2)] == ["a3", "b"]
    other = Retriever.open(tmp_path / "i", model)
    retriever.update([("b", texts[6])])
    assert not retriever.refresh() and other.refresh() and not other.refresh()
    assert other.index.text("b") == texts[6]
    assert {hit.text for hit in other.search(texts[6], k=2)} == {texts[5], texts[6]}
    retriever.compact(retrain=True)
    assert {hit.id for hit in retriever.search(texts[6], k=9)} == {"a3", "b"}
    assert other.refresh() and other.index.text("b") == texts[6]
    assert left(tmp_path / "i") == ["m"]


def test_documents_of_another_kind_need_new_centroids(tmp_path):
    """Far from all centroids, new ones are trained on them; near, none are."""
    rng = np.random.default_rng(0)

    def around(centre, n):
        rows = centre + 0.3 * unit_rows(rng, n * 8, 32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return dict(embeddings=rows.astype(np.float32), lengths=np.full(n, 8))

    here, there = unit_rows(rng, 2, 32)
    index = Index.build(tmp_path / "i", **around(here, 200), nbits=2, num_centroids=64)
    assert 0.1 < index.metadata.outlier_distance < 0.6
    same = index.add(**around(here, 50))
    assert same.metadata.num_centroids == 64
    assert same.metadata.change.num_outliers < 0.2 * 400
    other = same.add(**around(there, 50))
    assert other.metadata.num_centroids > 70
    assert other.metadata.change.num_listed_centroids == 64
    assert other.metadata.change.num_outliers - same.metadata.change.num_outliers < 0.5 * 400
    stored = np.concatenate([other.document_embeddings(i) for i in range(250, 300)])
    rng = np.random.default_rng(0)
    unit_rows(rng, 2, 32)
    assert np.linalg.norm(stored, axis=1).max() < 1.001
    other.verify()
    queries = around(there, 3)["embeddings"].reshape(3, 8, 32)
    for one in (other, other.compact()):
        assert (one.search(queries, 5).positions >= 250).all()


def test_many_small_adds_bring_as_many_centroids_as_a_large_one():
    """Up to 16 sqrt(T), no more for each token than there are, and no remainder is lost."""

    def grown(tokens, centroids, adds, size, settings=None):
        rng = np.random.default_rng(0)
        for _ in range(adds):
            known = SimpleNamespace(
                num_tokens=tokens, num_centroids=centroids, settings=settings or {}
            )
            distances = rng.uniform(0, 1, size)
            count, rows = changes._new_centroids(known, distances, 0.9, 1.0)
            assert not count or distances[rows].min() >= np.median(distances)
            tokens, centroids = tokens + size, centroids + count
        return centroids

    # An index as built, with the power of two below 16 sqrt(T): no sudden doubling.
    assert 8192 * 1.09 < grown(1_000_000, 8192, 1, 100_000) < 8192 * 1.1 + 1
    assert 8192 * 1.09 < grown(1_000_000, 8192, 1000, 100) < 8192 * 1.11
    assert 8192 * 1.08 < grown(1_000_000, 8192, 5000, 20) < 8192 * 1.12  # 0.16 an add
    # One that has 16 sqrt(T).
    full = 16_000
    assert grown(1_000_000, full, 1, 210_000) == 17_600
    assert abs(grown(1_000_000, full, 2100, 100) - 17_600) < 10
    # One whose number was chosen; one that has more, because it was larger.
    assert grown(1_000_000, 8192, 1, 100_000, {"num_centroids": 8192}) < 8210
    assert grown(100_000, 8192, 1, 1000) < 8195


def test_a_copy_by_hard_links_stays_as_it_is(index):
    copy = index.path.with_name("copy")
    shutil.copytree(index.path, copy, copy_function=os.link)
    before, kept = answers(index), {f.name: f.read_bytes() for f in copy.iterdir()}
    after = index.add(**named(1, 10, "e")).add(**named(2, 10, "f"))
    assert {f.name: f.read_bytes() for f in copy.iterdir()} == kept
    other = Index.open(copy).add(**named(3, 5, "g"))
    for one, number in ((after, 60), (other, 45)):
        one.verify()
        assert len(one.refresh()) == number
    assert answers(other.delete([f"g{i}" for i in range(5)])) == before


def test_an_index_whose_centroids_have_another_name_is_replaced(index, monkeypatch):
    """As after an add to a copy by hard links that brings new ones."""
    copy = index.path.with_name("copy")
    shutil.copytree(index.path, copy, copy_function=os.link)
    monkeypatch.setattr(changes, "_new_centroids", lambda *_: (2, np.arange(10)))
    Index.open(copy).add(**named(1, 10, "e"))
    assert not (copy / "centroids.npy").exists()
    with pytest.raises(FileExistsError, match="an index is there; pass overwrite=True"):
        Index.build(copy, **ready(2, 5))
    assert len(Index.build(copy, **ready(2, 5), overwrite=True)) == 5


def test_an_index_of_version_one(index):
    """What a build writes opens as ever, and is changed in place by the first change."""
    fields = json.loads((index.path / "metadata.json").read_text())
    assert fields["format_version"] == 1
    # As builds of former releases were.
    del fields["outlier_distance"], fields["checksums"]["metadata.json"]
    (index.path / "metadata.json").write_text(json.dumps(fields))
    old = Index.open(index.path)
    after = old.add(**named(1, 10, "e"))
    after.verify()
    assert json.loads((index.path / "metadata.json").read_text())["format_version"] == 2
    assert after.metadata.num_centroids < 32


# --- Others beside it, and kills ------------------------------------------------------------


def test_one_writer_at_a_time(index, monkeypatch):
    def add_too(*_):
        with pytest.raises(RuntimeError, match="another process is building or changing"):
            index.add(**named(2, 5, "f"))
        with pytest.raises(RuntimeError, match="another process is building or changing"):
            index.delete("d1")
        with pytest.raises(RuntimeError, match="another process is building or changing"):
            Index.build(index.path, **named(2, 5, "f"), overwrite=True)
        return original(*_)

    original = changes._extended
    monkeypatch.setattr(changes, "_extended", add_too)
    assert len(index.add(**named(1, 10, "e"))) == 50
    assert left(index.path) == []


OPERATIONS = {
    "add": lambda index: index.add(**named(1, 10, "e")),
    "upsert": lambda index: index.upsert(**named(1, 10)),
    "delete": lambda index: index.delete([f"d{i}" for i in range(0, 40, 3)]),
    "compact": lambda index: index.compact(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_killed_at_every_step(index, tmp_path, monkeypatch, often, name):
    """At the nth write, sync, rename or removal: the state before or after; the rerun finishes."""
    change = OPERATIONS[name]
    start = index.add(**named(5, 7, "x")).delete(["d1", "x3"])
    before, path = state(start), tmp_path / "k"
    monkeypatch.setattr(sources, "CHUNK_TOKENS", 20)

    def copy():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(start.path, path)
        return Index.open(path)

    after = state(change(copy()))
    assert name == "compact" or before != after

    for step in itertools.count(1):
        reader = copy()
        try:
            with dying_after(step):
                change(reader)
            break
        except Killed:
            pass
        assert state(reader) == before  # it was open
        found = state(Index.open(path))
        assert found in (before, after), step
        try:
            again = change(Index.open(path))
        except (UnknownIdError, DuplicateIdError):
            assert found == after and not list(path.parent.glob(".k.*/build.json")), step
        else:
            assert state(again) == after, step
        Index.open(path).verify()
        assert left(path) == ["i"], step
    assert step > 12 and state(Index.open(path)) == after


# --- Fields ---------------------------------------------------------------------------------


def with_fields(seed, n, prefix, year):
    values = named(seed, n, prefix)
    return values | {"fields": [{"year": year + i, "of": prefix} for i in range(n)]}


def test_fields_go_with_their_documents(tmp_path, often):
    index = Index.build(tmp_path / "i", **with_fields(0, 20, "d", 2000), num_centroids=8)
    queries = unit_rows(np.random.default_rng(3), 4, DIM)[None]

    def found(one, where, **others):
        return {one.ids[p] for p in one.search(queries, 100, where=where, **others).positions[0]}

    assert found(index, {"year": {"lt": 2003}}) == {"d0", "d1", "d2"}
    more = index.add(**with_fields(1, 10, "e", 2000)).add(**named(2, 3, "f"))
    both = {"d0", "d1", "d2", "e0", "e1", "e2"}
    assert found(more, {"year": {"lt": 2003}}) == both
    assert found(index, {"year": {"lt": 2003}}) == {"d0", "d1", "d2"}  # as it was opened
    assert found(more, {"of": {"exists": False}}) == {"f0", "f1", "f2"}
    assert found(more, {"of": "e"}, ids=["e1", "d1", "f1"]) == {"e1"}
    fewer = more.delete(["d1", "e0"])
    assert found(fewer, {"year": {"lt": 2003}}) == both - {"d1", "e0"}
    changed = fewer.update(**(named(3, 1) | {"ids": ["d2"], "fields": [{"year": 1999, "of": "d"}]}))
    assert changed.fields("d2") == {"year": 1999, "of": "d"} and more.fields("d2")["year"] == 2002
    for one in (changed, changed.compact()):
        assert found(one, {"year": {"lt": 2001}}) == {"d0", "d2"}
        assert one.fields("e5") == {"year": 2005, "of": "e"} and one.fields("f1") == {}
        one.verify()
    assert found(more, {"year": {"lt": 2003}}) == both  # its file is gone
    assert changed.refresh().field_names() == {"of": ["string"], "year": ["number"]}
    with pytest.raises(ValueError, match="no document has a field 'yaer'"):
        index.search(queries, where={"yaer": 2000})


def test_the_first_fields_come_with_an_add(index):
    with pytest.raises(ValueError, match="documents have no fields"):
        index.search(unit_rows(np.random.default_rng(0), 2, DIM)[None], where={"year": 2000})
    more = index.add(**with_fields(1, 3, "e", 2000))
    assert more.fields("e2") == {"year": 2002, "of": "e"} and more.fields("d0") == {}
    gone = more.delete(["e0", "e1", "e2"]).compact()
    assert gone.metadata.fields is None and gone.fields("d0") == {}
    assert not list(index.path.glob("*.sqlite*"))


def test_fields_that_a_killed_add_has_left(index, monkeypatch):
    """They are not taken for those of the next documents at these places."""
    index = index.add(**with_fields(5, 2, "x", 1990))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fmt, "replace_metadata", lambda *_: (_ for _ in ()).throw(Killed))
        index.add(**with_fields(1, 10, "e", 2000))
    after = Index.open(index.path).add(**named(2, 10, "f"))
    assert [after.fields(f"f{i}") for i in range(10)] == [{}] * 10
    after.verify()
