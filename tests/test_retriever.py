"""`Retriever`: model and index as one object, against the two of them used by hand."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import support

from colbert_jax import ColBERT, Hit, Index, Retriever

QUERIES = ["running cats", "the heat of the sun", "a book to read in paris"]


@pytest.fixture(scope="module")
def named(texts) -> dict[str, str]:
    return {f"doc-{n}": text for n, text in enumerate(texts)}


@pytest.fixture(scope="module")
def retriever(model, named, tmp_path_factory) -> Retriever:
    return Retriever.build(tmp_path_factory.mktemp("r") / "i", model, named.items())


def test_search_is_the_indexs_search_with_ids_and_texts(retriever, model, named):
    hits = retriever.search(QUERIES, k=7)
    expected = retriever.index.search(model.encode_queries(QUERIES), k=7)
    assert [[hit.position for hit in row] for row in hits] == expected.positions.tolist()
    for row, scores in zip(hits, expected.scores, strict=True):
        np.testing.assert_allclose([hit.score for hit in row], scores, rtol=1e-6)
        for hit in row:
            assert hit.id == f"doc-{hit.position}" and hit.text == named[hit.id]


def test_one_query_gives_one_list(retriever):
    hits = retriever.search(QUERIES[0], k=3)
    assert len(hits) == 3 and all(isinstance(hit, Hit) for hit in hits)
    assert hits == retriever.search(QUERIES[:1], k=3)[0]
    assert retriever.search([], k=3) == []


def test_more_queries_than_are_in_memory(retriever, texts, monkeypatch):
    whole = retriever.search(texts[:30], k=4)
    monkeypatch.setattr("colbert_jax.retriever._ENCODED", 7)
    monkeypatch.setattr("colbert_jax.retriever._SEARCHED", 3)
    parts = retriever.search(texts[:30], k=4)
    assert [[hit.id for hit in row] for row in parts] == [[hit.id for hit in row] for row in whole]


@pytest.fixture(scope="module")
def ragged(plain_folder, named, tmp_path_factory) -> Retriever:
    """Of a model without query expansion, whose queries are as long as they are."""
    path = tmp_path_factory.mktemp("ragged") / "i"
    return Retriever.build(path, plain_folder, named, query_maxlen=64, doc_maxlen=64)


def test_queries_are_searched_by_length_and_answered_in_order(ragged, texts, monkeypatch):
    """One long query makes its own block wide, and no other."""
    monkeypatch.setattr("colbert_jax.retriever._ENCODED", 8)
    monkeypatch.setattr("colbert_jax.retriever._SEARCHED", 4)
    monkeypatch.setattr("colbert_jax.retriever._READ", 16)
    rng = np.random.default_rng(0)
    queries = [" ".join(support.WORDS[n : n + rng.integers(1, 6)]) for n in range(39)]
    queries.insert(5, " ".join(support.WORDS[:50]))
    shapes, search = [], ragged.index.search

    def spy(encoded, *arguments, **settings):
        shapes.append(encoded.shape)
        return search(encoded, *arguments, **settings)

    monkeypatch.setattr(ragged.index, "search", spy)
    found = ragged.search(queries, k=3, mode="exact")
    assert sum(shape[0] for shape in shapes) == 40 and max(shape[0] for shape in shapes) == 4
    assert sorted(shape[1] for shape in shapes)[-2:] == [16, 64]
    for query, hits in zip(queries, found, strict=True):
        alone = ragged.search(query, k=3, mode="exact")
        assert [hit.id for hit in hits] == [hit.id for hit in alone]
        np.testing.assert_allclose(
            [hit.score for hit in hits], [hit.score for hit in alone], rtol=1e-5
        )


def test_queries_are_read_as_their_results_are_taken(retriever, monkeypatch):
    monkeypatch.setattr("colbert_jax.retriever._READ", 32)
    read = []

    def queries():
        for n in range(100):
            read.append(n)
            yield QUERIES[n % 3]

    expected = [[hit.id for hit in hits] for hits in retriever.search(QUERIES, k=2)]
    found = retriever.search_many(queries(), k=2)
    assert read == []
    assert [hit.id for hit in next(found)] == expected[0] and len(read) == 32
    assert [[hit.id for hit in hits] for hits in found] == [expected[n % 3] for n in range(1, 100)]


def test_many_hits_of_a_query_mean_few_queries_at_a_time(retriever, monkeypatch):
    monkeypatch.setattr("colbert_jax.retriever._HITS", 120 * 40)
    read = []
    next(retriever.search_many((read.append(n) or "heat" for n in range(100)), k=500))
    assert len(read) == 32


def test_what_is_wrong_with_many_queries(retriever, monkeypatch):
    monkeypatch.setattr("colbert_jax.retriever._READ", 32)
    for settings in (dict(k=0), dict(mode="best"), dict(mode="exact", ncells=2)):
        with pytest.raises(ValueError):
            retriever.search_many(iter(()), **settings)
    with pytest.raises(TypeError, match="several queries"):
        retriever.search_many("heat")
    for bad, match in ((" ", "query 41 is empty"), ("a\ud800", "query 41 is not valid Unicode")):
        with pytest.raises(ValueError, match=match):
            list(retriever.search_many(["heat"] * 41 + [bad], k=1))


def test_hits_are_plain_values(retriever):
    hits = retriever.search(QUERIES, k=2)
    assert json.loads(json.dumps(hits)) == [[list(hit) for hit in row] for row in hits]
    first = hits[0][0]
    assert json.loads(json.dumps(first._asdict())) == {
        "id": first.id,
        "score": first.score,
        "text": first.text,
        "position": first.position,
    }
    assert [type(value) for value in first] == [str, float, str, int]


def test_settings_reach_the_index(retriever, model):
    exact = retriever.index.search(model.encode_queries(QUERIES), 9, mode="exact")
    hits = retriever.search(QUERIES, 9, mode="exact")
    assert [[hit.position for hit in row] for row in hits] == exact.positions.tolist()
    fast = retriever.index.search(model.encode_queries(QUERIES), 9, ncells=1, ndocs=16)
    hits = retriever.search(QUERIES, 9, ncells=1, ndocs=16)
    assert [[hit.position for hit in row] for row in hits] == fast.positions.tolist()
    with pytest.raises(ValueError, match="ncells means nothing"):
        retriever.search("heat", mode="exact", ncells=2)
    with pytest.raises(ValueError, match="k must be"):
        retriever.search("heat", k=0)


def test_the_default_mode_written_out_changes_nothing(tmp_path, texts):
    """Also where the checkpoint asks for settings of its own."""
    folder = support.write_stanford(tmp_path / "c", ncells=3, ndocs=64)
    retriever = Retriever.build(tmp_path / "i", folder, texts)
    queries = retriever.model.encode_queries(texts[:4])
    implied = retriever.index.search(queries, 20)
    for found in (
        retriever.index.search(queries, 20, mode="accurate"),
        retriever.index.search(queries, 20, ncells=3, ndocs=64),
    ):
        np.testing.assert_array_equal(implied.positions, found.positions)


def test_without_texts(model, named, tmp_path):
    bare = Retriever.build(tmp_path / "i", model, named, store_texts=False)
    assert bare.search("heat", k=1)[0].text is None
    with pytest.raises(ValueError, match="keeps no texts"):
        bare.explain("heat", "doc-3")
    with pytest.raises(ValueError, match="keeps no texts"):
        bare.explain("heat", bare.search("heat", k=1)[0])
    assert bare.explain("heat", "heat flow").score > 0


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_blank_queries_are_refused(retriever, blank):
    with pytest.raises(ValueError, match="query 0 is empty or blank"):
        retriever.search(blank)
    with pytest.raises(ValueError, match="query 2 is empty or blank"):
        retriever.search(["heat", "flow", blank])
    with pytest.raises(ValueError, match="query 0 is empty or blank"):
        retriever.rank(blank, ["heat"])
    with pytest.raises(ValueError, match="query 0 is empty or blank"):
        retriever.explain(blank, "heat")
    with pytest.raises(TypeError, match="query 0 must be a string, got int"):
        retriever.search([3])


def test_open_loads_the_model_that_the_index_remembers(retriever, named):
    opened = Retriever.open(retriever.index.path)
    assert opened.model.fingerprint() == retriever.model.fingerprint()
    assert len(opened) == len(named) and "120 documents" in repr(opened)
    ids = [hit.id for hit in retriever.search(QUERIES[1])]
    assert [hit.id for hit in opened.search(QUERIES[1])] == ids


def test_open_with_a_moved_checkpoint_or_a_loaded_model(index, model, stanford_folder):
    opened = Retriever.open(index, stanford_folder, query_maxlen=20)
    assert opened.model.config.text.query_maxlen == 20 and opened.index is index
    assert Retriever.open(index.path, model).model is model
    with pytest.raises(TypeError, match="loaded already"):
        Retriever.open(index, model, query_maxlen=20)


def test_another_model_is_refused(index, plain_folder, tmp_path):
    with pytest.raises(ValueError, match="dimensions"):
        Retriever.open(index, plain_folder, query_maxlen=32, doc_maxlen=48)
    with pytest.raises(FileNotFoundError, match="name its place if it moved"):
        Retriever.open(index, plain_folder / "moved")
    other = support.write_stanford(tmp_path / "other", seed=5)  # of the same width
    with pytest.raises(ValueError, match="not the checkpoint, or not the document settings"):
        Retriever.open(index, other)
    with pytest.raises(ValueError, match="not the checkpoint, or not the document settings"):
        Retriever(ColBERT.from_pretrained(other), index)
    with pytest.raises(ValueError, match="not the checkpoint, or not the document settings"):
        Retriever.open(index, doc_maxlen=20)


def test_an_index_of_ready_embeddings(model, texts, tmp_path):
    index = Index.build(tmp_path / "i", embeddings=model.encode_documents(texts))
    with pytest.raises(ValueError, match="built from ready embeddings"):
        Retriever.open(index)
    hits = Retriever(model, index).search(texts[3], k=2)
    assert hits[0].id == "3" and hits[0].text is None
    narrow = Index.build(
        tmp_path / "j",
        embeddings=support.unit_rows(np.random.default_rng(0), 40, 8),
        lengths=[4] * 10,
    )
    with pytest.raises(ValueError, match=r"have 8 dimensions.* have 16"):
        Retriever(model, narrow)


def test_rank(retriever, texts):
    hits = retriever.rank("running cats", [("a", "the dog"), ("b", "running cats run")], k=1)
    assert [(hit.id, hit.position, hit.text) for hit in hits] == [("b", 1, "running cats run")]
    several = retriever.rank(["heat flow", "the dog"], ["the dog", "heat flow"])
    for query, hits in zip(["heat flow", "the dog"], several, strict=True):
        alone = retriever.rank(query, ["the dog", "heat flow"])
        assert [hit.id for hit in hits] == [hit.id for hit in alone]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone], rel=1e-5)
    assert several[0][0].id == "1"
    assert retriever.rank("heat", []) == [] and retriever.rank([], ["a"]) == []
    records = [{"id": 7, "title": "Heat", "text": "flow"}]
    assert retriever.rank("heat", records)[0][::2] == ("7", "Heat | flow")


def test_explain_takes_an_id_a_hit_or_a_text(retriever, named):
    hit = retriever.search(QUERIES[0], k=1)[0]
    by_id = retriever.explain(QUERIES[0], hit.id)
    for other in (hit, named[hit.id], hit._replace(text=None)):
        explanation = retriever.explain(QUERIES[0], other)
        assert explanation.document == by_id.document
        np.testing.assert_array_equal(explanation.similarity, by_id.similarity)


def test_ids_and_positions(retriever, index):
    assert retriever.index.ids[5] == "doc-5" and retriever.index.position("doc-5") == 5
    assert retriever.index.texts[retriever.index.position("doc-119")]
    for missing in ("doc-120", "5", ""):
        with pytest.raises(KeyError, match=repr(missing)):
            retriever.index.position(missing)
    assert index.position("119") == 119
    for missing in ("120", "-1", "05", "a"):
        with pytest.raises(KeyError, match=repr(missing)):
            index.position(missing)


def test_shared_between_threads(retriever, texts):
    queries = [texts[n : n + 3] for n in range(24)]
    alone = [retriever.search(part, k=5) for part in queries]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda part: retriever.search(part, k=5), queries))
    assert together == alone


def test_changed_while_threads_search(model, texts, tmp_path):
    """Every answer is of one state: each document's id and text belong together."""
    path = tmp_path / "i"
    retriever = Retriever.build(path, model, [(f"a{n}", text) for n, text in enumerate(texts[:40])])
    known = {f"a{n}": {text} for n, text in enumerate(texts)}
    done = threading.Event()

    def search() -> int:
        count = 0
        while not done.is_set() or not count:
            for row in retriever.search(QUERIES, k=50):
                assert len({hit.id for hit in row}) == len(row) >= 40
                assert all(hit.text in known[hit.id] for hit in row)
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        searches = [pool.submit(search) for _ in range(3)]
        try:
            for n in range(40, 46):
                retriever.add([(f"a{n}", texts[n])])
                known["a0"].add(texts[n])
                retriever.update([("a0", texts[n])])
            retriever.delete([f"a{n}" for n in range(40, 43)])
            retriever.compact()
        finally:
            done.set()
        assert all(search.result() for search in searches)
    assert len(retriever) == 43 and retriever.index.text("a0") == texts[45]


def test_an_iterator_of_results_keeps_its_state(model, texts, tmp_path):
    retriever = Retriever.build(tmp_path / "i", model, {"a": texts[0], "b": texts[1]})
    results = retriever.search_many(iter(texts[:3]), k=9)
    retriever.delete("a")
    assert {hit.id for hit in next(results)} == {"a", "b"}
    assert {hit.id for hit in retriever.search(texts[0], k=9)} == {"b"}


def test_documents_of_another_model_are_not_added(index, plain_folder, texts):
    other = ColBERT.from_pretrained(plain_folder, dim=index.dim)
    for change in (index.add, index.upsert):
        with pytest.raises(ValueError, match="was built with another checkpoint"):
            change(other, [("x", texts[0])])
    with pytest.raises(ValueError, match="was built with another checkpoint"):
        index.retrain(other)


def test_refresh_refuses_an_index_of_another_model(model, plain_folder, texts, tmp_path):
    retriever = Retriever.build(tmp_path / "i", model, texts[:9])
    Retriever.build(tmp_path / "i", plain_folder, texts[:9], overwrite=True, dim=model.dim)
    with pytest.raises(ValueError, match="not the checkpoint, or not the document settings"):
        retriever.refresh()
    assert len(retriever.search(texts[0], k=3)) == 3


def test_in_an_asynchronous_server(retriever):
    """As a FastAPI endpoint calls it: many requests at once, answers that JSON takes."""

    async def endpoint(query: str) -> str:
        hits = await asyncio.to_thread(retriever.search, query, k=3)
        return json.dumps([hit._asdict() for hit in hits])

    async def requests() -> list[str]:
        return await asyncio.gather(*(endpoint(query) for query in QUERIES * 5))

    answers = [[row["id"] for row in json.loads(text)] for text in asyncio.run(requests())]
    expected = [[hit.id for hit in row] for row in retriever.search(QUERIES, k=3)]
    assert answers == expected * 5


def test_bad_input_is_named_before_the_model_is_loaded(tmp_path, retriever, monkeypatch):
    def never(*arguments, **settings):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ColBERT, "from_pretrained", never)
    with pytest.raises(FileExistsError, match="an index is there"):
        Retriever.build(retriever.index.path, "a/model", ["text"])
    with pytest.raises(TypeError, match="document 0"):
        Retriever.build(tmp_path / "i", "a/model", [3])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tsv"):
        Retriever.build(tmp_path / "i", "a/model", tmp_path / "nowhere.tsv")
    assert list(tmp_path.iterdir()) == []


def test_later_bad_documents_are_named_and_leave_nothing(tmp_path, model):
    for documents, match in (
        (["a", None], "document 1"),
        ([("a", "x"), "y"], "document 1 has no id"),
        ([("a", "x"), ("b", "y"), ("a", "z")], "duplicate document id 'a'"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            Retriever.build(tmp_path / "i", model, documents)
    assert list(tmp_path.iterdir()) == []


def test_sources_are_read_once(tmp_path, model, named):
    """A generator, which nothing could read twice, and a file that is opened once."""
    pairs = ((identifier, text) for identifier, text in named.items())
    built = Retriever.build(tmp_path / "i", model, pairs)
    assert list(built.index.ids) == list(named) and list(built.index.texts) == [*named.values()]


def test_settings_of_the_checkpoint(tmp_path, stanford_folder, texts, model):
    built = Retriever.build(
        tmp_path / "i", stanford_folder, texts, nbits=4, doc_maxlen=10, dtype="float32"
    )
    assert built.index.nbits == 4 and built.index.lengths.max() <= 10
    assert Retriever.open(tmp_path / "i").model.config.text.doc_maxlen == 10
    with pytest.raises(TypeError, match="loaded already"):
        Retriever.build(tmp_path / "j", model, texts, doc_maxlen=10)


def test_over_a_mesh(retriever, eight_devices):
    from jax.sharding import AxisType

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=eight_devices[:2])
    sharded = Retriever.open(retriever.index.path, retriever.model, mesh=mesh)
    expected = [[hit.id for hit in row] for row in retriever.search(QUERIES, mode="exact")]
    assert [[hit.id for hit in row] for row in sharded.search(QUERIES, mode="exact")] == expected
    with pytest.raises(TypeError, match="open already"):
        Retriever.open(retriever.index, mesh=mesh)
