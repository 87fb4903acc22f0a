"""Dense layers in 8-bit integers: against their definition, and against float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import nnx
from support import SIZES

from colbert_jax import ColBERT, Index, Retriever, runtime
from colbert_jax.models.backbones import MODEL_TYPES, config_from_huggingface
from colbert_jax.models.colbert import EncoderConfig, make_encoder, param_shapes, quantize
from colbert_jax.models.int8 import Int8Linear, quantize_columns

DISTILBERT = dict(vocab_size=53, dim=24, n_layers=2, n_heads=3, hidden_dim=40)
GROUPED = SIZES | dict(num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
OWN = {
    "distilbert": DISTILBERT | dict(max_position_embeddings=48),
    "electra": SIZES | dict(embedding_size=10),
    "modernbert": SIZES | dict(num_attention_heads=2, pad_token_id=0),
    "eurobert": GROUPED,
    "lfm2": GROUPED,
    "qwen3": GROUPED,
    "bidirectional_pplx_qwen3": GROUPED,
}


@pytest.fixture(scope="module")
def int8_model(stanford_folder) -> ColBERT:
    return ColBERT.from_pretrained(
        stanford_folder, dtype="float32", quantization="int8", devices=jax.devices()[:1]
    )


def test_columns_are_rounded_to_the_nearest_step():
    kernel = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32)
    kernel[:, 3] = 0
    integers, scale = quantize_columns(kernel)
    assert integers.dtype == np.int8 and scale.dtype == np.float32
    assert (np.abs(integers).max(axis=0) == [127, 127, 127, 0, 127, 127, 127]).all()
    assert (np.abs(integers * scale - kernel) <= scale * 0.50001).all()


@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_its_definition(bias):
    rng = np.random.default_rng(1)
    linear = nnx.Linear(16, 5, use_bias=bias, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = Int8Linear(linear)
    kernel, scale = quantize_columns(np.asarray(linear.kernel[...]))
    layer.kernel[...], layer.scale[...] = jnp.asarray(kernel), jnp.asarray(scale)
    added = rng.normal(size=5).astype(np.float32) if bias else np.zeros(5, np.float32)
    if bias:
        layer.bias[...] = jnp.asarray(added)
    x = rng.normal(size=(2, 3, 16)).astype(np.float32) * 10
    x[1, 1] = 0  # as behind a sequence with nothing to attend to
    step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    rounded = np.round(x / np.where(step == 0, 1, step)).astype(np.int64)
    expected = (rounded @ kernel.astype(np.int64)) * step * scale + added
    y = layer(jnp.asarray(x))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_dense_layer_of_every_backbone(model_type):
    fields = OWN.get(model_type, SIZES) | {"model_type": model_type}
    config = EncoderConfig.projecting(config_from_huggingface(fields), 8)
    params: dict = {}
    rng = np.random.default_rng(0)
    # Gated layers multiply two products: of small weights nothing is left beside what is added.
    spread = 0.3 if model_type == "gte" else 0.1
    for path, shape in param_shapes(config).items():
        place = params
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = rng.normal(0, spread, shape).astype(np.float32)
    quantized = quantize(params, "int8")
    ids = rng.integers(5, 53, (2, 12)).astype(np.int32)
    batch = ids, np.array([12, 7], np.int32), np.ones((2, 12), bool)

    encoder = make_encoder(config, quantized)
    modules = [type(node) for _, node in nnx.iter_graph(encoder.backbone)]
    assert nnx.Linear not in modules and Int8Linear in modules
    assert type(encoder.head[0].linear) is nnx.Linear
    kernels = [leaf for leaf in jax.tree.leaves(quantized["backbone"]) if leaf.dtype == np.int8]
    assert len(kernels) == modules.count(Int8Linear)

    run = jax.jit(lambda p, *b: make_encoder(config, p)(*b))
    exact, rough = run(params, *batch), run(quantized, *batch)
    cosine = (exact * rough).sum(axis=-1)[np.arange(12) < batch[1][:, None]]
    assert cosine.min() > 0.98 and cosine.min() < 1 - 1e-6


def test_model_is_close_and_smaller(model, int8_model, texts):
    exact, rough = model.encode_documents(texts), int8_model.encode_documents(texts)
    assert (exact.offsets == rough.offsets).all() and rough.values.dtype == np.float32
    cosine = (exact.values * rough.values).sum(axis=1)
    assert cosine.min() > 0.99 and cosine.min() < 1 - 1e-6
    queries = (model.encode_queries(texts[:4]) * int8_model.encode_queries(texts[:4])).sum(axis=2)
    assert queries.min() > 0.99


def test_queries_can_stay_in_floats(model, int8_model, stanford_folder, texts):
    mixed = ColBERT.from_pretrained(
        stanford_folder, dtype="float32", quantization="int8-documents", devices=jax.devices()[:1]
    )
    assert mixed.fingerprint() == int8_model.fingerprint()
    documents = mixed.encode_documents(texts).values
    np.testing.assert_array_equal(documents, int8_model.encode_documents(texts).values)
    np.testing.assert_allclose(mixed.encode_queries(texts[:4]), model.encode_queries(texts[:4]))


def test_documents_do_not_depend_on_company(int8_model, texts):
    together = int8_model.encode_documents(texts)
    np.testing.assert_allclose(int8_model.encode_documents(texts[7])[0], together[7], atol=2e-3)


def test_an_index_remembers_it(int8_model, model, texts, tmp_path):
    index = Index.build(tmp_path / "i", int8_model, texts)
    again = Retriever.open(index, dtype="float32", devices=jax.devices()[:1]).model
    assert again.fingerprint() == int8_model.fingerprint() != model.fingerprint()
    assert (again.encode_queries("heat") == int8_model.encode_queries("heat")).all()
    with pytest.raises(ValueError, match="not the checkpoint"):
        Retriever.open(index, quantization=None)


def test_what_cannot_be_done_is_said(int8_model, tmp_path):
    with pytest.raises(ValueError, match=r"'auto' or one of None, 'int8', .* got 'int4'"):
        ColBERT.from_pretrained(tmp_path / "nowhere", quantization="int4")
    with pytest.raises(ValueError, match="load the checkpoint without quantization"):
        int8_model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("fast", [True, False])
def test_auto_goes_by_the_machine(stanford_folder, texts, tmp_path, monkeypatch, fast):
    monkeypatch.setattr(runtime, "multiplies_int8", lambda: fast)
    load = partial(ColBERT.from_pretrained, dtype="float32", devices=jax.devices()[:1])
    model = load(stanford_folder, quantization="auto")
    assert model.quantization == ("int8-documents" if fast else None)
    index = Index.build(tmp_path / "i", model, texts)
    monkeypatch.setattr(runtime, "multiplies_int8", lambda: not fast)  # opened elsewhere
    again = Retriever.open(index, dtype="float32", devices=jax.devices()[:1]).model
    assert again.quantization == model.quantization


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers(int8_model, platform):
    batch = (np.zeros((8, 32), np.int32), np.ones(8, np.int32), np.ones((8, 32), bool))
    traced = int8_model.encode_ids.trace(int8_model.params, *batch)
    assert "xi8>" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_real_weights(minilm_folder):
    exact, rough = (
        ColBERT.from_pretrained(minilm_folder, quantization=q, devices=jax.devices()[:1])
        for q in (None, "int8")
    )
    texts = support.passages(6) + ["Aerodynamic heating of a slender wing at high speed."]
    cosine = (exact.encode_documents(texts).values * rough.encode_documents(texts).values).sum(1)
    assert cosine.min() > 0.96 and cosine.mean() > 0.985
