"""Evaluation on M2KR's files: measures by hand, a run from the command line, images that fail."""

import json

import numpy as np
import pytest
import support
from PIL import Image

from colbert_jax.cli import main
from colbert_jax.data.m2kr import read_m2kr
from colbert_jax.evaluation.m2kr import evaluate_m2kr, has_answer, recall
from colbert_jax.flmr import FLMRModelForRetrieval
from colbert_jax.images import pixel_values

PASSAGES = support.passages(40)
WITH_IMAGE, ALONE = ["q0", "q1", "q2", "q5"], ["q4"]  # q3's image is no image, q6's is missing


def test_measures_by_hand():
    """A hit counts from its rank on; fewer results than K are all there is."""
    assert recall([False, True, False, True], [1, 2, 3, 9]) == [0, 1, 1, 1]
    assert recall([False, False], [1, 5]) == recall([], [1, 5]) == [0, 0]
    assert has_answer("The river Rhine.", ["Danube", " RHINE "])
    assert not has_answer("The river Rhine.", ["Danube", " ", ""]) and not has_answer("x", [])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return support.write_preflmr(tmp_path_factory.mktemp("m2kr") / "checkpoint")


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 255, (40, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_text("not an image at all")
    rows = [
        {
            "question_id": f"q{i}",
            "question": f"what is {support.WORDS[i]}?",
            "instruction": "look at the cat",
            "img_path": None if i == 4 else f"{i}.png",
            "pos_item_ids": [f"p{i}", "p30"],
            "answers": [f" {support.WORDS[20 + i].upper()}"],
        }
        for i in range(7)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = [{"passage_id": f"p{i}", "passage_content": t} for i, t in enumerate(PASSAGES)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    return tmp_path


@pytest.mark.filterwarnings("default")  # what the command prints
def test_from_the_command_line(checkpoint, files, one_device, capsys):
    """The report has what exact scoring finds; one bad image costs no other question."""
    report = files / "report.json"
    arguments = [files / "q.jsonl", files / "p.jsonl", "--checkpoint", checkpoint]
    arguments += ["--images", files, "--report", report, "--index-root-path", files / "indexes"]
    arguments += ["--ks", 1, 5, 30, "--batch-size", 4, "--doc-maxlen", 48]
    assert main(["evaluate-m2kr", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("7 questions, 2 without their image\nRecall@1 ")
    assert "1 image is missing of 7 questions" in err and "6.png (question 'q6')" in err
    assert "2 of 6 images could not be used" in err
    written = json.loads(report.read_text())
    assert list(written) == [f"q{i}" for i in range(7)]

    data = read_m2kr(files / "q.jsonl", files / "p.jsonl", images=files)
    model = FLMRModelForRetrieval.from_pretrained(checkpoint)
    d = model.context_tokenizer(PASSAGES)
    out_d = model.doc(d["input_ids"], d["attention_mask"])
    for ids in (WITH_IMAGE, ALONE):
        asked = [question for question in data if question.id in ids]
        images = [q.image for q in asked if q.image is not None]
        pixels = pixel_values(images, model.image_config) if images else None
        encoded = model.query_tokenizer([q.text for q in asked])
        rows = model.query(**encoded, pixel_values=pixels).late_interaction_output
        exact = model.score_matrix(rows, out_d.late_interaction_output, out_d.context_mask)
        for question, scores in zip(asked, np.asarray(exact), strict=True):
            row = written[question.id]
            found = [hit["passage_id"] for hit in row["retrieved_passage"]]
            expected = scores[[int(pid[1:]) for pid in found]]
            given = [hit["score"] for hit in row["retrieved_passage"]]
            np.testing.assert_allclose(given, expected, atol=0.1)  # 8 bits
            assert len(found) == 30
            assert found[0] == f"p{scores.argmax()}"
            for k in (1, 5, 30):
                assert row[f"Recall@{k}"] == bool({*found[:k]} & {*question.positives})
                texts = " ".join(PASSAGES[int(pid[1:])] for pid in found[:k])
                assert row[f"Pseudo Recall@{k}"] == (question.answers[0].strip().lower() in texts)
    for qid, reason in (("q3", "not an image that Pillow can read"), ("q6", "no such file")):
        row = written[qid]
        assert reason in row["error"] and row["retrieved_passage"] == []
        assert row["Recall@30"] == row["Pseudo Recall@30"] == 0
    mean = np.mean([row["Recall@30"] for row in written.values()])
    assert f"\nRecall@30           {mean:.4f}\n" in out and 0 < mean < 1


def test_a_black_image_in_place_of_none(checkpoint, files, one_device):
    data = read_m2kr(files / "q.jsonl", files / "p.jsonl", images=files)
    model = FLMRModelForRetrieval.from_pretrained(checkpoint, dtype="float32")
    settings = dict(ks=[3], index_root_path=files, batch_size=4, doc_maxlen=48, progress=False)
    with pytest.warns(UserWarning, match="image"):
        black = evaluate_m2kr(model, data, black_images=True, **settings).questions["q4"]
    encoded = model.query_tokenizer([data[4].text])
    pixels = pixel_values(np.zeros((9, 9, 3), np.uint8), model.image_config)
    rows = model.query(**encoded, pixel_values=pixels).late_interaction_output
    d = model.context_tokenizer(PASSAGES)
    out = model.doc(d["input_ids"], d["attention_mask"])
    exact = model.score_matrix(rows, out.late_interaction_output, out.context_mask)[0]
    hits = black["retrieved_passage"]
    expected = np.asarray(exact)[[int(hit["passage_id"][1:]) for hit in hits]]
    np.testing.assert_allclose([hit["score"] for hit in hits], expected, atol=0.1)  # 8 bits
    assert len(hits) == 3 and np.isclose(expected[0], np.asarray(exact).max())


def test_what_cannot_be_evaluated(checkpoint, files, tmp_path):
    model = FLMRModelForRetrieval.from_pretrained(checkpoint)
    data = read_m2kr(files / "q.jsonl", files / "p.jsonl", images=files / "elsewhere")
    with pytest.raises(ValueError, match=r"6 images are missing of 7 questions") as caught:
        evaluate_m2kr(model, data)
    assert "Give the folder that img_path begins in" in str(caught.value)
    texts = FLMRModelForRetrieval.from_pretrained(support.write_flmr(tmp_path / "flmr"))
    with pytest.raises(ValueError, match="6 of 7 questions have an image, and the model has no"):
        evaluate_m2kr(texts, data)
    with pytest.raises(ValueError, match="ks and batch_size must be at least 1"):
        evaluate_m2kr(model, data, ks=[0])
