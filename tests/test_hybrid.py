"""BM25 beside late interaction: one ranking of both, and BM25 that goes along with its index."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from colbert_jax import Hybrid, Index, Retriever
from colbert_jax.bm25 import Bm25, best, split_words
from colbert_jax.cli import main
from colbert_jax.fusion import as_hybrid, reciprocal_rank_fusion, relative_score_fusion
from colbert_jax.index import lexical

bm25s = pytest.importorskip("bm25s", reason='needs pip install "colbert-jax[hybrid]"')
pytest.importorskip("Stemmer", reason='needs pip install "colbert-jax[hybrid]"')

TEXTS = [
    "The river flows past the old bank",
    "A bank lends money",
    "Cats run, dogs run after cats",
    "",
    "the of and",
    "Money, money, money in the bank",
]
RECORDS = [{"id": f"d{n}", "text": text, "year": n} for n, text in enumerate(TEXTS)]


@pytest.fixture
def retriever(model, tmp_path) -> Retriever:
    return Retriever.build(tmp_path / "i", model, RECORDS, bm25=True, progress=False)


# --- Scores ---


def test_scores_are_lucenes():
    """Against the formula: idf * tf * (k1 + 1)/(tf + k1 * (1 - b + b * length / mean)), where
    Lucene leaves the constant k1 + 1 out."""
    words = split_words(TEXTS)
    assert words[5] == ["money", "money", "money", "bank"] and words[3] == words[4] == []
    mean = np.mean([len(row) for row in words])
    expected = np.zeros(len(TEXTS))
    for term in ("money", "bank"):
        holders = sum(term in row for row in words)
        idf = np.log(1 + (len(words) - holders + 0.5) / (holders + 0.5))
        for n, row in enumerate(words):
            tf = row.count(term)
            expected[n] += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(row) / mean))
    made = Bm25.of(TEXTS)
    np.testing.assert_allclose(made.scores("Money in a bank"), expected, rtol=1e-6)
    assert best(made.scores("Money in a bank"), 5).tolist() == [5, 1, 0]
    for nothing in ("", "the of", "zebra"):
        assert not made.scores(nothing).any()
    assert Bm25.of(["", "the"]).scores("bank").tolist() == [0, 0]


def test_best_breaks_ties_by_place():
    scores = np.array([1, 3, 0, 1, 3, 1], np.float32)
    assert best(scores, 9).tolist() == [1, 4, 0, 3, 5]
    assert best(scores, 3).tolist() == [1, 4, 0]
    assert best(scores, 3, np.array([0, 0, 1, 1, 1, 1], bool)).tolist() == [4, 3, 5]


# --- Fusion ---


def test_reciprocal_ranks_by_hand():
    positions, scores = reciprocal_rank_fusion([np.array([7, 2]), np.array([2, 9])], (0.5, 0.5), 60)
    assert positions.tolist() == [2, 7, 9]
    np.testing.assert_allclose(scores, [0.5 / 62 + 0.5 / 61, 0.5 / 61, 0.5 / 62])
    alone = reciprocal_rank_fusion([np.array([7, 2]), np.array([], int)], (1, 0))
    assert alone[0].tolist() == [7, 2]
    equal = reciprocal_rank_fusion([np.array([9]), np.array([4])], (0.5, 0.5))
    assert equal[0].tolist() == [4, 9]  # by the position


def test_relative_scores_by_hand():
    rankings = [np.array([7, 2, 5]), np.array([2, 9])]
    positions, scores = relative_score_fusion(
        rankings, [np.array([30.0, 25.0, 20.0]), np.array([4.0, 4.0])], (0.75, 0.25)
    )
    assert dict(zip(positions.tolist(), scores.tolist(), strict=True)) == pytest.approx(
        {7: 0.75, 2: 0.75 * 0.5 + 0.25, 5: 0.0, 9: 0.25}
    )
    assert positions.tolist() == [7, 2, 9, 5]


def test_what_hybrid_may_be():
    assert as_hybrid(None) is as_hybrid(False) is None
    assert as_hybrid(True) == as_hybrid("rrf") == Hybrid()
    for bad, match in (
        ("both", "hybrid must be one of"),
        (Hybrid(bm25_weight=1.5), "bm25_weight must be from 0 to 1"),
        (Hybrid(bm25_weight=float("nan")), "bm25_weight must be from 0 to 1"),
        (Hybrid(depth=0), "depth must be"),
        (Hybrid(constant=-1), "constant must be"),
    ):
        with pytest.raises(ValueError, match=match):
            as_hybrid(bad)
    with pytest.raises(TypeError, match="hybrid must be"):
        as_hybrid(3)


# --- Searches ---


def test_a_hybrid_search_is_the_fusion_of_two_searches(retriever):
    query = "money at the bank"
    late = retriever.search(query, 6, mode="exact")
    words = best(retriever.index.bm25_scores(query), 6)
    assert words.tolist() == [5, 1, 0]
    for method in ("rrf", "relative"):
        hits = retriever.search(query, 4, mode="exact", hybrid=Hybrid(method, 0.3, depth=6))
        rankings = [np.array([hit.position for hit in late]), words]
        if method == "rrf":
            expected = reciprocal_rank_fusion(rankings, (0.7, 0.3))
        else:
            scores = [
                np.array([hit.score for hit in late]),
                retriever.index.bm25_scores(query)[words],
            ]
            expected = relative_score_fusion(rankings, scores, (0.7, 0.3))
        assert [hit.position for hit in hits] == expected[0][:4].tolist()
        np.testing.assert_allclose([hit.score for hit in hits], expected[1][:4], rtol=1e-5)
        for hit in hits:
            assert hit.ranks.late == 1 + [one.id for one in late].index(hit.id)
            places = words.tolist()
            in_words = hit.position in places
            assert hit.ranks.bm25 == (1 + places.index(hit.position) if in_words else None)
    assert late[0].ranks is None
    explained = retriever.explain(query, hits[0]._replace(text=None))
    assert explained.score == retriever.explain(query, hits[0].id).score
    assert json.loads(json.dumps(hits[0]._asdict())) == hits[0]._asdict() | {
        "ranks": list(hits[0].ranks)
    }
    alone = retriever.search(query, 3, hybrid=Hybrid(bm25_weight=1.0))
    assert [hit.position for hit in alone] == [5, 1, 0]
    several = retriever.search([query, "cats"], 4, hybrid=True)
    assert several[0] == retriever.search(query, 4, hybrid=True)
    assert several[1][0].id == "d2" and several[1][0].ranks.bm25 == 1


def test_filters_hold_for_both(retriever):
    hits = retriever.search("money at the bank", hybrid=True, where={"year": {"lte": 2}})
    assert {hit.id for hit in hits} == {"d0", "d1", "d2"}
    hits = retriever.search("money at the bank", hybrid=True, ids=["d0", "d2"])
    assert [(hit.id, hit.ranks.bm25) for hit in hits if hit.ranks.bm25] == [("d0", 1)]


# --- Kept with the index ---


def same_as_new(retriever, query="money flows past the bank"):
    """BM25 of an index is that of a new one over the documents that are there."""
    index = retriever.index
    left = np.flatnonzero(~index.deleted)
    expected = Bm25.of([index.texts[int(i)] for i in left]).scores(query)
    found = index.bm25_scores(query)
    np.testing.assert_array_equal(found[left], expected)
    assert not found[index.deleted].any() and len(found) == len(index.lengths)


def stored(index) -> list[str]:
    return [place.name for place in index.path.glob("bm25-*")]


def test_every_change_makes_bm25_again(retriever):
    seen = [stored(retriever.index)]
    same_as_new(retriever)
    for change in (
        lambda: retriever.add([{"id": "new", "text": "money flows like a river", "year": 9}]),
        lambda: retriever.update([{"id": "d1", "text": "fish swim", "year": 1}]),
        lambda: retriever.delete(["d5"]),
        lambda: retriever.compact(),
        lambda: retriever.compact(retrain=True),
    ):
        change()
        (name,) = stored(retriever.index)
        assert [name] not in seen
        seen.append([name])
        same_as_new(retriever)
        opened = Index.open(retriever.index.path)
        assert lexical.is_there(opened.path, opened.metadata.state)
        np.testing.assert_array_equal(
            opened.bm25_scores("money"), retriever.index.bm25_scores("money")
        )
    assert not [hit for hit in retriever.search("money", hybrid=True) if hit.id == "d5"]


def test_what_another_state_left_is_not_read(retriever, monkeypatch):
    """A change that was killed before it came to BM25, or made where bm25s is not installed."""
    reader = Retriever.open(retriever.index.path, retriever.model)
    reader.index.bm25()
    monkeypatch.setattr(lexical, "publish", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    retriever.add([{"id": "new", "text": "a zebra", "year": 9}])
    same_as_new(retriever, "zebra")
    monkeypatch.undo()
    assert not lexical.is_there(retriever.index.path, retriever.index.metadata.state)
    assert reader.search("zebra", 1, hybrid=Hybrid(bm25_weight=1.0))[0].ranks.bm25 is None
    assert reader.refresh()
    assert reader.search("zebra", 1, hybrid=Hybrid(bm25_weight=1.0))[0].id == "new"
    retriever.delete(["d0"])
    assert lexical.is_there(retriever.index.path, retriever.index.metadata.state)


def test_threads_share_what_is_made_once(model, tmp_path, monkeypatch):
    retriever = Retriever.build(tmp_path / "i", model, RECORDS, progress=False)
    made, of = [], Bm25.of
    monkeypatch.setattr(Bm25, "of", lambda texts: made.append(1) or of(texts))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: retriever.index.bm25_scores("bank"), range(8)))
    assert made == [1] and not stored(retriever.index)


def test_damage_is_named(retriever, model):
    folder = next(retriever.index.path.glob("bm25-*"))
    file = folder / "data.csc.index.npy"
    *others, last = file.read_bytes()
    file.write_bytes(bytes([*others, last ^ 1]))
    with pytest.raises(ValueError, match=r"data\.csc\.index\.npy: damaged.*colbert-jax bm25"):
        Retriever.open(retriever.index.path, model).search("bank", hybrid=True)
    with pytest.raises(ValueError, match="damaged"):
        Index.open(retriever.index.path).verify()
    (folder / "about.json").unlink()
    with pytest.raises(ValueError, match=r"about\.json.*make it again"):
        Index.open(retriever.index.path).bm25()
    Index.open(retriever.index.path).keep_bm25()
    Index.open(retriever.index.path).verify()
    same_as_new(Retriever.open(retriever.index.path, model))


def test_without_texts_or_packages(model, tmp_path, monkeypatch):
    bare = Retriever.build(tmp_path / "i", model, RECORDS, store_texts=False, progress=False)
    with pytest.raises(ValueError, match="keeps no texts, of which BM25 is made"):
        bare.search("bank", hybrid=True)
    with pytest.raises(ValueError, match="needs the texts"):
        Retriever.build(tmp_path / "j", model, RECORDS, store_texts=False, bm25=True)
    with_texts = Retriever.build(tmp_path / "k", model, RECORDS, bm25=True, progress=False)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"colbert-jax\[hybrid\]"):
        Retriever.open(with_texts.index.path, model).search("bank", hybrid=True)
    with pytest.raises(ImportError, match=r"colbert-jax\[hybrid\]"):
        Retriever.build(tmp_path / "j", model, RECORDS, bm25=True)
    with_texts.delete(["d0"])  # which is made nevertheless
    assert len(with_texts) == 5
    monkeypatch.undo()
    same_as_new(with_texts)


def test_from_the_command_line(retriever, stanford_folder, tmp_path, capsys):
    path = str(retriever.index.path)
    collection = tmp_path / "c.jsonl"
    collection.write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    assert main(["index", str(collection), str(tmp_path / "j"), "--checkpoint",
                 str(stanford_folder), "--bm25"]) == 0  # fmt: skip
    assert "BM25         kept" in capsys.readouterr().out
    assert main(["bm25", path]) == 0
    assert "BM25         kept" in capsys.readouterr().out
    search = ["search", path, "money at the bank", "-k", "2"]
    assert main([*search, "--hybrid", "rrf", "--bm25-weight", "1"]) == 0
    assert "d5" in capsys.readouterr().out.splitlines()[1]
    assert main([*search, "--bm25-weight", "1"]) == 2
    assert "--bm25-weight belongs to --hybrid" in capsys.readouterr().err
    assert main([*search, "--hybrid", "relative", "--bm25-weight", "2"]) == 2
    assert "bm25_weight must be from 0 to 1" in capsys.readouterr().err
