"""Training on questions about images: what is drawn, the loss, resuming, what cannot be used."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import support
from jax.sharding import Mesh
from PIL import Image
from safetensors.numpy import load_file

from colbert_jax.data.m2kr import read_m2kr
from colbert_jax.flmr import FLMRModelForRetrieval
from colbert_jax.images import pixel_values
from colbert_jax.training import trainer
from colbert_jax.training.flmr import _ImageLoader, _Loss, _Source, train_flmr
from colbert_jax.training.step import no_negatives

pytestmark = pytest.mark.usefixtures("one_length", "shared_programs")
SMALL = trainer.TrainingConfig(
    loss="contrastive",
    nway=3,
    bsize=4,
    lr=1e-3,
    warmup=1,
    maxsteps=4,
    save_every=2,
    log_every=1,
    length_groups=1,
    dtype="float32",
)
ONE = jax.devices()[:1]


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Nine questions, of which two have no image and one no passage; 30 passages."""
    folder = tmp_path_factory.mktemp("m2kr")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(9):
        pixels = rng.integers(0, 255, (40, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(
            {
                "question_id": f"q{i}",
                "question": f"what is {support.WORDS[i]}?",
                "instruction": "look at the cat",
                "img_path": None if i in (2, 5) else f"{i}.png",
                "pos_item_ids": [f"p{i}", f"p{i + 10}"] if i < 8 else [],
                "answers": [],
            }
        )
    write(folder / "q.jsonl", rows)
    texts = support.passages(30)
    passages = [{"passage_id": f"p{i}", "passage_content": t} for i, t in enumerate(texts)]
    write(folder / "p.jsonl", passages)
    support.write_preflmr(folder / "checkpoint", config={"num_hidden_layers": 1})
    return folder


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(files):
    return read_m2kr(files / "q.jsonl", files / "p.jsonl", images=files)


@pytest.fixture
def start(files):
    return lambda: FLMRModelForRetrieval.from_pretrained(files / "checkpoint", dtype="float32")


def run(start, data, folder, config=SMALL, **arguments):
    model = start()
    with pytest.warns(UserWarning, match="1 of 9 questions have no positive among the passages"):
        trained = train_flmr(
            model, data, folder, config, **({"devices": ONE} | arguments), progress=False
        )
    return model, trained


def loss_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture
def source(data):
    with pytest.warns(UserWarning, match="left out of training"):
        return _Source(data, SMALL)


def test_negatives_are_drawn_from_all_passages_and_are_no_positives(files, tmp_path):
    """Uniformly, anew at every place; a positive's text under another id is none either."""
    texts = support.passages(30)
    texts[25] = texts[1]
    rows = [{"passage_id": f"p{i}", "passage_content": t} for i, t in enumerate(texts)]
    write(tmp_path / "p.jsonl", rows)
    data = read_m2kr(files / "q.jsonl", tmp_path / "p.jsonl", images=files)
    with pytest.warns(UserWarning, match="left out of training"):
        source = _Source(data, SMALL)
    drawn = [source.draw(1, place) for place in range(3000)]
    positives = {texts.index(one.documents[0]) for one in drawn}
    assert positives == {1, 11}
    negatives = [texts.index(text) for one in drawn for text in one.documents[1:]]
    counts = np.bincount(negatives, minlength=30)
    never = [1, 11, 25]
    assert (counts[never] == 0).all()
    others = np.delete(counts, never)
    assert others.sum() == 6000 and (abs(others - 6000 / 27) < 80).all()
    assert all(len(set(one.documents)) == 3 for one in drawn)
    again = source.draw(1, 7)
    assert again.documents == drawn[7].documents and again.query == drawn[7].query


def test_loss_is_that_of_the_model(start, data, source, files):
    """Of the same batch, dropout aside; questions without an image have rows of zeros."""
    model = start()
    config = changed(dropout=0.0, bsize=8)
    arguments = dict(bsize=8, seed=config.seed, nway=3, length_groups=1)
    pixels = model.image_config
    with _ImageLoader(source, model.text_tokenizer, pixels=pixels, **arguments) as loader:
        step = next(loader)
    (batch,) = step.batches
    alike = np.asarray(no_negatives(batch.passages))
    examples = [source.draw(int(i), place) for place, i in enumerate(step.examples)]
    keys = np.concatenate([example.keys for example in examples])
    for row, example in enumerate(examples):  # positives that were drawn for other questions
        known = np.isin(keys, example.positives)
        known[3 * row] = False
        np.testing.assert_array_equal(alike[row], known)

    mesh = Mesh(np.array(ONE), ("data",))
    loss = _Loss(model.encoder_config, model.images, True).make(config, mesh)
    # The model's own loss has every other document as a negative.
    every = np.arange(48, dtype=np.int32).reshape(24, 2)
    alone = batch.passages._replace(documents=every, labelled=every[::3, None])
    batch = batch._replace(passages=alone)
    value, parts = jax.jit(loss)(model.params, batch, jax.random.key(0), {"images": {}})
    q = model.query_tokenizer([example.query for example in examples])
    d = model.context_tokenizer([text for example in examples for text in example.documents])
    given = [example.image is not None for example in examples]
    black = np.zeros((9, 9, 3), np.uint8)
    images = pixel_values([black if e.image is None else e.image for e in examples], pixels)
    out = model(
        q["input_ids"],
        q["attention_mask"],
        images,
        None,
        d["input_ids"],
        d["attention_mask"],
        num_negative_examples=2,
        query_concat_output_from_vision_encoder=given,
        query_concat_output_from_text_encoder=[True] * 8,
    )
    assert 0 < sum(given) < 8
    np.testing.assert_allclose(value, out.loss, rtol=1e-5)
    np.testing.assert_allclose(parts["positive_score"], out.scores[:, 0].mean(), rtol=1e-5)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    start, data, tmp_path, stopped_after, monkeypatch
):
    """Bit for bit, with dropout; the vision encoder stays, and is in no checkpoint."""
    seen = []
    original = trainer.make_step

    def making(*args):
        step = original(*args)

        def looking(state, *rest):
            seen.append((list(state["params"]["images"]), jax.tree.structure(state["moments"])))
            return step(state, *rest)

        return looking

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_step", making)
        before = start()
        model, trained = run(start, data, tmp_path / "whole")
    assert len(seen) == 4 and all(names == ["mapping", "projection"] for names, _ in seen)
    assert "vision" not in str(seen[0][1]) and "mapping" in str(seen[0][1])
    with stopped_after(3):
        run(start, data, tmp_path / "cut")
    run(start, data, tmp_path / "cut")
    files = [tmp_path / name / "last" / "model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert loss_of(tmp_path / "whole") == loss_of(tmp_path / "cut")

    assert trained.model == tmp_path / "whole" / "last" and trained.step == 4
    loaded = FLMRModelForRetrieval.from_pretrained(trained.model, dtype="float32")
    for path, leaf in jax.tree.leaves_with_path(before.params):
        name = jax.tree_util.keystr(path)
        now, kept = (np.asarray(_at(m.params, path)) for m in (model, loaded))
        np.testing.assert_array_equal(now, kept, err_msg=name)
        frozen = "vision" in name
        assert frozen == np.array_equal(now, leaf), name


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.mark.slow
def test_devices_and_settings_of_memory_change_rounding_only(start, data, tmp_path):
    config = changed(dropout=0.0, maxsteps=2)
    _, one = run(start, data, tmp_path / "one", config)
    other = dataclasses.replace(config, chunk=1, remat=True)
    _, two = run(start, data, tmp_path / "two", other, devices=jax.devices()[:2])
    np.testing.assert_allclose(loss_of(tmp_path / "two"), loss_of(tmp_path / "one"), rtol=1e-4)
    expected = load_file(one.model / "model.safetensors")
    for key, tensor in load_file(two.model / "model.safetensors").items():
        np.testing.assert_allclose(tensor, expected[key], atol=2e-3, err_msg=key)


@pytest.mark.slow
def test_the_vision_encoder_learns_if_asked(start, data, tmp_path):
    config = changed(maxsteps=1, warmup=0)
    model, _ = run(start, data, tmp_path, config, freeze_vision=False)
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), start().params["images"], model.params["images"]
    )
    assert all(jax.tree.leaves(moved["vision"]["layers"]))


def test_a_bad_image_is_named(start, files, tmp_path):
    rows = [json.loads(line) for line in (files / "q.jsonl").read_text().splitlines()][:8]
    rows[3]["img_path"] = str(tmp_path / "bad.png")
    write(tmp_path / "q.jsonl", rows)
    data = read_m2kr(tmp_path / "q.jsonl", files / "p.jsonl", images=files)
    config = changed(bsize=8, maxsteps=1)

    def says(error):
        with pytest.raises(ValueError) as caught:
            train_flmr(start(), data, tmp_path / "run", config, devices=ONE, progress=False)
        assert error in str(caught.value)

    says(f"1 image is missing of 8 questions:\n  {tmp_path}/bad.png (question 'q3')")
    assert not (tmp_path / "run").exists()
    (tmp_path / "bad.png").write_text("no image at all")
    says(
        f"{tmp_path}/q.jsonl, line 4: column 'img_path': ({tmp_path}/bad.png): not an image that "
        "Pillow can read; it starts with b'no image at all'. Put a good image there"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "distillation"}, "the loss of questions about images is one of"),
        ({"freeze_layers": 1}, "freeze_layers is 1, which training on images does not have"),
        ({"nway": 1, "bsize": 2, "accumsteps": 2}, "leave one question in a micro-batch"),
        ({"bsize": 3, "accumsteps": 3, "nway": 40}, "there are only 28 passages to draw negatives"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_settings_that_do_not_fit(start, data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_flmr(start(), data, tmp_path, changed(**changes), devices=ONE, progress=False)


def test_images_need_an_encoder(data, tmp_path):
    folder = support.write_flmr(tmp_path / "texts", {"num_hidden_layers": 1})
    model = FLMRModelForRetrieval.from_pretrained(folder)
    with pytest.raises(ValueError, match="6 of 9 questions have an image, and the model has no"):
        train_flmr(model, data, tmp_path / "run", SMALL, devices=ONE)
