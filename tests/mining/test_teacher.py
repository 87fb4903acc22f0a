import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from safetensors.numpy import save_file

from colbert_jax import ColBERT
from colbert_jax.checkpoints import read_checkpoint
from colbert_jax.mining.teacher import BiEncoder, CrossEncoder, LateInteraction, load_teacher
from colbert_jax.models.colbert import make_encoder

ONE_LAYER = dict(num_hidden_layers=1)
# Short, so that all have one padded length and few programs are compiled.
SHORT = support.passages(20, longest=9)
DENSE = np.random.default_rng(1).normal(0, 0.3, (8, 32)).astype(np.float32)
BIAS = np.linspace(-1, 1, 8, dtype=np.float32)


def single_vector(plain, folder, *, pooling=None, normalize=True, dense=False, settings=None):
    """A sentence-transformers folder."""
    shutil.copytree(plain, folder)
    kinds = ["Transformer", "Pooling", *["Dense"] * dense, *["Normalize"] * normalize]
    modules = []
    for n, kind in enumerate(kinds):
        path = f"{n}_{kind}" if n else ""
        modules.append({"path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = pooling or {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings or {}))
    if dense:
        fields = {"in_features": 32, "out_features": 8, "bias": True}  # and tanh, its default
        (folder / "2_Dense" / "config.json").write_text(json.dumps(fields))
        tensors = {"linear.weight": DENSE, "linear.bias": BIAS}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
    return folder


def one_device(place, **arguments) -> BiEncoder | CrossEncoder:
    return load_teacher(place, devices=jax.devices()[:1], dtype="float32", **arguments)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return support.write_plain(tmp_path_factory.mktemp("plain"), ONE_LAYER)


@pytest.fixture(scope="module")
def bi_folder(plain, tmp_path_factory):
    return single_vector(plain, tmp_path_factory.mktemp("bi") / "encoder")


@pytest.fixture(scope="module")
def bi(bi_folder):
    return one_device(bi_folder)


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cross") / "encoder"
    return one_device(support.write_cross_encoder(folder, ONE_LAYER))


@pytest.fixture(scope="module")
def hidden(plain, bi):
    """Hidden states of two texts, each alone and unpadded: [L, 32]."""
    checkpoint = read_checkpoint(plain)
    backbone = make_encoder(checkpoint.encoder, checkpoint.params).backbone
    rows = bi._tokenizer.documents(SHORT[:2]).ids
    assert len(rows[0]) != len(rows[1])
    run = jax.jit(lambda ids: backbone(ids, jnp.ones(ids.shape, bool))[0])
    return [np.asarray(run(row[None])) for row in rows]


POOLINGS = {
    "mean": ({"pooling_mode_mean_tokens": True}, lambda x: x.mean(axis=0)),
    "cls": ({"pooling_mode_cls_token": True}, lambda x: x[0]),
    "max": ({"pooling_mode": ["max"]}, lambda x: x.max(axis=0)),
}


@pytest.mark.parametrize(("pooling", "dense"), [("mean", True), ("cls", False), ("max", False)])
def test_vectors_are_what_the_modules_say(plain, hidden, tmp_path, pooling, dense):
    fields, pool = POOLINGS[pooling]
    folder = single_vector(
        plain, tmp_path / "encoder", pooling=fields, dense=dense, normalize=not dense
    )
    teacher = one_device(folder)
    assert isinstance(teacher, BiEncoder) and teacher.dim == (8 if dense else 32)
    expected = np.stack([pool(x) for x in hidden])
    if dense:
        expected = np.tanh(expected @ DENSE.T + BIAS)
    else:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = teacher.encode_documents(SHORT[:2])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


@pytest.mark.parametrize("similarity", [None, "cosine", "dot"])
def test_similarity(plain, tmp_path, similarity):
    settings = {"similarity_fn_name": similarity}
    folder = single_vector(plain, tmp_path / "e", normalize=False, settings=settings)
    teacher = one_device(folder)
    q, d = teacher.encode_queries(SHORT[:4]), teacher.encode_documents(SHORT[4:8])
    assert (np.linalg.norm(q, axis=1) > 1.1).all()
    expected = (q * d).sum(axis=1)
    if similarity != "dot":
        expected /= np.linalg.norm(q, axis=1) * np.linalg.norm(d, axis=1)
    np.testing.assert_allclose(teacher.score(SHORT[:4], SHORT[4:8]), expected, rtol=1e-5)


def test_each_distinct_text_is_embedded_once(bi, monkeypatch):
    rng = np.random.default_rng(3)
    q, d = rng.integers(0, 4, 20), rng.integers(4, 8, 20)
    embedded, embed = [], BiEncoder._embed

    def count(self, token_ids, bar):
        embedded.extend(map(tuple, token_ids.ids))
        return embed(self, token_ids, bar)

    monkeypatch.setattr(BiEncoder, "_embed", count)
    scores = bi.score([SHORT[i] for i in q], [SHORT[i] for i in d])
    assert len(embedded) == len({*q, *d}) == 8
    vectors = np.concatenate([bi.encode_queries(SHORT[:4]), bi.encode_documents(SHORT[4:8])])
    np.testing.assert_allclose(scores, (vectors[q] * vectors[d]).sum(axis=1), atol=2e-6)


def test_lengths_prompts_and_folders_without_modules(plain, tmp_path, bi):
    settings = {"prompts": {"query": "river bank: "}}
    prompted = one_device(single_vector(plain, tmp_path / "p", settings=settings))
    np.testing.assert_allclose(
        prompted.encode_queries(["heat"]), bi.encode_queries(["river bank: heat"]), atol=1e-6
    )
    np.testing.assert_allclose(
        prompted.encode_documents(["heat"]), bi.encode_documents(["heat"]), atol=1e-6
    )
    long = " ".join(support.WORDS * 2)
    assert len(bi._tokenizer.documents([long]).ids[0]) == 24
    bare = one_device(plain)  # no word on lengths or pooling
    assert len(bare._tokenizer.queries([long]).ids[0]) == 96
    np.testing.assert_allclose(bare.encode_queries("heat"), bi.encode_queries("heat"), atol=1e-6)
    assert len(one_device(plain, maxlen=9)._tokenizer.queries([long]).ids[0]) == 9


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_company_order_and_devices_change_nothing(kind, request, eight_devices):
    teacher = request.getfixturevalue(kind)
    queries, documents = SHORT[:4] * 4, SHORT[4:20]
    scores = teacher.score(queries, documents)
    assert scores.dtype == np.float32 and scores.shape == (16,) and np.std(scores) > 1e-3
    order = np.random.default_rng(0).permutation(16)
    shuffled = teacher.score([queries[i] for i in order], [documents[i] for i in order])
    np.testing.assert_allclose(shuffled, scores[order], atol=1e-5)
    alone = teacher.score(queries[:1], documents[:1])
    np.testing.assert_allclose(alone, scores[:1], atol=1e-5)
    folder = request.getfixturevalue("bi_folder") if kind == "bi" else cross_folder(request)
    many = load_teacher(folder, devices=eight_devices, dtype="float32")
    np.testing.assert_allclose(many.score(queries, documents), scores, atol=1e-5)
    assert teacher.score([], []).shape == (0,)


def test_late_interaction(stanford_folder, eight_devices):
    teacher = one_device(stanford_folder, maxlen=12)
    assert isinstance(teacher, LateInteraction)
    queries, documents = SHORT[:4] * 4, SHORT[4:20]
    scores = teacher.score(queries, documents)
    model = ColBERT.from_pretrained(
        stanford_folder, devices=jax.devices()[:1], query_maxlen=12, doc_maxlen=12
    )
    expected = [
        model.rank(q, [d]).scores[0] for q, d in zip(queries[:5], documents[:5], strict=True)
    ]
    np.testing.assert_allclose(scores[:5], expected, atol=1e-5)
    assert scores.dtype == np.float32 and scores.shape == (16,) and np.std(scores) > 1e-3
    many = load_teacher(stanford_folder, maxlen=12, devices=eight_devices, dtype="float32")
    many.pairs_at_once = 7
    np.testing.assert_allclose(many.score(queries, documents), scores, atol=1e-5)
    assert many.fingerprint == teacher.fingerprint != one_device(stanford_folder).fingerprint
    assert teacher.score([], []).shape == (0,)


def cross_folder(request):
    return support.write_cross_encoder(request.getfixturevalue("tmp_path") / "cross", ONE_LAYER)


def test_windows_are_seamless(bi, cross, monkeypatch):
    whole = [t.score(SHORT[:4] * 4, SHORT[4:20]) for t in (bi, cross)]
    monkeypatch.setattr("colbert_jax.batching.WINDOW", 8)
    monkeypatch.setattr(bi, "pairs_at_once", 8)
    for teacher, scores in zip((bi, cross), whole, strict=True):
        np.testing.assert_allclose(teacher.score(SHORT[:4] * 4, SHORT[4:20]), scores, atol=1e-5)


def test_pairs_are_cut_longest_first(cross):
    ids, types = cross._tokenize([("cats " * 200, "heat flow"), ("cat", "run " * 200)])
    assert [len(row) for row in ids] == [96, 96]
    assert types[0].tolist() == [0] * 93 + [1] * 3 and types[1].tolist() == [0] * 3 + [1] * 93


def test_fingerprints_tell_teachers_apart(bi_folder, plain, bi, cross, tmp_path):
    other = support.write_cross_encoder(tmp_path / "other", seed=4)
    teachers = [bi, cross, one_device(bi_folder, maxlen=9), one_device(other)]
    teachers += [one_device(plain), one_device(other, maxlen=9)]
    assert len({teacher.fingerprint for teacher in teachers}) == len(teachers)
    assert one_device(bi_folder).fingerprint == bi.fingerprint


def test_what_is_no_teacher(tmp_path, plain):
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        load_teacher(tmp_path / "nowhere")
    for n, (change, message) in enumerate(
        [
            (
                {"pooling": {"pooling_mode_lasttoken": True}},
                r"config.json: pooling \['lasttoken'\]",
            ),
            ({"pooling": {"pooling_mode": ["cls", "mean"]}}, "is not supported; supported: one of"),
            ({"pooling": {"pooling_mode_cls_token": 1}}, "pooling_mode_cls_token must be bool"),
            ({"settings": {"similarity_fn_name": "euclidean"}}, "similarity_fn_name 'euclidean'"),
        ]
    ):
        folder = single_vector(plain, tmp_path / str(n), **change)
        with pytest.raises(ValueError, match=message):
            load_teacher(folder)
    folder = single_vector(plain, tmp_path / "order")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[0], modules[2], modules[1]]))
    with pytest.raises(ValueError, match="Transformer, Normalize, Pooling in this order are not"):
        load_teacher(folder)


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_bad_arguments(kind, request, plain):
    teacher = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match="got 2 queries and 1 documents"):
        teacher.score(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="two lists of texts, got one string"):
        teacher.score("a", ["c"])
    with pytest.raises(TypeError, match="document 1 must be a string, got int"):
        teacher.score(["a", "b"], ["c", 1])
    with pytest.raises(ValueError, match="document 0 is not valid Unicode"):
        teacher.score(["a"], ["\ud800"])
    for maxlen in (2, 97, True, 9.5):
        with pytest.raises(ValueError, match="maxlen must be a whole number from 3 to 96"):
            load_teacher(plain, maxlen=maxlen)


def test_minilm_vectors_are_those_of_sentence_transformers(minilm_folder):
    """Cosines that sentence-transformers 6.2.0 gave for these texts."""
    teacher = one_device(minilm_folder)
    query = "How fast does heat flow through a wall?"
    documents = ["Thermal conduction in building materials", "The capital of France is Paris."]
    scores = teacher.encode_documents(documents) @ teacher.encode_queries([query, "cats"])[0]
    np.testing.assert_allclose(scores, [0.45470557, 0.08413249], atol=2e-6)
