"""MaxSim with its own gradient, against a numpy definition of both directions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import unit_rows

from colbert_jax.scoring import gradient, maxsim_all_pairs, maxsim_nway
from colbert_jax.scoring.gradient import all_pairs_scores, nway_scores

B, W, LQ, LD, D = 8, 3, 5, 9, 16


@pytest.fixture(scope="module")
def data():
    """Queries, documents of mixed lengths, one without a token, and gradients of both forms."""
    rng = np.random.default_rng(0)
    queries, documents = unit_rows(rng, B, LQ, D), unit_rows(rng, B, W, LD, D)
    queries[0, 3:] = 0
    lengths = rng.integers(1, LD + 1, (B, W))
    lengths[2, 1] = 0
    mask = rng.permuted(np.arange(LD) < lengths[..., None], axis=-1)
    own, pairs = (rng.normal(size=shape).astype(np.float32) for shape in ((B, W), (B, B * W)))
    return queries, documents, mask, own, pairs


def definition(query, document, mask, weight):
    """Score of one pair, and `weight` times its gradients, in float64."""
    query, document = query.astype(np.float64), document.astype(np.float64)
    of_query, of_document = np.zeros_like(query), np.zeros_like(document)
    if not mask.any():
        return -np.inf, of_query, of_document
    similarity = np.where(mask, query @ document.T, -np.inf)
    for i, j in enumerate(similarity.argmax(axis=1)):
        of_query[i] += weight * document[j]
        of_document[j] += weight * query[i]
    return similarity.max(axis=1).sum(), of_query, of_document


def expected_nway(queries, documents, mask, weights):
    scores = np.zeros(weights.shape)
    of_queries, of_documents = np.zeros(queries.shape), np.zeros(documents.shape)
    for b, w in np.ndindex(*weights.shape):
        scores[b, w], of_query, of_documents[b, w] = definition(
            queries[b], documents[b, w], mask[b, w], weights[b, w]
        )
        of_queries[b] += of_query
    return scores, of_queries, of_documents


def expected_pairs(queries, documents, mask, weights):
    every = (np.broadcast_to(x, (len(queries), *x.shape)) for x in (documents, mask))
    scores, of_queries, of_documents = expected_nway(queries, *every, weights)
    return scores, of_queries, of_documents.sum(axis=0)


def flat(documents, mask):
    return documents.reshape(-1, *documents.shape[2:]), mask.reshape(-1, mask.shape[-1])


def both_ways(score, queries, documents, mask, weights):
    @jax.jit
    def scores_and_gradients(queries, documents, mask, weights):
        scores, pull = jax.vjp(lambda q, d: score(q, d, mask), queries, documents)
        return scores, *pull(weights)

    return scores_and_gradients(queries, documents, mask, weights)


def assert_close(got, expected, rtol=1e-5):
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = np.abs(b[np.isfinite(b)]).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)


@pytest.fixture(params=["cpu", "default"])
def form(request, monkeypatch):
    """The program of one kind of device, whatever the device is; not what was compiled before."""
    choice = request.param
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arguments, **forms: forms[choice](*arguments)
    )
    return nway_scores.__wrapped__, all_pairs_scores.__wrapped__


@pytest.mark.parametrize("elements", [100, 500, 1500])
def test_scores_and_gradients(data, form, monkeypatch, elements):
    """In blocks of some documents of a query's, of some queries', of all; last ones overlap."""
    monkeypatch.setattr(gradient, "_CPU_ELEMENTS", elements)
    monkeypatch.setattr(gradient, "_ACCELERATOR_ELEMENTS", elements)
    queries, documents, mask, own, pairs = data
    got = both_ways(form[0], queries, documents, mask, own)
    assert_close(got, expected_nway(queries, documents, mask, own))
    documents, mask = (x[:-1] for x in flat(documents, mask))
    got = both_ways(form[1], queries, documents, mask, pairs[:, :-1])
    assert_close(got, expected_pairs(queries, documents, mask, pairs[:, :-1]))


def test_plain_forms_have_the_same_scores(data):
    """All similarities are positive: where they cancel, the last bits of a sum are most of it."""
    queries, documents, mask = np.abs(data[0]), np.abs(data[1]), data[2]
    np.testing.assert_allclose(
        nway_scores(queries, documents, mask), maxsim_nway(queries, documents, mask), rtol=1e-6
    )
    documents, mask = flat(documents, mask)
    np.testing.assert_allclose(
        all_pairs_scores(queries, documents, mask),
        maxsim_all_pairs(queries, documents, mask),
        rtol=1e-6,
    )


def test_a_document_without_a_token(data, form):
    """It scores minus infinity; no gradient comes out, not even of one that is not finite."""
    queries, documents, mask, own, _ = data
    assert not mask[2, 1].any()
    weights = own.copy()
    weights[2, 1] = np.nan
    scores, of_queries, of_documents = both_ways(form[0], queries, documents, mask, weights)
    assert scores[2, 1] == -np.inf
    assert not np.asarray(of_documents[2, 1]).any()
    assert np.isfinite(of_queries).all() and np.isfinite(of_documents).all()
    assert not np.asarray(of_documents)[~mask].any()


def test_not_a_number_is_not_hidden(data, form):
    queries, documents, mask, own, _ = data
    queries = queries.copy()
    queries[1, 2, 0] = np.nan
    scores, _, of_documents = both_ways(form[0], queries, documents, mask, own)
    assert np.isnan(scores[1]).all() and np.isfinite(scores[3:]).all()
    assert np.isnan(of_documents[1]).any()


def test_the_first_of_equal_maxima_gets_the_gradient(form):
    query = np.ones((1, 1, 4), np.float32)
    document = np.ones((1, 1, 3, 4), np.float32)
    mask = np.array([[[False, True, True]]])
    _, of_query, of_document = both_ways(form[0], query, document, mask, np.float32([[2]]))
    np.testing.assert_array_equal(of_document[0, 0], [[0] * 4, [2] * 4, [0] * 4])
    np.testing.assert_array_equal(of_query, np.full((1, 1, 4), 2))


def test_zero_query_rows_add_nothing(data, form):
    queries, documents, mask, own, _ = data
    wider = np.pad(queries, [(0, 0), (0, 4), (0, 0)])
    scores, _, of_documents = both_ways(form[0], queries, documents, mask, own)
    padded, _, of_padded = both_ways(form[0], wider, documents, mask, own)
    np.testing.assert_allclose(scores, padded, rtol=1e-6)
    np.testing.assert_allclose(of_documents, of_padded, atol=1e-6)


def test_half_precision(data, form):
    """Scores are float32, of the inputs as they are; gradients have the inputs' type."""
    queries, documents, mask, own, _ = data
    queries, documents = (jnp.asarray(x, jnp.bfloat16) for x in (queries, documents))
    exact = (np.asarray(x, np.float32) for x in (queries, documents))
    got = both_ways(form[0], queries, documents, mask, own)
    expected = expected_nway(*exact, mask, own)
    assert [x.dtype for x in got] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    assert_close(got[:1], expected[:1])
    assert_close(got[1:], expected[1:], rtol=2**-7)
    ones = jnp.ones((1, 2048, 1), jnp.bfloat16)  # a bfloat16 sum would stop at 256
    assert form[1](ones, ones[:, :1], np.ones((1, 1), bool)) == 2048


def test_positions_are_small_integers():
    for length, dtype in ((32767, jnp.int16), (32768, jnp.int32)):
        shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 1, 4, 8), (1, 2, length, 8)))
        mask = jax.ShapeDtypeStruct((1, 2, length), bool)
        _, (*_, positions) = jax.eval_shape(gradient._forward, *shapes, mask)
        assert positions.dtype == dtype and positions.shape == (1, 2, 1, 4)


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_change_nothing(data, eight_devices, devices):
    queries, documents, mask, own, pairs = data
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=eight_devices[:devices])
    spread = NamedSharding(mesh, P("data"))
    forms = (
        (nway_scores, documents, mask, own, expected_nway),
        (all_pairs_scores, *flat(documents, mask), pairs, expected_pairs),
    )
    for score, documents, mask, weights, expected in forms:
        arrays = jax.device_put((queries, documents, mask, weights), spread)
        got = both_ways(partial(score, mesh=mesh), *arrays)
        assert_close(got, expected(queries, documents, mask, weights))
        assert all(x.sharding.is_equivalent_to(spread, x.ndim) for x in got)


def temporary_bytes(score, *shapes) -> int:
    def total(queries, documents, mask):
        return score(queries, documents, mask).sum()

    *arrays, mask = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    mask = jax.ShapeDtypeStruct(mask.shape, bool)
    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arrays, mask).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator's blocks are larger")
def test_memory():
    """Of the scoring of 16 x 8 documents of 180 tokens: 8 MiB, in blocks 1."""
    nway = (8, 32, 128), (8, 16, 180, 128), (8, 16, 180)
    assert temporary_bytes(nway_scores, *nway) * 4 < temporary_bytes(maxsim_nway, *nway)
    pairs = (8, 32, 128), (128, 180, 128), (128, 180)
    assert temporary_bytes(all_pairs_scores, *pairs) * 4 < temporary_bytes(maxsim_all_pairs, *pairs)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("devices", [1, 8])
def test_lowers(eight_devices, platform, devices):
    """For accelerators too, and there without a scatter, whose additions have no fixed order."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=eight_devices[:devices])
    for score, shape in ((nway_scores, (8, 3, 20)), (all_pairs_scores, (24, 20))):
        documents = jax.ShapeDtypeStruct((*shape, 16), jnp.bfloat16)
        queries = jax.ShapeDtypeStruct((8, 6, 16), jnp.bfloat16)
        weights = jax.ShapeDtypeStruct((8, 3 if len(shape) == 3 else 24), jnp.float32)
        mask = jax.ShapeDtypeStruct(shape, bool)
        both = jax.jit(partial(both_ways, partial(score, mesh=mesh)))
        traced = both.trace(queries, documents, mask, weights)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "dot_general" in text and '"stablehlo.scatter"' not in text
