"""Opening, searching and damaging an index."""

import json
import shutil

import numpy as np
import pytest
from support import unit_rows, write_stanford

from colbert_jax import ColBERT, Index, files
from colbert_jax.index.folder import building_folder


@pytest.fixture(scope="module")
def queries(model):
    return model.encode_queries(["running cats", "the heat of the sun", "a book to read in paris"])


def decompressed_ranking(index, queries):
    """All documents by a numpy MaxSim over the decompressed embeddings."""
    scores = np.array(
        [
            [(index.document_embeddings(i) @ q.T).max(axis=0).sum() for i in range(len(index))]
            for q in queries
        ]
    )
    return np.argsort(-scores, axis=1, kind="stable"), scores


@pytest.mark.slow
def test_exact_is_maxsim_of_decompressed(index, queries):
    order, scores = decompressed_ranking(index, queries)
    hits = index.search(queries, k=20, mode="exact")
    np.testing.assert_array_equal(hits.positions, order[:, :20])
    np.testing.assert_allclose(
        hits.scores, np.take_along_axis(scores, order[:, :20], axis=1), rtol=1e-5
    )


def test_plaid_with_everything_kept_is_exact(index, queries):
    wide = index.search(queries, k=20, ncells=10_000, ndocs=10_000, centroid_score_threshold=-2.0)
    exact = index.search(queries, k=20, mode="exact")
    np.testing.assert_array_equal(wide.positions, exact.positions)
    np.testing.assert_allclose(wide.scores, exact.scores, rtol=1e-5)


def test_plaid_agrees_with_exact(index, model, texts):
    """Random weights make no clusters, so one probe per token is too few; four are not."""
    queries = model.encode_queries(texts[:30])
    plaid, exact = index.search(queries, ncells=4), index.search(queries, mode="exact")
    overlap = [len(set(a) & set(b)) for a, b in zip(plaid.positions, exact.positions, strict=True)]
    assert np.mean(overlap) / 10 >= 0.9
    assert (plaid.positions[:, 0] == exact.positions[:, 0]).mean() >= 0.9


@pytest.mark.parametrize("k", [1, 10, 11, 119, 120, 500])
def test_always_min_k_n_results(index, queries, k):
    hits = index.search(queries, k=k, ncells=1, ndocs=1)
    assert hits.positions.shape == hits.scores.shape == (3, min(k, 120))
    for ids, scores in zip(hits.positions, hits.scores, strict=True):
        assert len(set(ids.tolist())) == len(ids) and ids.min() >= 0 and ids.max() < 120
        assert np.isfinite(scores).all() and (np.diff(scores) <= 0).all()


def test_defaults_do_not_stick(index, queries):
    before = index.search(queries, k=100)
    index.search(queries, k=1)
    after = index.search(queries, k=100)
    np.testing.assert_array_equal(before.positions, after.positions)


def test_batch_size_and_order_change_nothing(index, queries):
    whole = index.search(queries, k=10)
    for row in range(3):
        one = index.search(queries[row : row + 1], k=10)
        np.testing.assert_array_equal(one.positions[0], whole.positions[row])
        np.testing.assert_allclose(one.scores[0], whole.scores[row], rtol=1e-6)
    back = index.search(queries[::-1], k=10)
    np.testing.assert_array_equal(back.positions[::-1], whole.positions)
    assert index.search(queries[:0], k=10).positions.shape == (0, 10)


def test_empty_documents_are_never_returned(tmp_path):
    rng = np.random.default_rng(0)
    lengths = np.array([0, 4, 0, 6, 2, 0])
    index = Index.build(tmp_path / "i", embeddings=unit_rows(rng, 12, 16), lengths=lengths)
    assert index.metadata.num_empty_documents == 3
    for exact in (False, True):
        hits = index.search(unit_rows(rng, 2, 5, 16), k=10, mode="exact" if exact else "accurate")
        assert hits.positions.shape == (2, 3) and set(hits.positions.ravel()) == {1, 3, 4}
    assert index.document_embeddings(0).shape == (0, 16)


def test_equal_documents_by_smaller_id(tmp_path, model):
    index = Index.build(tmp_path / "i", model, ["heat flow", "the dog", "heat flow", "heat flow"])
    hits = index.search(model.encode_queries("heat flow"), k=4)
    assert hits.positions.tolist() == [[0, 2, 3, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(queries=np.zeros((16, 16))), r"must be \[B, Lq, D\].*queries\[None\]"),
        (dict(queries=np.zeros((1, 16, 8))), "queries have 8 dimensions, the index .* has 16"),
        (dict(queries=np.full((1, 4, 16), np.nan)), "NaN"),
        (dict(queries=np.zeros((1, 0, 16))), r"must be \[B, Lq, D\], got \[1, 0, 16\]"),
        (dict(queries=np.zeros((1, 4, 16)), k=0), "k must be a whole number >= 1"),
        (dict(queries=np.zeros((1, 4, 16)), k=True), "k must be a whole number >= 1"),
        (dict(queries=np.zeros((1, 4, 16)), ncells=0), "ncells must be >= 1"),
        (dict(queries=np.zeros((1, 4, 16)), ncells=-1), "ncells must be >= 1"),
        (dict(queries=np.zeros((1, 4, 16)), ndocs=-1), "ndocs must be >= 1"),
    ],
)
def test_bad_searches(index, call, message):
    with pytest.raises(ValueError, match=message):
        index.search(**call)


def test_texts_are_no_queries(index):
    for queries in ("who wrote dune", ["who wrote dune"]):
        with pytest.raises(TypeError, match=r"index\.search\(model\.encode_queries"):
            index.search(queries)


def test_numpy_scalars_are_numbers(index, queries):
    hits = index.search(
        queries,
        np.int64(4),
        ncells=np.int64(2),
        ndocs=np.int32(64),
        centroid_score_threshold=np.float32(0.4),
    )
    assert hits.positions.shape == (3, 4)


def test_a_query_of_zeros_still_answers(index):
    hits = index.search(np.zeros((1, 4, 16)), k=3)
    assert hits.positions.tolist() == [[0, 1, 2]] and not hits.scores.any()


@pytest.fixture
def copy(index, tmp_path):
    return shutil.copytree(index.path, tmp_path / "copy.index")


FILES = ["centroids", "codes", "residuals", "offsets", "lists", "list_offsets", "texts"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "other shape"])
def test_damaged_files_are_named(copy, name, damage):
    file = copy / f"{name}.npy"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[: len(data) - 7])
    elif damage == "garbage":
        file.write_bytes(b"garbage" + data[7:])
    else:
        np.save(file, np.zeros(3, np.float64))
    with pytest.raises(ValueError, match=rf"{name}\.npy"):
        Index.open(copy)


def test_flipped_bits_are_found_by_verify(copy):
    Index.open(copy).verify()
    file = copy / "residuals.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"residuals\.npy: damaged"):
        Index.open(copy).verify()


def test_offsets_out_of_order(copy):
    offsets = np.load(copy / "offsets.npy")
    offsets[3] = offsets[5]
    np.save(copy / "offsets.npy", offsets)
    with pytest.raises(ValueError, match=r"offsets\.npy: damaged: not ascending"):
        Index.open(copy)


def test_damaged_metadata(copy):
    file = copy / "metadata.json"
    metadata = json.loads(file.read_text())
    for change, message in [
        ({"format_version": 99}, "format version 99, this library reads 1 and 2"),
        ({"num_tokens": None}, "field 'num_tokens' is missing or damaged"),
        ({"model": "x"}, "field 'model' is missing or damaged"),
        ({"model": {"search": {"depth": 3}}}, "field 'model' is damaged"),
        ({"checksums": None}, "field 'checksums' is missing"),
        ({"num_text_bytes": "x"}, "field 'num_text_bytes' is missing or damaged"),
    ]:
        file.write_text(json.dumps(metadata | change))
        with pytest.raises(ValueError, match=message):
            Index.open(copy)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"metadata\.json: damaged"):
        Index.open(copy)


def test_no_index(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index there"):
        Index.open(tmp_path / "nowhere")
    building_folder(tmp_path / "half").mkdir()
    with pytest.raises(FileNotFoundError, match="only an unfinished build"):
        Index.open(tmp_path / "half")


def test_interrupted_publish_is_readable_and_healed_by_the_next_build(copy, model):
    aside = files.previous_folder(copy)
    copy.rename(aside)
    assert len(Index.open(copy)) == 120 and aside.exists() and not copy.exists()
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        Index.build(copy, model, ["heat"])
    assert len(Index.open(copy)) == 120 and not aside.exists()


def test_columns(index, texts):
    assert index.ids[5] == "5" and index.ids[-1] == "119" and index.texts[:2] == texts[:2]
    assert index.ids[np.array([[3, 1]])] == [["3", "1"]]
    assert index.texts[np.array([3, 1], np.int32)] == [texts[3], texts[1]]
    with pytest.raises(IndexError):
        index.ids[120]


def test_few_candidates_are_widened_not_scored_one_and_all(index, queries, monkeypatch):
    exact = index.search(queries, k=60, mode="exact")

    def fail(*args):
        raise AssertionError("scored every document")

    monkeypatch.setattr(index.backend, "exact", fail)
    assert index.search(queries, k=5, ncells=4).positions.shape == (3, 5)
    assert index.search(queries, k=60, ncells=1, ndocs=3).positions.shape == exact.positions.shape


def test_one_long_document_among_short_ones(tmp_path):
    rng = np.random.default_rng(0)
    lengths = np.array([3] * 20 + [5000])
    index = Index.build(tmp_path / "i", embeddings=unit_rows(rng, 5060, 16), lengths=lengths)
    queries = unit_rows(rng, 2, 4, 16)
    plaid, exact = (index.search(queries, k=21, mode=r) for r in ("accurate", "exact"))
    np.testing.assert_array_equal(plaid.positions, exact.positions)


def test_checkpoint_settings_are_the_defaults(tmp_path, texts):
    folder = write_stanford(tmp_path / "c", nbits=4, kmeans_niters=2, ncells=3, ndocs=64)
    model = ColBERT.from_pretrained(folder)
    index = Index.build(tmp_path / "i", model, texts)
    assert index.nbits == 4 and index.metadata.settings["kmeans_niters"] == 2
    assert index.metadata.model["search"]["ncells"] == 3
    assert Index.build(tmp_path / "j", model, texts, nbits=1).nbits == 1
    queries = model.encode_queries(texts[:4])
    np.testing.assert_array_equal(
        index.search(queries).positions, index.search(queries, ncells=3, ndocs=64).positions
    )
