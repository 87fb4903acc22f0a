"""Queries and documents with images against a plain statement of the model in torch."""

import json

import jax
import numpy as np
import pytest
import support
from safetensors.numpy import load_file

from colbert_jax.checkpoints.common import get_path
from colbert_jax.checkpoints.flmr import _side_names
from colbert_jax.flmr import (
    FLMRConfig,
    FLMRModelForRetrieval,
    create_searcher,
    index_custom_collection,
    search_custom_collection,
)
from colbert_jax.models.flmr import image_names

TEXTS = ["find a city : what river?", "search : cats run", "no instruction"]
DOCUMENTS = ["paris is the capital, of france.", "berlin is the capital of germany.", "heat flow"]
TEXT_ROWS, PREFIX, PATCHES = 16, 4, 16
SHAPE = (3, 32, 32)


def opened(tmp_path_factory, name, **settings):
    folder = support.write_preflmr(tmp_path_factory.mktemp(name) / "checkpoint", **settings)
    return folder, FLMRModelForRetrieval.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def preflmr(tmp_path_factory):
    return opened(tmp_path_factory, "preflmr")


@pytest.fixture(scope="module")
def flmr(tmp_path_factory):
    """No mapping network, one text encoder."""
    return opened(tmp_path_factory, "flmr", mapping=0, separate=False)


def pixels(*leading, seed=0):
    return np.random.default_rng(seed).normal(size=(*leading, *SHAPE)).astype(np.float32)


def reference(folder):
    pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    module = pytest.importorskip("flmr_reference")
    tensors = module.tensors_of(load_file(folder / "model.safetensors"))
    return module, tensors, json.loads((folder / "config.json").read_text())


def kept_after_instruction(ids):
    end, rows = support.vocabulary().index(":"), np.ones(ids.shape, "f4")
    for row, tokens in zip(rows, ids.tolist(), strict=True):
        if end in tokens:
            row[2 : tokens.index(end) + 1] = 0
    return rows


def their_query(folder, q, images, heads):
    module, tensors, fields = reference(folder)
    ids = q["input_ids"]
    kept = kept_after_instruction(ids) if heads else np.ones(ids.shape, "f4")
    rows = module.query_rows(tensors, fields, *q.values(), kept, images, heads)
    return rows.detach().numpy(), module.unit(rows).detach().numpy()


def test_preflmr_queries_equal_torch(preflmr):
    folder, model = preflmr
    q, images = model.query_tokenizer(TEXTS), pixels(3)
    rows, unit = their_query(folder, q, images[:, None], heads=2)
    out = model.query(**q, pixel_values=images, output_attentions=True, output_hidden_states=True)
    assert out.late_interaction_output.shape == (3, TEXT_ROWS + PREFIX + PATCHES, 16)
    np.testing.assert_allclose(out.late_interaction_output, unit, atol=1e-5)
    np.testing.assert_allclose(out.pooler_output, rows[:, 0], atol=1e-4)
    # [CLS] and [Q] stay, the instruction goes, up to and with its colon.
    alive = np.asarray(out.late_interaction_output).any(axis=-1)
    assert alive[0].tolist() == [True] * 2 + [False] * 7 + [True] * 27 and alive[2].all()
    assert len(out.vision_encoder_hidden_states) == 4 and len(out.vision_encoder_attentions) == 3
    np.testing.assert_allclose(np.asarray(out.vision_encoder_attentions[0]).sum(-1), 1, rtol=1e-5)
    one = model.query(**q, pixel_values=images[:, None]).late_interaction_output
    np.testing.assert_array_equal(one, out.late_interaction_output)


def test_regions_equal_torch(preflmr, flmr):
    """With the mapping network each region's patches meet the text by themselves."""
    for (folder, model), heads, rows in ((preflmr, 2, PREFIX + PATCHES), (flmr, None, PREFIX)):
        q, images = model.query_tokenizer(TEXTS[:2]), pixels(2, 3)
        out = model.query(**q, pixel_values=images).late_interaction_output
        assert out.shape == (2, TEXT_ROWS + 3 * rows, 16)
        np.testing.assert_allclose(out, their_query(folder, q, images, heads)[1], atol=1e-5)


def test_features_in_place_of_images(preflmr, flmr):
    _, model = flmr
    q, images = model.query_tokenizer(TEXTS[:2]), pixels(2, 3)
    seen = model.encode_image(images)
    assert seen.class_token.shape == (2, 3, 24) and seen.patches.shape == (2, 3, 16, 24)
    whole = model.query(**q, pixel_values=images).late_interaction_output
    features = np.asarray(seen.class_token)
    out = model.query(**q, image_features=features).late_interaction_output
    np.testing.assert_allclose(out, whole, atol=1e-6)
    one = model.query(**q, image_features=features[:, 0]).late_interaction_output
    np.testing.assert_allclose(one, np.asarray(whole)[:, : TEXT_ROWS + PREFIX], atol=1e-6)
    with pytest.raises(ValueError, match=r"image_features must be \[2, 24\] or \[2, regions, 24\]"):
        model.query(**q, image_features=features[:1])
    with pytest.raises(ValueError, match="either pixel_values or image_features"):
        model.query(**q, image_features=features, pixel_values=images)
    with pytest.raises(ValueError, match="mapping network needs the patches"):
        preflmr[1].query(**q, image_features=features)


def test_documents_with_images_equal_torch(preflmr):
    folder, model = preflmr
    module, tensors, fields = reference(folder)
    d, images = model.context_tokenizer(DOCUMENTS), pixels(3)
    ids, attended = d["input_ids"], d["attention_mask"]
    skip = [support.vocabulary().index(c) for c in ".,"] + [0]
    kept = ~np.isin(ids, skip)
    seen = module.clip_states(
        tensors, "query", fields["vision_config"], module.torch.from_numpy(images)
    )
    vision = module.project(tensors, "query", seen[-1][:, :1], 16)
    states = module.bert_states(tensors, "context", fields["text_config"], ids, attended)
    text = module.apply(tensors, "context_text_encoder_linear", states)
    rows = module.torch.cat([vision, text * module.torch.from_numpy(kept)[..., None]], dim=1)
    out = model.doc(ids, attended, images, concat_output_from_vision_encoder=True)
    assert out.late_interaction_output.shape == (3, PREFIX + 48, 16)
    np.testing.assert_allclose(
        out.late_interaction_output, module.unit(rows).detach().numpy(), atol=1e-5
    )
    mask = np.asarray(out.context_mask)[..., 0]
    np.testing.assert_array_equal(mask, np.pad(kept, ((0, 0), (PREFIX, 0)), constant_values=True))
    lists = model.doc(
        ids, attended, images, None, [True, False, True], [True, True, False], keep_dims=False
    ).late_interaction_output
    expected = [PREFIX + kept[0].sum(), kept[1].sum(), PREFIX]
    assert [len(rows) for rows in lists] == expected
    np.testing.assert_allclose(lists[2], np.asarray(out.late_interaction_output)[2, :PREFIX])
    with pytest.warns(UserWarning, match="images of documents are left out"):
        left = model.doc(ids, attended, images)
    np.testing.assert_array_equal(
        left.late_interaction_output, model.doc(ids, attended).late_interaction_output
    )


def test_what_is_concatenated(preflmr):
    _, model = preflmr
    q, images = model.query_tokenizer(TEXTS), pixels(3)

    def rows(**flags):
        return np.asarray(model.query(**q, pixel_values=images, **flags).late_interaction_output)

    whole = rows()
    vision, text = "concat_output_from_vision_encoder", "concat_output_from_text_encoder"
    np.testing.assert_array_equal(rows(**{text: False}), whole[:, TEXT_ROWS:])
    np.testing.assert_array_equal(rows(**{vision: False}), whole[:, :TEXT_ROWS])
    some = rows(**{text: [True, False, True], vision: [True, True, False]})
    np.testing.assert_array_equal(some[0], whole[0])
    np.testing.assert_array_equal(some[1, TEXT_ROWS:], whole[1, TEXT_ROWS:])
    assert not some[1, :TEXT_ROWS].any() and not some[2, TEXT_ROWS:].any()
    with pytest.raises(ValueError, match="has 2 flags for 3 rows"):
        rows(**{vision: [True, False]})
    with pytest.raises(ValueError, match="leaves nothing"):
        rows(**{vision: False, text: False})


def test_text_queries_of_a_model_with_images(preflmr):
    """The configuration asks for images; without any the query is its text."""
    _, model = preflmr
    assert model.config.query_concat_output_from_vision_encoder
    q = model.query_tokenizer(TEXTS)
    alone = np.asarray(model.query(**q).late_interaction_output)
    whole = np.asarray(model.query(**q, pixel_values=pixels(3)).late_interaction_output)
    np.testing.assert_array_equal(alone, whole[:, :TEXT_ROWS])
    for ours, rows in zip(model.colbert().encode_queries(TEXTS), alone, strict=True):
        kept = rows[rows.any(axis=-1)]  # a ColBERT gives them first, zeros after them
        np.testing.assert_allclose(ours[: len(kept)], kept, atol=1e-5)
    with pytest.raises(ValueError, match="asks for images; pass pixel_values"):
        model.query(**q, concat_output_from_vision_encoder=True)
    with pytest.raises(ValueError, match="leaves nothing of a text-only"):
        model.query(**q, concat_output_from_text_encoder=False)


def test_stages_one_by_one(preflmr):
    _, model = preflmr
    q, images = model.query_tokenizer(TEXTS), pixels(3)
    text, states = model.encode_text(**q)
    seen = model.encode_image(images)
    image = model.map_image(seen.class_token, seen.patches, states)
    whole = np.concatenate([text, image], axis=1)
    unit = whole / np.maximum(np.linalg.norm(whole, axis=-1, keepdims=True), 1e-12)
    expected = model.query(**q, pixel_values=images).late_interaction_output
    np.testing.assert_allclose(unit, expected, atol=1e-6)
    with pytest.raises(ValueError, match="takes patches and text for queries"):
        model.map_image(seen.class_token)
    assert model.map_image(seen.class_token, side="context").shape == (3, PREFIX, 16)
    with pytest.raises(ValueError, match="side must be"):
        model.encode_image(images, side="document")


def forward_arguments(model, ways=2, queries=2):
    q = model.query_tokenizer(TEXTS[:queries])
    d = model.context_tokenizer([DOCUMENTS[i % 3] for i in range(ways * queries)])
    return dict(
        query_input_ids=q["input_ids"],
        query_attention_mask=q["attention_mask"],
        query_pixel_values=pixels(queries),
        context_input_ids=d["input_ids"],
        context_attention_mask=d["attention_mask"],
    )


def test_forward_with_images(preflmr):
    _, model = preflmr
    arguments = forward_arguments(model)
    out = model(**arguments)
    queries, documents = (
        np.asarray(x)
        for x in (out.query_late_interaction_output, out.context_late_interaction_output)
    )
    assert queries.shape == (2, TEXT_ROWS + PREFIX + PATCHES, 16)
    own = documents[1][documents[1].any(axis=-1)]
    np.testing.assert_allclose(out.scores[0, 1], (queries[0] @ own.T).max(-1).sum(), rtol=1e-4)
    both = model(
        **arguments, context_pixel_values=pixels(4), context_concat_output_from_vision_encoder=True
    )
    assert both.context_late_interaction_output.shape == (4, PREFIX + 48, 16)


def test_images_that_do_not_fit(preflmr):
    _, model = preflmr
    q = model.query_tokenizer(TEXTS[:2])
    for images, message in (
        (pixels(3), r"must be \[2, 3, 32, 32\] or \[2, regions, 3, 32, 32\] .* got \[3, 3, 32"),
        (pixels(2)[..., :16], r"got \[2, 3, 32, 16\]"),
        (pixels(2).transpose(0, 2, 3, 1), r"got \[2, 32, 32, 3\]"),
        (pixels(2, 0), r"got \[2, 0, 3, 32, 32\]"),
        (np.zeros((2, *SHAPE), np.uint8), "pixel_values must be normalised floats, got uint8"),
        (pixels(2) * np.array([1, np.nan])[:, None, None, None], "pixel_values of item 1 hold NaN"),
        ("a.jpg", "must be normalised floats"),
    ):
        with pytest.raises(ValueError, match=message):
            model.query(**q, pixel_values=images)


def test_an_image_where_there_is_no_vision_encoder(preflmr):
    folder, whole = preflmr
    config = FLMRConfig.from_pretrained(folder, use_vision_encoder=False)
    with pytest.warns(UserWarning, match="only its text part is read"):
        model = FLMRModelForRetrieval.from_pretrained(folder, config=config, dtype="float32")
    q = model.query_tokenizer(TEXTS[:2])
    for call in (
        lambda: model.query(**q, pixel_values=pixels(2)),
        lambda: model.query(**q, image_features=np.zeros((2, 24))),
        lambda: model.encode_image(pixels(2)),
    ):
        with pytest.raises(NotImplementedError, match="without a vision encoder"):
            call()
    assert model.images is None and set(model.params) == {"context", "query"}
    alone = model.query(**q).late_interaction_output
    np.testing.assert_array_equal(alone, whole.query(**q).late_interaction_output)


def test_saved_and_read_again(preflmr, tmp_path):
    folder, model = preflmr
    model.save_pretrained(tmp_path)
    again = FLMRModelForRetrieval.from_pretrained(tmp_path, dtype="float32")
    assert again.images == model.images
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    # The fields that differ from the defaults.
    assert after["vision_config"].items() <= before["vision_config"].items()
    assert "query_concat_output_from_vision_encoder" not in after  # the default
    q, images = model.query_tokenizer(TEXTS), pixels(3)
    np.testing.assert_array_equal(
        again.query(**q, pixel_values=images).late_interaction_output,
        model.query(**q, pixel_values=images).late_interaction_output,
    )


@pytest.mark.parametrize("own", [False, True])
def test_random_weights(preflmr, own):
    folder, known = preflmr
    fields = {"separate_query_and_context_vision_encoder": own}
    config = FLMRConfig.from_pretrained(
        folder, transformer_mapping_config_base=str(folder / "mapping"), **fields
    )
    model = FLMRModelForRetrieval(config, known.query_tokenizer, dtype="float32")
    assert ("context_images" in model.params) == own and model.images == known.images
    d = known.context_tokenizer(DOCUMENTS)
    out = model.doc(
        d["input_ids"], d["attention_mask"], pixels(3), concat_output_from_vision_encoder=True
    )
    assert out.late_interaction_output.shape == (3, PREFIX + 48, 16)


def test_the_vision_encoder_is_frozen(preflmr):
    folder, model = preflmr
    arguments = forward_arguments(model, ways=1)

    def gradients(model):
        loss = lambda params: model(**arguments, num_negative_examples=0, params=params).loss  # noqa: E731
        return jax.grad(loss)(model.params)["images"]

    largest = {
        part: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        for part, tree in gradients(model).items()
    }
    assert largest["vision"] == 0 and largest["projection"] > 0 and largest["mapping"] > 0
    free = FLMRModelForRetrieval.from_pretrained(folder, dtype="float32", freeze_vision=False)
    assert np.abs(gradients(free)["vision"]["class_token"]).max() > 0


@pytest.mark.parametrize("ways", [1, 2])
def test_loss_and_gradients_equal_torch(preflmr, ways):
    folder, model = preflmr
    arguments = forward_arguments(model, ways=ways)
    module, tensors, fields = reference(folder)
    for name, tensor in tensors.items():
        tensor.requires_grad_("vision_encoder" not in name)
    ids, attended = arguments["query_input_ids"], arguments["query_attention_mask"]
    images = arguments["query_pixel_values"][:, None]
    kept = kept_after_instruction(ids)
    queries = module.query_rows(tensors, fields, ids, attended, kept, images, heads=2)
    ids, attended = arguments["context_input_ids"], arguments["context_attention_mask"]
    kept = ~np.isin(ids, [support.vocabulary().index(c) for c in ".,"] + [0])
    documents = module.document_rows(tensors, fields, ids, attended, kept)
    theirs = module.in_batch_loss(module.unit(queries), module.unit(documents), kept, ways)
    theirs.backward()

    def loss(params):
        return model(**arguments, num_negative_examples=ways - 1, params=params).loss

    ours, gradients = jax.value_and_grad(loss)(model.params)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-4)
    encoder = model.checkpoint().encoder
    pairs = [
        *((("query", *path), name) for path, name in _side_names(encoder, "query").items()),
        *((("context", *path), name) for path, name in _side_names(encoder, "context").items()),
        *((("images", *path), name) for path, name in image_names(model.images, "query").items()),
    ]
    for path, name in pairs:
        gradient = np.asarray(get_path(gradients, path))
        if "vision_encoder" in name:
            assert not gradient.any(), name
            continue
        expected = tensors[name].grad.numpy()
        expected = expected.T if path[-1] == "kernel" else expected
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradient, expected, atol=1e-4 * scale, err_msg=name)


def test_image_queries_search_an_index_of_texts(preflmr, tmp_path):
    """PreFLMR's documents are texts: only the queries' embeddings come from images."""
    _, model = preflmr
    texts = support.passages(60)
    index_custom_collection(texts, model, index_root_path=tmp_path, doc_maxlen=48)
    searcher = create_searcher(index_root_path=tmp_path)
    q = model.query_tokenizer(TEXTS)
    rows = model.query(**q, pixel_values=pixels(3)).late_interaction_output
    ranking = search_custom_collection(searcher, dict(enumerate(TEXTS)), rows, 5, exact=True)
    d = model.context_tokenizer(texts)
    out = model.doc(d["input_ids"], d["attention_mask"])
    scores = model.score_matrix(rows, out.late_interaction_output, out.context_mask)
    for i, hits in ranking.todict().items():
        best = np.sort(np.asarray(scores[i]))[::-1][:5]
        np.testing.assert_allclose([score for *_, score in hits], best, rtol=0.02)  # 8 bits
        assert hits[0][0] == scores[i].argmax()
    assert searcher.encode(TEXTS).shape == (3, TEXT_ROWS, 16)
