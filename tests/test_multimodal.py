"""Queries and documents with images, from a caller's list to hits, against
`FLMRModelForRetrieval`."""

import json
import pickle
import shutil
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import support
from PIL import Image
from safetensors.numpy import load_file, save_file

from colbert_jax import ColBERT, Index, Retriever
from colbert_jax.checkpoints import hub
from colbert_jax.cli import main
from colbert_jax.flmr import (
    FLMRConfig,
    FLMRModelForRetrieval,
    create_searcher,
    index_custom_collection,
)
from colbert_jax.images import ImageConfig, ImageError, pixel_values
from colbert_jax.training.trainer import TrainingConfig, train

TEXT, PREFIX, PATCHES = 16, 4, 16
QUESTION = "find a city : what river?"


def photograph(seed, size=(40, 33)):
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return support.write_preflmr(
        tmp_path_factory.mktemp("preflmr") / "checkpoint",
        config={"num_hidden_layers": 1},
        vision={"num_hidden_layers": 1},
    )


def load(folder, **settings):
    return ColBERT.from_pretrained(folder, dtype="float32", devices=jax.devices()[:1], **settings)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five files."""
    place = tmp_path_factory.mktemp("photos")
    paths = [place / f"{n}.png" for n in range(5)]
    for n, path in enumerate(paths):
        photograph(n).save(path)
    return paths


@pytest.fixture(scope="module")
def retriever(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "index"
    return Retriever.build(path, model, support.passages(60), progress=False)


def of_flmr(model, queries):
    """Rows of each query, those of zeros left out."""
    found = []
    for query in queries:
        text, image = query if isinstance(query, tuple) else (query, None)
        size = model.config.vision_config.image_size
        pixels = None if image is None else pixel_values(image, ImageConfig.square(size))
        rows = model.query(**model.query_tokenizer([text]), pixel_values=pixels)
        rows = np.asarray(rows.late_interaction_output)[0]
        found.append(rows[rows.any(axis=-1)])
    return found


def assert_rows(encoded, expected, atol=1e-5):
    for ours, theirs in zip(encoded, expected, strict=True):
        np.testing.assert_allclose(ours[: len(theirs)], theirs, atol=atol)
        assert not ours[len(theirs) :].any()


def test_rows_equal_those_of_flmr(folder, model, photos):
    """More queries than a batch has, of texts alone and with images of every kind."""
    flmr = FLMRModelForRetrieval.from_pretrained(folder, dtype="float32")
    array = np.asarray(photograph(9))
    queries = [(f"{word} : {word}?", photos[n % 5]) for n, word in enumerate(support.WORDS[:20])]
    queries[3:3] = ["cats run", (QUESTION, photograph(7)), (QUESTION, None)]
    queries += [("", array), ("no instruction", photos[0].read_bytes()), "search : cats run"]
    encoded = model.encode_queries(queries)
    assert encoded.shape == (26, TEXT + PREFIX + PATCHES, 16)
    assert_rows(encoded, of_flmr(flmr, queries))
    assert_rows(flmr.colbert().encode_queries(queries[:5]), of_flmr(flmr, queries[:5]))
    # Texts alone are what they are without the image encoder.
    texts = ["cats run", QUESTION]
    alone = model.encode_queries(texts)
    assert alone.shape == (2, TEXT, 16)
    np.testing.assert_array_equal(alone, load(folder, images=False).encode_queries(texts))


def test_rows_do_not_depend_on_the_devices(folder, model, photos, eight_devices):
    queries = [("cats : who?", photos[0]), "a b", ("dogs", photos[1]), ("c", photos[2])]
    two = ColBERT.from_pretrained(folder, dtype="float32", devices=eight_devices[:2])
    np.testing.assert_allclose(
        two.encode_queries(queries), model.encode_queries(queries), atol=1e-6
    )


def test_the_configuration_says_what_is_concatenated(tmp_path, photos):
    queries = ["cats run", (QUESTION, photos[0])]
    for part, count in (("text", (TEXT, PREFIX)), ("vision", (TEXT, TEXT))):
        folder = support.write_preflmr(
            tmp_path / part,
            mapping=0,
            separate=False,
            config={"num_hidden_layers": 1},
            vision={"num_hidden_layers": 1},
            **{f"query_concat_output_from_{part}_encoder": False},
        )
        model = load(folder)
        flmr = FLMRModelForRetrieval.from_pretrained(folder, dtype="float32")
        if part == "vision":
            with pytest.warns(UserWarning, match="images of queries are left out"):
                encoded = model.encode_queries(queries)
        else:
            encoded = model.encode_queries(queries)
        assert [int(rows.any(axis=-1).sum()) for rows in encoded] == list(count)
        assert_rows(encoded, of_flmr(flmr, queries))
        model.save_pretrained(tmp_path / f"{part} again", "flmr")
        again = FLMRConfig.from_pretrained(tmp_path / f"{part} again")
        for name in ("text", "vision"):
            flag = f"query_concat_output_from_{name}_encoder"
            assert getattr(again, flag) == (name != part)


def test_search_and_rank(retriever, model, photos):
    queries = [(f"{w} : {w}?", photos[n % 5]) for n, w in enumerate(support.WORDS[:5])]
    queries[2:2] = ["cats run", "the heat of the sun"]
    found = retriever.search(queries, k=3, mode="exact")
    for query, hits in zip(queries, found, strict=True):
        (alone,) = retriever.search([query], k=3, mode="exact")
        assert [hit.id for hit in hits] == [hit.id for hit in alone]
    many = list(retriever.search_many(iter(queries), k=3, mode="exact"))
    assert [[h.id for h in hits] for hits in many] == [[h.id for h in hits] for hits in found]
    documents = support.passages(6, seed=3)
    ranked = retriever.rank(queries, documents)
    encoded, rows = model.encode_queries(queries), model.encode_documents(documents, progress=False)
    for q, hits in zip(encoded, ranked, strict=True):
        scores = [float((q @ d.T).max(axis=1).sum()) for d in rows]
        np.testing.assert_allclose([hit.score for hit in hits], sorted(scores)[::-1], rtol=1e-4)
    assert model.rank(queries, documents, 2).scores.shape == (7, 2)


def test_queries_of_images_are_searched_by_length(retriever, photos, monkeypatch):
    """Texts alone are not padded to the rows of images."""
    shapes, search = [], retriever.index.search
    monkeypatch.setattr("colbert_jax.retriever._SEARCHED", 2)

    def spy(encoded, *arguments, **settings):
        shapes.append(encoded.shape[:2])
        return search(encoded, *arguments, **settings)

    monkeypatch.setattr(retriever.index, "search", spy)
    queries = ["cats", ("river : a", photos[0]), "dogs", ("b", photos[1])]
    retriever.search(queries, k=1, mode="exact")
    assert shapes[1:] == [(2, TEXT + PREFIX + PATCHES), (2, TEXT)]


def test_bad_images_are_named_before_the_work(retriever, model, photos, tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("not a picture")
    queries = ["cats", ("a", photos[0]), ("b", tmp_path / "text.jpg"), ("c", "missing.jpg")]
    monkeypatch.setattr(model.tokenizer, "queries", lambda *_: pytest.fail("began to encode"))
    for call in (
        model.encode_queries,
        lambda queries: model.rank(queries, ["cats"]),
        retriever.search,
        lambda queries: list(retriever.search_many(iter(queries))),
    ):
        with pytest.raises(ImageError) as error:
            call(queries)
        lines = str(error.value).splitlines()
        assert lines[0] == "2 images of 3 cannot be used:"
        assert lines[1].startswith(f"  the image of query 2 ({tmp_path / 'text.jpg'}): not an im")
        assert lines[2] == "  the image of query 3 (missing.jpg): no such file"
    monkeypatch.undo()
    monkeypatch.setattr("colbert_jax.retriever._HITS", 0)
    with pytest.raises(ImageError, match=r"the image of query 40 \(missing.jpg\): no such file"):
        list(retriever.search_many(["cats"] * 40 + queries[3:], k=1))


def test_a_truncated_image_is_named(model, tmp_path):
    photograph(0, (400, 400)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"the image of query 1 \(.*half.jpg\): cannot be decoded"):
        model.encode_queries([("a", tmp_path / "whole.jpg"), ("b", tmp_path / "half.jpg"), "c"])


def test_what_is_no_query(model, folder):
    text_model = load(folder, images=False)
    with pytest.raises(TypeError, match="put the pair in a list"):
        model.encode_queries(("what river?", "photo.jpg"))
    assert text_model.encode_queries(("what river?", "photo.jpg")).shape == (2, TEXT, 16)
    for pair in ("a", 3), ("a", "b", "c"), (None, "b.jpg"):
        with pytest.raises((TypeError, ValueError), match="query 1"):
            model.encode_queries(["cats", pair])
    with pytest.raises(ValueError, match="query 1 has an image, but the model has no image"):
        text_model.encode_queries(["cats", ("a", "photo.jpg")])
    with pytest.raises(ValueError, match="query 0 is empty"):
        model.encode_queries([" ", ("a", None)])
    with pytest.raises(ValueError, match="query 0 is empty"):
        model.encode_queries([(" ", None)])


def test_the_text_part_alone(folder, model, photos, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = load(folder, images=False)
    assert alone.images is None and alone.load["images"] is False
    assert alone.fingerprint() == model.fingerprint()
    with pytest.warns(UserWarning, match="only its text part is read"):
        load(folder, images=None)
    alone.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match="read it with images=False"):
        model.save_pretrained(tmp_path / "other")
    one = support.write_preflmr(tmp_path / "one", mapping=0, separate=False)
    with pytest.raises(ValueError, match="load it with images=False"):
        train(load(one), SimpleNamespace(nway=2, scored=True), tmp_path / "run", TrainingConfig())


def test_saved_and_pickled(model, photos, tmp_path):
    queries = [("a river", photos[0])]
    expected = model.encode_queries(queries)
    model.save_pretrained(tmp_path / "again", "flmr")
    assert not (tmp_path / "again" / "preprocessor_config.json").exists()
    np.testing.assert_array_equal(load(tmp_path / "again").encode_queries(queries), expected)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.encode_queries(queries), expected)


def test_image_settings_of_the_checkpoint(folder, photos, tmp_path):
    """They are read, used, fetched from the hub, and written again."""
    target = shutil.copytree(folder, tmp_path / "c")
    fields = {"size": {"shortest_edge": 40}, "crop_size": 32, "image_mean": [0.5, 0.5, 0.5]}
    (target / "preprocessor_config.json").write_text(json.dumps(fields))
    model = load(target)
    config = ImageConfig.read(target)
    assert model.images.side.image_config == config and config.size == 40
    model.save_pretrained(tmp_path / "again", "flmr")
    assert ImageConfig.read(tmp_path / "again") == config
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert name in hub.needed_files(["config.json", name])
    (target / "preprocessor_config.json").write_text(json.dumps({"size": 48, "crop_size": 48}))
    with pytest.raises(ValueError, match="makes images of 48 by 48 pixels, and the vision tower"):
        load(target)


@pytest.mark.parametrize("settings", [ImageConfig(crop=None, size=(20, 30)), ImageConfig(size=50)])
def test_image_settings_round_trip(settings, tmp_path):
    settings.save(tmp_path)
    assert ImageConfig.read(tmp_path) == settings


def test_queries_without_expansion(folder, photos, tmp_path):
    """What patches attend to does not depend on the other queries."""
    model = load(folder, query_expansion=False)
    queries = [("cats", photos[0]), (" ".join(support.WORDS[:12]), photos[1]), "a"]
    encoded = model.encode_queries(queries)
    for query, rows in zip(queries, encoded, strict=True):
        (alone,) = model.encode_queries([query])
        np.testing.assert_allclose(rows[: len(alone)], alone[: len(rows)], atol=1e-6)
    path = tmp_path / "index"
    retriever = Retriever.build(path, model, support.passages(30), progress=False)
    found = retriever.search(queries, k=2, mode="exact")
    assert [hits[0].id for hits in found] == [
        retriever.search([query], k=1, mode="exact")[0][0].id for query in queries
    ]


def test_on_the_command_line(retriever, photos, capsys, one_device):
    index = str(retriever.index.path)
    assert main(["search", index, "what river?", "--image", str(photos[0]), "-k", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"what river? ({photos[0]})" and len(printed) == 4
    expected = retriever.search([("what river?", photos[0])], k=3)[0]
    assert [line.split()[2] for line in printed[1:]] == [hit.id for hit in expected]
    assert main(["search", index, "a", "--image", "missing.jpg"]) == 2
    assert "the image of query 0 (missing.jpg): no such file" in capsys.readouterr().err
    assert main(["search", index, "a", "b", "--image", str(photos[0])]) == 2
    assert "--image goes with one query" in capsys.readouterr().err


# --- Documents with images -----------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder):
    return FLMRModelForRetrieval.from_pretrained(folder, dtype="float32")


def document_rows(whole, text, pixels=None, features=None):
    d = whole.context_tokenizer([text])
    flag = None if pixels is None and features is None else True
    (rows,) = whole.doc(
        d["input_ids"],
        d["attention_mask"],
        pixels,
        None if features is None else features[None],
        concat_output_from_vision_encoder=flag,
        keep_dims=False,
    ).late_interaction_output
    return rows


def test_documents_equal_those_of_flmr(whole, model, photos):
    texts = support.passages(24, seed=5)
    documents = [(text, photos[n % 5]) if n % 3 else text for n, text in enumerate(texts)]
    encoded = model.encode_documents(documents, progress=False)
    pixels = pixel_values(photos, ImageConfig.square(32))
    for n, (text, rows) in enumerate(zip(texts, encoded, strict=True)):
        expected = document_rows(whole, text, pixels[n % 5][None] if n % 3 else None)
        np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_a_collection_of_flmr(whole, photos, tmp_path):
    """Upstream's triples and our pairs; the index that is there is of these images."""
    texts = support.passages(40, seed=6)
    pixels = pixel_values(photos, ImageConfig.square(32))
    features = np.asarray(whole.encode_image(pixels[:2]).class_token)  # [2, 1, 24]
    collection = [
        (texts[0], features[0, 0], None),
        (texts[1], np.concatenate(features), "not/opened.jpg"),
        (texts[2], None, str(photos[2])),
        (texts[3], photograph(3)),
        (texts[4], None),
        *texts[5:],
    ]

    def build(items=collection, **settings):
        return index_custom_collection(items, whole, tmp_path, doc_maxlen=48, **settings)

    index = Index.open(build())
    expected = [
        document_rows(whole, texts[0], pixels[:1]),
        document_rows(whole, texts[1], features=np.concatenate(features)),
        document_rows(whole, texts[2], pixels[2:3]),
        document_rows(whole, texts[3], pixels[3:4]),
        *(document_rows(whole, text) for text in texts[4:]),
    ]
    assert index.lengths.tolist() == [len(rows) for rows in expected]
    queries = whole.colbert().encode_queries([("cats : who?", photos[2]), "a b"])
    found = index.search(queries, k=5, mode="exact")
    searcher = create_searcher(tmp_path)
    positions, ranks, scores = searcher.search(("cats : who?", photos[2]), k=3)
    assert len(positions) == len(scores) == 3 and ranks == [1, 2, 3]
    for rows, scores in zip(queries, found.scores, strict=True):
        best = sorted((float((rows @ d.T).max(axis=1).sum()) for d in expected), reverse=True)
        np.testing.assert_allclose(scores, best[:5], rtol=0.02)  # 8 bits
    before = (index.path / "metadata.json").read_text()
    assert build() == str(index.path) and (index.path / "metadata.json").read_text() == before
    other = [*collection[:3], (texts[3], photograph(4)), *collection[4:]]
    with pytest.raises(FileExistsError, match="another collection: its images; pass overwrite"):
        build(other)
    with pytest.raises(FileExistsError, match="another collection: its images"):
        build(texts)
    with pytest.raises(ValueError, match=r"document 0: image_feature must be \[24\] or \[regions"):
        build([("a", np.zeros(7, np.float32), None)])
    with pytest.raises(ValueError, match="document 0: image_feature must be float"):
        build([("a", np.zeros(24, np.int32), None)])
    with pytest.raises(ImageError, match=r"the image of document 1 \(missing.jpg\): no such file"):
        build(["b", ("a", None, "missing.jpg")])


def records(photos, texts):
    return [
        {"id": f"d{n}", "text": text, "picture": photos[n] if n < 5 else None, "year": n}
        for n, text in enumerate(texts)
    ]


def test_a_retriever_of_documents_with_images(whole, model, folder, photos, tmp_path):
    texts = support.passages(30, seed=7)
    r = Retriever.build(
        tmp_path / "i", model, records(photos, texts), images="picture", progress=False
    )
    pixels = pixel_values(photos, ImageConfig.square(32))
    lengths = [
        len(document_rows(whole, text, pixels[n][None] if n < 5 else None))
        for n, text in enumerate(texts)
    ]
    assert r.index.lengths.tolist() == lengths
    assert set(r.index.field_names()) == {"year"}
    # A picture finds itself: its class token's rows are in the query too.
    found = r.search([("", photos[n]) for n in range(5)], k=1, mode="exact")
    assert len(found) == 5
    r.add([{"id": "new", "text": "a", "picture": photos[0]}], images="picture", progress=False)
    assert r.index.lengths[-1] == len(document_rows(whole, "a", pixels[:1]))
    assert len(Retriever.open(tmp_path / "i")) == 31
    with pytest.raises(ValueError, match="has documents with images, and the model has no image"):
        Retriever.open(tmp_path / "i", load(folder, images=False))
    other = shutil.copytree(folder, tmp_path / "other")
    changed = load_file(other / "model.safetensors")
    changed["query_vision_projection.model.0.bias"] += 1
    save_file(changed, other / "model.safetensors")
    with pytest.raises(ValueError, match="and the model encodes images otherwise"):
        Retriever.open(tmp_path / "i", load(other))
    with pytest.raises(ValueError, match="images, which it does not keep: build it again"):
        r.compact(retrain=True)
    with pytest.raises(ValueError, match="documents have images, but the model has no image"):
        Retriever.build(
            tmp_path / "j", load(folder, images=False), records(photos, texts), images="picture"
        )


def test_documents_with_images_on_the_command_line(model, folder, photos, tmp_path, one_device):
    """JSON lines that name files; what the index of such documents gets later has images too."""
    lines = [
        {"id": n, "text": text, "photo": str(photos[n])} for n, text in enumerate(["a", "b c"])
    ]
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps(line) + "\n" for line in lines))
    second.write_text(json.dumps({"id": 2, "text": "a", "photo": None}) + "\n")
    index, options = str(tmp_path / "i"), ["--images", "photo"]
    assert main(["index", str(first), index, "--checkpoint", str(folder), *options]) == 0
    assert main(["add", index, str(second), *options]) == 0
    opened = Index.open(index)
    plain = model.encode_documents(["a", "b c", "a"], progress=False).lengths
    assert (opened.lengths - plain).tolist() == [PREFIX, PREFIX, 0]
    assert opened.field_names() == {}


def test_an_index_of_texts_gets_no_images(retriever, photos):
    with pytest.raises(ValueError, match="was built for documents of texts"):
        retriever.add([{"id": "x", "text": "a", "p": photos[0]}], images="p", progress=False)


def test_bad_images_of_documents_are_named_before_the_work(model, photos, tmp_path, monkeypatch):
    photograph(0, (400, 400)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    texts = support.passages(1000, longest=4)
    listed = records(photos, texts)
    listed[700]["picture"], listed[900]["picture"] = "missing.jpg", tmp_path / "half.jpg"
    listed[950]["picture"] = np.zeros((2, 20_000_000), np.uint8)  # too long when it is resized
    monkeypatch.setattr(type(model), "encode_windows", lambda *_: pytest.fail("began to encode"))
    with pytest.raises(ImageError) as error:
        Retriever.build(tmp_path / "i", model, listed, images="picture", progress=False)
    lines = str(error.value).splitlines()
    assert lines[0] == "3 images of 8 cannot be used:"
    assert lines[1] == "  the image of document 700 (missing.jpg): no such file"
    assert lines[2].startswith(f"  the image of document 900 ({tmp_path / 'half.jpg'}): cannot be")
    assert lines[3].startswith("  the image of document 950 (array of shape (2, 20000000)): ")


def test_a_build_goes_on_with_the_same_images_only(model, photos, tmp_path, monkeypatch):
    """The contents of images are part of what a build that goes on must be of."""
    place = tmp_path / "photos"
    place.mkdir()
    for photo in photos:
        shutil.copy(photo, place)
    listed = records(sorted(place.iterdir()), support.passages(40, seed=8))
    monkeypatch.setattr("colbert_jax.index.sources.CHUNK_TOKENS", 300)
    original, encoded = type(model).encode_windows, []

    def fail(self, windows, bar=None):
        for n, part in enumerate(original(self, windows, bar)):
            if n == 2:
                raise RuntimeError("stopped")
            yield part

    def build():
        monkeypatch.setattr(type(model), "encode_windows", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            Retriever.build(tmp_path / "i", model, listed, images="picture", progress=False)

    def count(self, windows, bar=None):
        for window in windows:
            encoded.append(len(window))
            yield from original(self, iter([window]), bar)

    for change, again in ((False, False), (True, True)):
        build()
        if change:
            photograph(77).save(place / "3.png")
        encoded.clear()
        monkeypatch.setattr(type(model), "encode_windows", count)
        Retriever.build(tmp_path / "i", model, listed, images="picture", progress=False)
        assert (sum(encoded) == 40) == again
        shutil.rmtree(tmp_path / "i")


# --- Explanations --------------------------------------------------------------------------


def test_what_patches_matched(model, retriever, photos):
    document = "paris is the capital, of france."
    explanation = model.explain((QUESTION, photos[0]), document)
    words = model.tokenizer.labels(QUESTION, is_query=True)
    assert explanation.query[: len(words)] == words
    named = [f"[image {n}]" for n in range(1, 5)]
    patches = [f"[patch {row},{column}]" for row in range(1, 5) for column in range(1, 5)]
    assert explanation.query[len(words) :] == named + patches
    (score,) = model.rank([(QUESTION, photos[0])], [document]).scores[0]
    assert explanation.score == pytest.approx(score, rel=1e-5)
    picture = explanation.picture
    assert (picture.first, picture.patches) == (len(words), len(words) + 4)
    assert picture.grid == (4, 4) and picture.pixels.shape == (32, 32, 3)
    np.testing.assert_array_equal(
        pixel_values(picture.pixels, ImageConfig.square(32)),
        pixel_values(photos[0], ImageConfig.square(32)),
    )
    assert explanation.text.query == words and explanation.text.picture is None
    table = str(explanation).splitlines()
    counted = [line for line in table if line.startswith("[patch] x ")]
    assert sum(int(line.split()[2]) for line in counted) == 16
    assert table[-1] == f"score {explanation.score:.4f}"
    again = retriever.explain((QUESTION, photos[0]), document)
    np.testing.assert_allclose(again.similarity, explanation.similarity, atol=1e-6)
    # A document's image has its own rows, before those of its text.
    of_both = model.explain("cats", (document, photos[0]))
    assert of_both.document[:5] == [*named, "[CLS]"] and of_both.picture is None
    assert of_both.similarity.shape[1] == len(explanation.document) + 4
    assert retriever.explain("cats", "0").document[0] == "[CLS]"


def test_a_model_without_patches_and_one_without_text(tmp_path, photos):
    folder = support.write_preflmr(
        tmp_path / "c",
        mapping=0,
        separate=False,
        config={"num_hidden_layers": 1},
        vision={"num_hidden_layers": 1},
        query_concat_output_from_text_encoder=False,
    )
    explanation = load(folder).explain((QUESTION, photos[0]), "cats")
    assert explanation.query == [f"[image {n}]" for n in range(1, 5)]
    assert explanation.picture.grid == (0, 0) and "[image] x " in str(explanation)
