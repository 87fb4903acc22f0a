import dataclasses
import pickle
import threading
from functools import partial

import jax
import numpy as np
import pytest
import support

from colbert_jax import ColBERT, maxsim
from colbert_jax.batching import TOKENS_PER_DEVICE, plan_batches


def test_documents_do_not_depend_on_company_or_order(model, texts):
    together = model.encode_documents(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = model.encode_documents([texts[i] for i in order])
    alone = model.encode_documents(texts[7])
    np.testing.assert_allclose(alone[0], together[7], atol=2e-6)
    for place, i in enumerate(order):
        np.testing.assert_allclose(shuffled[place], together[int(i)], atol=2e-6)


def test_eight_devices_change_nothing(model, stanford_folder, texts, eight_devices):
    many = ColBERT.from_pretrained(stanford_folder, dtype="float32", devices=eight_devices)
    assert len(many.devices) == 8
    one, eight = model.encode_documents(texts), many.encode_documents(texts)
    assert (one.offsets == eight.offsets).all()
    np.testing.assert_allclose(one.values, eight.values, atol=2e-6)
    np.testing.assert_allclose(
        model.encode_queries(texts[:5]), many.encode_queries(texts[:5]), atol=2e-6
    )


def test_windows_are_seamless(model, texts, monkeypatch):
    whole = model.encode_documents(texts)
    monkeypatch.setattr("colbert_jax.batching.WINDOW", 17)
    pieces = model.encode_documents(texts)
    assert (whole.offsets == pieces.offsets).all()
    np.testing.assert_allclose(whole.values, pieces.values, atol=2e-6)


def test_one_program_a_shape_and_none_the_second_time(stanford_folder, texts):
    """Not with another model of the same architecture either."""
    load = partial(ColBERT.from_pretrained, dtype="float32", devices=jax.devices()[:1])
    model = load(stanford_folder)
    model.encode_ids.clear_cache()  # what models of other tests had
    texts = [text * (1 + i % 3) for i, text in enumerate(texts)]
    lengths = model.tokenizer.documents(texts).attended
    planned = plan_batches(
        lengths, TOKENS_PER_DEVICE["cpu"], longest=96, parallel=model._runner.side_by_side
    )
    shapes = {(batch.size, batch.length) for batch in planned}
    assert 3 <= len(shapes) <= 8
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        model.encode_documents(texts)
        assert len(compiled) == len(shapes) == model.encode_ids._cache_size()
        model.encode_documents(texts[::-1])
        load(stanford_folder).encode_documents(texts)
        assert len(compiled) == len(shapes)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_batches_run_side_by_side(model, texts, monkeypatch):
    """Two threads are in the encoder at once; a third batch's failure reaches the caller."""
    both, run = threading.Barrier(2, timeout=30), model._run_batch
    calls = []

    def meet(params, *batch):
        calls.append(batch)
        if len(calls) <= 2:
            both.wait()
        return run(params, *batch)

    monkeypatch.setattr(model, "_run_batch", meet)
    model.encode_documents(texts)
    assert len(calls) > 2 and not both.broken

    def fail(params, *batch):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(model, "_run_batch", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        model.encode_documents(texts)


def test_shapes_and_norms(model):
    queries = model.encode_queries(["heat flow", "a"])
    assert queries.shape == (2, 16, 16) and queries.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(queries, axis=2), 1, atol=1e-5)
    documents = model.encode_documents(["heat, flow.", ""])
    assert documents.lengths.tolist() == [5, 3] and len(documents) == 2
    block, mask = documents.padded()
    assert block.shape == (2, 5, 16) and mask.sum(axis=1).tolist() == [5, 3]


def test_nothing_in_nothing_out(model):
    assert model.encode_documents([]).values.shape == (0, 16)
    assert model.encode_queries([]).shape == (0, 16, 16)
    assert model.rank("heat", []).positions.shape == (0,)
    assert model.rank(["heat", "a"], []).scores.shape == (2, 0)
    assert model.rank([], ["heat"]).positions.shape == (0, 1)


def test_rank_is_maxsim(model, texts):
    hits = model.rank("running cats", texts)
    query, documents = model.encode_queries("running cats")[0], model.encode_documents(texts)
    expected = [float(maxsim(query, d, np.ones(len(d), bool))) for d in documents]
    assert sorted(hits.positions.tolist()) == list(range(len(texts)))
    np.testing.assert_allclose(hits.scores, np.array(expected)[hits.positions], rtol=1e-5)
    assert (np.diff(hits.scores) <= 0).all()
    assert model.rank("running cats", texts, k=3).positions.tolist() == hits.positions[:3].tolist()


def test_rank_for_several_queries(model, texts):
    queries = ["running cats", "heat flow", texts[3]]
    several = model.rank(queries, texts, k=5)
    assert several.positions.shape == several.scores.shape == (3, 5)
    for query, positions, scores in zip(queries, *several, strict=True):
        one = model.rank(query, texts, k=5)
        assert one.positions.tolist() == positions.tolist()
        np.testing.assert_allclose(one.scores, scores, rtol=1e-5)


@pytest.mark.parametrize("blank", ["", "  ", "\n\t", "\u3000"])
def test_blank_queries_are_refused(model, blank):
    with pytest.raises(ValueError, match="query 1 is empty or blank"):
        model.encode_queries(["heat", blank])
    assert len(model.encode_queries(["heat", blank], allow_blank=True)) == 2
    with pytest.raises(ValueError, match="query 0 is empty or blank"):
        model.rank(blank, ["a"])
    with pytest.raises(ValueError, match="query 0 is empty or blank"):
        model.explain(blank, "a")


@pytest.mark.parametrize("k", [0, -1, "3", True])
def test_rank_checks_k(model, k):
    with pytest.raises(ValueError, match="k must be a whole number >= 1"):
        model.rank("heat", ["a"], k=k)


def test_rank_compiles_once_for_like_sizes(model, texts):
    from colbert_jax.search import exact

    model.rank("heat", texts[:20], k=3)
    before = exact._merge._cache_size()
    for start in range(1, 6):
        model.rank("heat", texts[start : start + 20], k=3)
    assert exact._merge._cache_size() <= before + 2


def test_rank_breaks_ties_by_position(model):
    assert model.rank("heat", ["the dog", "heat flow", "the dog"]).positions.tolist()[1:] == [0, 2]


def test_explain_adds_up_to_the_score(model):
    explanation = model.explain("running cats", "the cat runs, just.")
    assert explanation.similarity.shape == (len(explanation.query), len(explanation.document))
    score = model.rank("running cats", ["the cat runs, just."]).scores[0]
    np.testing.assert_allclose(explanation.similarity.max(axis=1).sum(), score, rtol=1e-5)
    assert [word for word, _, _ in explanation.matches] == explanation.query


def test_a_long_document(model):
    assert model.encode_documents(["heat flow, " * 10_000]).lengths[0] <= 48


def test_bfloat16_is_close(stanford_folder, texts):
    half = ColBERT.from_pretrained(stanford_folder, dtype="bfloat16", devices=jax.devices()[:1])
    full = ColBERT.from_pretrained(stanford_folder, dtype="float32", devices=jax.devices()[:1])
    a, b = half.encode_documents(texts), full.encode_documents(texts)
    assert a.values.dtype == np.float32
    assert (a.values * b.values).sum(axis=1).min() > 0.99
    assert np.abs(a.values - b.values).max() > 1e-4  # it did compute in bfloat16


def test_new_projection_is_seeded(plain_folder):
    load = lambda seed: ColBERT.from_pretrained(  # noqa: E731
        plain_folder, dim=8, seed=seed, query_maxlen=32, doc_maxlen=64
    )
    one, same, other = load(1), load(1), load(2)
    assert one.dim == 8 and one.fingerprint() == same.fingerprint() != other.fingerprint()
    a, b = (m.encode_documents(["heat flow"]).values for m in (one, same))
    assert (a == b).all()


def test_settings_change_and_are_checked(stanford_folder):
    assert ColBERT.from_pretrained(stanford_folder, doc_maxlen=20).config.text.doc_maxlen == 20
    with pytest.raises(ValueError, match=r"doc_maxlen is 300, but the encoder .* has 96 positions"):
        ColBERT.from_pretrained(stanford_folder, doc_maxlen=300)
    with pytest.raises(TypeError, match="no setting doc_maxlenn"):
        ColBERT.from_pretrained(stanford_folder, doc_maxlenn=300)


def test_wrong_arguments(model):
    with pytest.raises(TypeError, match="document 1 must be a string, got NoneType"):
        model.encode_documents(["a", None])
    with pytest.raises(TypeError, match="query 1 must be a string, got int"):
        model.rank(["a", 3], ["b"])


def test_weights_are_hashed_once(stanford_folder, monkeypatch):
    """Opening, checking and pickling ask for the fingerprint again and again."""
    hashed = []
    monkeypatch.setattr("colbert_jax.colbert.fingerprint", lambda *of: hashed.append(of) or "new")
    own = ColBERT.from_pretrained(stanford_folder, devices=jax.devices()[:1])
    assert [own.fingerprint(), own.describe()["fingerprint"], own.fingerprint()] == ["new"] * 3
    pickle.dumps(own)
    assert len(hashed) == 1
    own.set_params(jax.tree.map(np.asarray, own.params))
    own.fingerprint()
    own.params = jax.tree.map(lambda a: a + 1, own.params)
    own.fingerprint()
    own.config = dataclasses.replace(
        own.config, text=dataclasses.replace(own.config.text, doc_maxlen=7)
    )
    own.fingerprint()
    assert len(hashed) == 4


def test_model_fingerprint_ignores_query_settings(stanford_folder, model):
    longer = ColBERT.from_pretrained(stanford_folder, query_maxlen=20, attend_to_mask_tokens=True)
    assert longer.fingerprint() == model.fingerprint()
    shorter = ColBERT.from_pretrained(stanford_folder, doc_maxlen=20)
    assert shorter.fingerprint() != model.fingerprint()
    assert support.TINY["hidden_size"] == 32
