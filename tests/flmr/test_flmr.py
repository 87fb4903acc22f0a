"""FLMR's names: the model card's example, upstream's numbers, and what upstream gets wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from safetensors.numpy import load_file

from colbert_jax import Index
from colbert_jax.checkpoints import detect_layout
from colbert_jax.flmr import (
    FLMRConfig,
    FLMRContextEncoderTokenizer,
    FLMRModelForRetrieval,
    FLMRQueryEncoderTokenizer,
    FLMRTextConfig,
    FLMRVisionConfig,
    create_searcher,
    index_custom_collection,
    search_custom_collection,
)
from colbert_jax.flmr.modeling import losses

QUERIES = ["what is the capital of france?", "what is the capital of germany?"]
DOCUMENTS = ["paris is the capital, of france.", "berlin is the capital of germany."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return support.write_flmr(tmp_path_factory.mktemp("flmr") / "checkpoint")


@pytest.fixture(scope="module")
def tokenizers(folder):
    query = FLMRQueryEncoderTokenizer.from_pretrained(folder, subfolder="query_tokenizer")
    context = FLMRContextEncoderTokenizer.from_pretrained(folder, subfolder="context_tokenizer")
    return query, context


@pytest.fixture(scope="module")
def model(folder, tokenizers):
    return FLMRModelForRetrieval.from_pretrained(folder, *tokenizers, dtype="float32")


def inputs(tokenizers, queries=QUERIES, documents=(*DOCUMENTS, *DOCUMENTS)):
    query, context = tokenizers[0](queries), tokenizers[1](list(documents))
    return dict(
        query_input_ids=query["input_ids"],
        query_attention_mask=query["attention_mask"],
        context_input_ids=context["input_ids"],
        context_attention_mask=context["attention_mask"],
    )


def test_the_model_cards_example(folder):
    cfg = FLMRConfig.from_pretrained(folder)
    qt = FLMRQueryEncoderTokenizer.from_pretrained(
        folder, text_config=cfg.text_config, subfolder="query_tokenizer"
    )
    ct = FLMRContextEncoderTokenizer.from_pretrained(
        folder, text_config=cfg.text_config, subfolder="context_tokenizer"
    )
    model = FLMRModelForRetrieval.from_pretrained(folder, query_tokenizer=qt, context_tokenizer=ct)
    out = model.forward(**inputs((qt, ct)), use_in_batch_negatives=True)
    assert out.scores.shape == (2, 2) and out.loss == out.in_batch_negative_loss
    assert out.query_late_interaction_output.shape == (2, 16, 16)
    assert out.context_late_interaction_output.shape == (4, 48, 16)
    norms = np.linalg.norm(out.query_late_interaction_output, axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    assert out["scores"] is out[1] and out.keys()[:2] == ["loss", "scores"]
    assert len(out.to_tuple()) == 5


def test_losses_of_the_documented_scores():
    """Upstream's docstring, whose scores are printed in half precision (Paris, Beijing, twice)."""
    own = jnp.array([[44.2188, 40.6562], [39.4375, 48.4062]])
    scores, own_loss, in_batch = losses(jnp.tile(own, (1, 2)), ways=2)
    np.testing.assert_array_equal(scores, own)
    np.testing.assert_allclose(own_loss, 4.50, atol=5e-3)
    np.testing.assert_allclose(in_batch, 5.19, atol=5e-3)


def test_golden_token_ids(minilm_folder):
    query = FLMRQueryEncoderTokenizer.from_pretrained(minilm_folder)
    out = query("What is the capital of France?")
    words = [2054, 2003, 1996, 3007, 1997, 2605, 1029]
    assert out["input_ids"][0].tolist() == [101, 1, *words, 102] + [103] * 22
    assert out["attention_mask"][0].tolist() == [1] * 10 + [0] * 22
    context = FLMRContextEncoderTokenizer.from_pretrained(minilm_folder)
    out = context(["Paris."])
    assert out["input_ids"].shape == (1, 512) and not out["token_type_ids"].any()
    assert out["input_ids"][0, :6].tolist() == [101, 2, 3000, 1012, 102, 0]
    assert query.encode(":", add_special_tokens=False) == [1024]
    assert query("a " * 60, max_length=40)["input_ids"].shape == (1, 40)


def test_a_single_document_is_one_and_lengths_are_honoured(tokenizers):
    query, context = tokenizers
    one = context("heat flow")
    assert one["input_ids"].shape == (1, 48)
    assert context(["heat", "heat flow"], padding="longest")["input_ids"].shape == (2, 5)
    assert context(["a " * 99], max_length=99)["input_ids"].shape == (1, 48)
    assert context(["a " * 99], max_length=20)["attention_mask"].sum() == 20
    assert query(["heat"], padding="longest")["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="padding must be"):
        query("heat", padding="shortest")
    with pytest.raises(ValueError, match="truncation cannot be switched off"):
        context("heat", truncation=False)


def test_tokenizers_round_trip(tokenizers, tmp_path):
    for tokenizer in tokenizers:
        tokenizer.save_pretrained(tmp_path / tokenizer.subfolder)
        again = type(tokenizer).from_pretrained(tmp_path, subfolder=tokenizer.subfolder)
        assert again.settings == tokenizer.settings
        np.testing.assert_array_equal(
            again("Cats? run")["input_ids"], tokenizer("Cats? run")["input_ids"]
        )
    with pytest.raises(FileNotFoundError, match="there is no folder elsewhere"):
        FLMRQueryEncoderTokenizer.from_pretrained(tmp_path, subfolder="elsewhere")


def reference(folder, ids, attended, kept, prefix="query"):
    """torch's BERT, the projection, the mask, the normalisation; and what BERT shows of itself."""
    torch = pytest.importorskip("torch", reason="torch is the reference, and is not installed")
    import transformers

    fields = json.loads((folder / "config.json").read_text())["text_config"]
    fields = {k: v for k, v in fields.items() if k != "model_type"}
    config = transformers.BertConfig(**fields)
    config._attn_implementation = "eager"
    bert = transformers.BertModel(config).eval()
    tensors = {k: torch.from_numpy(v) for k, v in load_file(folder / "model.safetensors").items()}
    start = f"{prefix}_text_encoder.bert_model."
    bert.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if start in k})
    linear = tensors[f"{prefix}_text_encoder_linear.weight"]
    with torch.no_grad():
        out = bert(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(attended).long(),
            output_attentions=True,
            output_hidden_states=True,
        )
        rows = out.last_hidden_state @ linear.T * torch.from_numpy(kept)[..., None]
        unit = torch.nn.functional.normalize(rows, dim=-1)
    return rows.numpy(), unit.numpy(), out


def test_query_and_doc_equal_torch(folder, model, tokenizers):
    q = tokenizers[0](QUERIES)
    kept = np.ones(q["input_ids"].shape, "f4")
    rows, unit, theirs = reference(folder, q["input_ids"], q["attention_mask"], kept)
    out = model.query(**q, output_attentions=True, output_hidden_states=True)
    np.testing.assert_allclose(out.late_interaction_output, unit, atol=1e-5)
    np.testing.assert_allclose(out.pooler_output, rows[:, 0], atol=1e-4)
    assert len(out.text_encoder_attentions) == 2 and len(out.text_encoder_hidden_states) == 3
    attended = q["attention_mask"].astype(bool)
    for a, b in zip(out.text_encoder_attentions, theirs.attentions, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-5)
    for a, b in zip(out.text_encoder_hidden_states, theirs.hidden_states, strict=True):
        np.testing.assert_allclose(a[attended], b.numpy()[attended], atol=1e-4)

    d = tokenizers[1](DOCUMENTS)
    skip = {support.vocabulary().index(c) for c in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"} | {0}
    kept = (~np.isin(d["input_ids"], list(skip))).astype("f4")
    _, unit, _ = reference(folder, d["input_ids"], d["attention_mask"], kept)
    out = model.doc(d["input_ids"], d["attention_mask"])
    np.testing.assert_allclose(out.late_interaction_output, unit, atol=1e-5)
    np.testing.assert_allclose(out.pooler_output, unit[:, 0], atol=1e-5)
    np.testing.assert_array_equal(out.context_mask[..., 0], kept.astype(bool))
    assert model.doc(d["input_ids"], d["attention_mask"], return_mask=False).context_mask is None


def test_keep_dims_false_gives_the_documents_own_rows(model, tokenizers):
    d = tokenizers[1](DOCUMENTS)
    whole = model.doc(d["input_ids"], d["attention_mask"])
    rows = model.doc(d["input_ids"], d["attention_mask"], keep_dims=False).late_interaction_output
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(
            row,
            np.asarray(whole.late_interaction_output[i])[np.asarray(whole.context_mask)[i, :, 0]],
        )


def test_scores_are_sums_of_maxima(model, tokenizers):
    out = model(**inputs(tokenizers))
    q, d = map(np.asarray, (out.query_late_interaction_output, out.context_late_interaction_output))
    mask = np.asarray(d.any(axis=-1))
    expected = np.array(
        [
            [(q[i] @ d[2 * i + j].T)[:, mask[2 * i + j]].max(axis=1).sum() for j in range(2)]
            for i in range(2)
        ]
    )
    np.testing.assert_allclose(out.scores, expected, rtol=1e-5)


def test_score_of_a_document_without_a_token(model):
    rng = np.random.default_rng(0)
    q, d = support.unit_rows(rng, 1, 3, 16), support.unit_rows(rng, 2, 4, 16)
    mask = np.zeros((2, 4, 1), bool)
    mask[0, 1] = True
    scores = model.score(q, d, mask)
    np.testing.assert_allclose(scores, [(q[0] @ d[0, 1]).sum(), -9999 * 3], rtol=1e-5)
    with pytest.raises(ValueError, match="3 queries and 2 documents"):
        model.score(np.zeros((3, 3, 16)), d, mask)


def test_which_loss(model, tokenizers):
    arguments = inputs(tokenizers)
    new = model(**arguments)
    old = model(**arguments, own_documents_loss=True)
    alone = model(**arguments, use_in_batch_negatives=False)
    assert new.loss == new.in_batch_negative_loss == old.in_batch_negative_loss
    assert old.loss == alone.loss != new.loss and alone.in_batch_negative_loss is None
    assert len(model(**arguments, return_dict=False)) == 5
    assert len(model(**arguments, return_dict=False, output_attentions=True)) == 7


def test_number_of_documents(model, tokenizers):
    arguments = inputs(tokenizers, documents=DOCUMENTS)
    with pytest.raises(ValueError, match="2 queries with num_negative_examples=1 need 4"):
        model(**arguments)
    assert model(**arguments, num_negative_examples=0).scores.shape == (2, 1)
    assert len(model.rank("cats run", [*DOCUMENTS, "a", "b", "c"], k=3).positions) == 3


def test_images_are_refused_by_name(model, tokenizers):
    q = tokenizers[0](QUERIES)
    with pytest.raises(NotImplementedError, match="FLMR's text part"):
        model.query(**q, pixel_values=np.zeros((2, 3, 224, 224)))
    with pytest.raises(NotImplementedError, match="FLMR's text part"):
        model.query(**q, concat_output_from_vision_encoder=True)
    half = model.query(**q, concat_output_from_text_encoder=[True, False])
    assert np.asarray(half.late_interaction_output)[0].any()
    assert not np.asarray(half.late_interaction_output)[1].any()


def test_instructions_are_masked(tmp_path):
    folder = support.write_flmr(tmp_path / "c", mask_instruction_token=":")
    model = FLMRModelForRetrieval.from_pretrained(folder, dtype="float32")
    q = model.query_tokenizer(["search a city : big river", "no instruction"])
    rows = np.asarray(model.query(**q).late_interaction_output).any(axis=-1)
    # [CLS] [Q] find a city : big river [SEP] [MASK]...
    assert rows[0].tolist() == [True, True] + [False] * 4 + [True] * 10
    assert rows[1].all()
    ours = model.colbert().encode_queries(["search a city : big river"])
    assert ours[0].any(axis=-1).sum() == 12


def test_without_punctuation_masking(tmp_path):
    folder = support.write_flmr(tmp_path / "c", mask_punctuation=False)
    model = FLMRModelForRetrieval.from_pretrained(folder)
    d = model.context_tokenizer("heat, flow.")
    assert model.doc(d["input_ids"], d["attention_mask"]).context_mask.sum() == 7


def test_two_encoders(tmp_path):
    folder = support.write_flmr(tmp_path / "c", separate=True)
    model = FLMRModelForRetrieval.from_pretrained(folder, dtype="float32")
    assert set(model.params) == {"context", "query"}
    q = model.query_tokenizer(QUERIES)
    ones = np.ones(q["input_ids"].shape, "f4")
    _, unit, _ = reference(folder, q["input_ids"], q["attention_mask"], ones)
    np.testing.assert_allclose(model.query(**q).late_interaction_output, unit, atol=1e-5)
    _, unit, _ = reference(folder, q["input_ids"], q["attention_mask"], ones, "context")
    colbert = model.colbert()
    np.testing.assert_allclose(
        colbert.encode_queries(QUERIES), model.query(**q).late_interaction_output, atol=1e-5
    )
    assert np.abs(unit - np.asarray(model.query(**q).late_interaction_output)).max() > 0.1


def test_gradients_reach_every_used_parameter(model, tokenizers):
    arguments = inputs(tokenizers)
    gradients = jax.grad(lambda params: model(**arguments, params=params).loss)(model.params)
    leaves = jax.tree.leaves(gradients)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    # Keys have no bias gradient worth the name: softmax does not see it. The rest has.
    assert sum(bool(np.abs(leaf).max() > 0) for leaf in leaves) >= len(leaves) - 4


def test_random_weights_and_saving(tokenizers, tmp_path, folder):
    config = FLMRConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="pass query_tokenizer or context_tokenizer"):
        FLMRModelForRetrieval(config)
    model = FLMRModelForRetrieval(config, *tokenizers, seed=3, dtype="float32")
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # over itself
    assert (tmp_path / "README.md").read_text() == "mine" and detect_layout(tmp_path) == "flmr"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("README.md", "config.json", "context_tokenizer", "model.safetensors", "query_tokenizer")
    ]
    again = FLMRModelForRetrieval.from_pretrained(tmp_path, dtype="float32")
    assert again.config.dim == 16 and again.query_tokenizer.settings["query_maxlen"] == 16
    q = tokenizers[0](QUERIES)
    np.testing.assert_array_equal(
        model.query(**q).late_interaction_output, again.query(**q).late_interaction_output
    )


def test_configurations_keep_upstreams_defaults(tmp_path):
    config = FLMRConfig(text_config={"vocab_size": 99}, dim=64, extra="kept")
    assert config.text_config.hidden_size == 768 and config.vision_config.patch_size == 32
    diff = config.to_diff_dict()
    assert diff["dim"] == 64 and diff["extra"] == "kept" and "mask_punctuation" not in diff
    assert diff["text_config"] == {"model_type": "flmr_text_model", "vocab_size": 99}
    config.save_pretrained(tmp_path)
    assert FLMRConfig.from_pretrained(tmp_path) == config
    both = FLMRConfig.from_text_vision_configs(FLMRTextConfig(), FLMRVisionConfig(), dim=8)
    assert both.dim == 8 and both.text_config == FLMRTextConfig()
    with pytest.raises(TypeError, match="expected FLMRTextConfig"):
        FLMRConfig(text_config=3)


def test_index_and_search(model, tmp_path):
    texts = support.passages(60)
    path = index_custom_collection(
        [texts[0], *((text, None, None) for text in texts[1:])],
        model,
        index_root_path=tmp_path,
        nbits=4,
        doc_maxlen=12,
    )
    assert path == str(tmp_path / "default_experiment" / "indexes" / "index.nbits=4")

    searcher = create_searcher(index_root_path=tmp_path, nbits=4)
    assert searcher.index.lengths.max() <= 12
    q = model.query_tokenizer(texts[:3])
    embeddings = model.query(**q).late_interaction_output
    queries = {f"q{i}": text for i, text in enumerate(texts[:3])}
    ranking = search_custom_collection(searcher, queries, embeddings, 5).todict()
    assert list(ranking) == ["q0", "q1", "q2"]
    assert [rank for _, rank, _ in ranking["q1"]] == [1, 2, 3, 4, 5]
    ids, ranks, scores = searcher.search(texts[1], k=5)
    assert ids == [i for i, _, _ in ranking["q1"]] and ranks == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(scores, [score for *_, score in ranking["q1"]], rtol=1e-4)
    exact = searcher.index.search(np.asarray(embeddings), 5, mode="exact")
    for arguments in ({"exact": True}, {"mode": "exact"}):
        found = search_custom_collection(searcher, queries, embeddings, 5, **arguments).todict()
        assert [i for i, *_ in found["q2"]] == exact.positions[2].tolist()
    assert search_custom_collection(searcher, {}, np.asarray(embeddings)[:0]).todict() == {}
    with pytest.raises(ValueError, match="contradict each other"):
        search_custom_collection(searcher, queries, embeddings, exact=True, mode="fast")
    with pytest.raises(ValueError, match="2 queries, but embeddings of 3"):
        search_custom_collection(searcher, {"a": "", "b": ""}, embeddings)
    with pytest.raises(NotImplementedError, match="document 0 has an image"):
        index_custom_collection([("a", None, "a.jpg")], model, tmp_path / "new")
    with pytest.raises(TypeError, match="document 1 must be a string"):
        index_custom_collection(["a", 3], model, tmp_path / "new")


def test_an_index_that_is_there_is_of_this_collection_and_model(folder, model, tmp_path):
    texts = support.passages(30)

    def build(texts=texts, model=model, doc_maxlen=12, **more):
        return index_custom_collection(texts, model, tmp_path, doc_maxlen=doc_maxlen, **more)

    path = tmp_path / "default_experiment" / "indexes" / "index.nbits=8"
    path.mkdir(parents=True)  # an empty folder is no index
    assert build() == str(path)
    before = json.loads((path / "metadata.json").read_text())
    assert build() == build([(text, None, None) for text in texts]) == str(path)
    assert build(model=folder) == str(path)
    other = support.write_flmr(tmp_path / "other", seed=5)
    for changes, message in (
        ({"texts": ["put in front.", *texts]}, "30 documents, not these 31"),
        ({"texts": texts[:-1]}, "30 documents, not these 29"),
        ({"texts": [*texts[:7], "changed.", *texts[8:]]}, "document 7 is another one"),
        ({"texts": texts[::-1]}, "document 0 is another one"),
        ({"model": other}, "built with another model or another doc_maxlen"),
        ({"doc_maxlen": 13}, "built with another model or another doc_maxlen"),
    ):
        with pytest.raises(FileExistsError, match=f"{message}; pass overwrite=True to replace it"):
            build(**changes)
    assert json.loads((path / "metadata.json").read_text()) == before
    build(texts[::-1], overwrite=True)
    assert create_searcher(tmp_path).index.texts[0] == texts[-1]
    Index.build(path, model.colbert(doc_maxlen=12), texts, store_texts=False, overwrite=True)
    with pytest.raises(FileExistsError, match="keeps no texts, so nobody knows"):
        build()


def test_too_long_and_unknown_ids_are_refused(model):
    ids = np.full((1, 97), 5)
    with pytest.raises(ValueError, match="97 tokens, the encoder 96 positions"):
        model.query(ids, np.ones_like(ids))
    ids = np.array([[1, 99999]])
    with pytest.raises(ValueError, match=r"input_ids lie in 1\.\.99999"):
        model.doc(ids, np.ones_like(ids))
    with pytest.raises(ValueError, match="forward takes query_input_ids"):
        model.forward()


def test_the_index_remembers_other_settings(folder, tmp_path):
    """Settings of tokenizers and configuration that the checkpoint itself does not have."""
    query = FLMRQueryEncoderTokenizer.from_pretrained(
        folder, query_maxlen=24, attend_to_mask_tokens=True
    )
    config = FLMRConfig.from_pretrained(folder, mask_punctuation=False)
    model = FLMRModelForRetrieval.from_pretrained(folder, query, config=config, dtype="float32")
    index_custom_collection(support.passages(40), model, index_root_path=tmp_path, doc_maxlen=48)
    searcher = create_searcher(index_root_path=tmp_path)
    expected = model.query(**query("what")).late_interaction_output
    assert searcher.encode("what").shape == (1, 24, 16) == expected.shape
    np.testing.assert_allclose(searcher.encode("what"), expected, atol=1e-5)


def test_unsupported_overrides_are_refused(folder):
    config = FLMRConfig.from_pretrained(folder, query_mask_input_ids_skip_list=[5])
    with pytest.raises(ValueError, match="query_mask_input_ids_skip_list is not supported"):
        FLMRModelForRetrieval.from_pretrained(folder, config=config)


def test_saving_two_encoders_says_so(tmp_path):
    folder = support.write_flmr(tmp_path / "c", separate=True)
    config = FLMRConfig.from_pretrained(folder, separate_query_and_context_text_encoder=False)
    model = FLMRModelForRetrieval.from_pretrained(folder, config=config)
    model.save_pretrained(tmp_path / "out")
    assert set(FLMRModelForRetrieval.from_pretrained(tmp_path / "out").params) == {
        "context",
        "query",
    }
