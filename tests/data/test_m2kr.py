"""M2KR's tables in every form, and what is said of those that cannot be used."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colbert_jax.data.m2kr import question_text, read_m2kr

QUESTIONS = [
    {
        "question_id": "q0",
        "question": "what river is this?",
        "instruction": "Using the picture: answer",
        "img_path": "a/1.jpg",
        "pos_item_ids": ["p1", "p3"],
        "pos_item_contents": ["cats", "dogs"],
        "answers": ["The Rhine ", "Rhein"],
    },
    {
        "question_id": "q1",
        "question": "who runs?",
        "instruction": "Answer:",
        "img_path": None,
        "pos_item_ids": ["p0"],
        "pos_item_contents": ["heat"],
        "answers": [],
    },
    {
        "question_id": "q2",
        "question": "café?",
        "instruction": None,
        "img_path": " ",
        "pos_item_ids": ["p2"],
        "pos_item_contents": [],
        "answers": None,
    },
]
PASSAGES = [
    {"passage_id": f"p{i}", "passage_content": text}
    for i, text in enumerate(["heat flow", "cats run", "", "dogs", "cats run"])
]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def forms(folder: Path):
    """The two tables in every form that is read."""
    for kind in ("parquet", "jsonl"):
        yield write(folder / f"q.{kind}", QUESTIONS), write(folder / f"p.{kind}", PASSAGES)
        for part in (0, 1):  # as on the hub
            rows = slice(part, None, 2)
            own = f"{part:05}-of-00002.{kind}"
            write(folder / kind / "X_data" / f"test-{own}", QUESTIONS[rows])
            write(folder / kind / "X_passages" / f"test_passages-{own}", PASSAGES[rows])
        write(folder / kind / "X_data" / f"train-0.{kind}", [{"other": 1}])
        yield folder / kind / "X_data", folder / kind / "X_passages"
    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(QUESTIONS)})
    passages = datasets.DatasetDict({"test_passages": datasets.Dataset.from_list(PASSAGES)})
    yield data, passages["test_passages"]
    data.save_to_disk(folder / "data")
    passages.save_to_disk(folder / "passages")
    yield folder / "data", str(folder / "passages")


def test_every_form_gives_the_same(tmp_path, monkeypatch):
    for data, passages in forms(tmp_path):
        read = read_m2kr(data, passages, images="photos")
        order = sorted(range(3), key=lambda i: read[i].id)
        first, second, third = (read[i] for i in order)
        assert first == (
            "q0",
            "Using the picture: answer: what river is this?",
            Path("photos/a/1.jpg"),
            ("p1", "p3"),
            ("The Rhine ", "Rhein"),
        )
        assert second[1:] == ("Answer: who runs?", None, ("p0",), ())
        assert third[1:] == ("café?", None, ("p2",), ())
        table = read.passages
        assert [table.id(i) for i in read.positives(order[0])] == ["p1", "p3"]
        assert sorted(table) == sorted(row["passage_content"] for row in PASSAGES)
        same = table.keys[:, None] == table.keys
        assert same.sum() == 7 and (same == (np.array(table)[:, None] == np.array(table))).all()
        other = read.with_instruction_end("[end]")[order[0]].text
        assert other == "Using the picture[end] answer[end] what river is this?"
        assert read.has_answers and read.answered().tolist() == [0, 1, 2]
        assert read.fingerprint == read_m2kr(data, passages, images="elsewhere").fingerprint

    def load(repository, config):
        assert repository == "owner/name"
        return datasets.load_from_disk(tmp_path / config)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_m2kr("owner/name/data", "owner/name/passages")[1].id == "q1"


def test_instructions():
    assert question_text("what?", None) == question_text("what?", "  ") == "what?"
    assert question_text("what?", " Look ") == "Look: what?"
    assert question_text("what?", "a: b:", "[end]") == "a[end] b[end] what?"


def changed(rows, number, **values):
    return [row | values if i == number else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_what_is_wrong_is_named(tmp_path, kind):
    good = write(tmp_path / f"p.{kind}", PASSAGES)
    place = "row 1" if kind == "parquet" else "line 2"

    def says(message, rows=None, passages=None):
        data = write(tmp_path / f"q.{kind}", QUESTIONS if rows is None else rows)
        other = good if passages is None else write(tmp_path / f"other.{kind}", passages)
        with pytest.raises(ValueError) as caught:
            read_m2kr(data, other)
        assert message in str(caught.value)

    file = tmp_path / f"q.{kind}"
    says(f"{file}, {place}: column 'question_id': 'q0'", changed(QUESTIONS, 1, question_id="q0"))
    says(f"{file}, {place}: column 'question' is blank", changed(QUESTIONS, 1, question=" "))
    says(
        f"{file}, {place}: column 'question' must be a text, got None",
        changed(QUESTIONS, 1, question=None),
    )
    nested = [row | {"answers": [["x"]] if i == 1 else []} for i, row in enumerate(QUESTIONS)]
    says(f"{file}, {place}: column 'answers' must be a list of texts, got [['x']]", nested)
    other = tmp_path / f"other.{kind}, {place}"
    bad = changed(PASSAGES, 1, passage_content=None)
    says(f"{other}: column 'passage_content' must be a text, got None", None, bad)
    says("no column 'passage_id'; it has 'passage_content'", None, [{"passage_content": "x"}])
    foreign = [row | {"passage_id": f"x{i}"} for i, row in enumerate(PASSAGES)]
    says("4 of 4 positives are not among the passages: 'p1' of question 'q0'", None, foreign)


def test_positives_that_the_passages_lack_are_named(tmp_path):
    data = write(tmp_path / "q.jsonl", changed(QUESTIONS, 0, pos_item_ids=["p1", "p9"]))
    passages = write(tmp_path / "p.jsonl", changed(PASSAGES, 0, passage_id="other"))
    with pytest.warns(UserWarning, match=r"2 of 4 positives .* 'p9' of question 'q0', for exam"):
        read = read_m2kr(data, passages)
    assert read.answered().tolist() == [0, 2] and read.positives(0).tolist() == [1]


def test_an_id_that_is_there_twice_is_one_passage(tmp_path):
    data = write(tmp_path / "q.jsonl", QUESTIONS)
    passages = write(tmp_path / "p.jsonl", changed(PASSAGES, 4, passage_id="p1"))
    with pytest.warns(UserWarning, match=r"p.jsonl, line 5: column 'passage_id': 'p1' appears tw"):
        read = read_m2kr(data, passages)
    assert read.positives(0).tolist() == [1, 4, 3]


def test_missing_images_are_named(tmp_path):
    data = write(tmp_path / "q.jsonl", QUESTIONS)
    read = read_m2kr(data, write(tmp_path / "p.jsonl", PASSAGES), images=tmp_path)
    missing = read.missing_images()
    assert missing == {0: tmp_path / "a/1.jpg"} and read.missing_images([1, 2]) == {}
    said = read.name_missing(missing)
    assert said == f"1 image is missing of 3 questions:\n  {tmp_path}/a/1.jpg (question 'q0')"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    assert read.missing_images() == {}


def test_tables_that_are_not_there(tmp_path):
    good = write(tmp_path / "p.jsonl", PASSAGES)
    with pytest.raises(FileNotFoundError, match="no such file or folder, nor owner/name/config"):
        read_m2kr(tmp_path / "no.parquet", good)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"bad.parquet: damaged, or not parquet"):
        read_m2kr(tmp_path / "bad.parquet", good)
    with pytest.raises(ValueError, match="no parquet or JSONL file whose name begins with test"):
        read_m2kr(tmp_path, good)
    with pytest.raises(ValueError, match=r"the file's name must end in one of .parquet"):
        read_m2kr(write(tmp_path / "q.txt", QUESTIONS), good)
    empty = datasets.Dataset.from_dict({name: [] for name in QUESTIONS[0]})
    with pytest.raises(ValueError, match="the data set: the table is empty"):
        read_m2kr(empty, good)
    with pytest.raises(ValueError, match=r"no split 'test', it has train"):
        read_m2kr(datasets.DatasetDict({"train": empty}), good)
