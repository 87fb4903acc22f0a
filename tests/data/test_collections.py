import json

import pytest

from colbert_jax.evaluation import read_collection, read_qrels, read_queries


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_tsv_with_title_header_and_byte_order_mark(tmp_path):
    file = write(tmp_path / "c.tsv", "\ufeffid\ttext\ttitle\n7\ta b\tT\n\nx-1\tc\t\r\n8\td\n")
    assert list(read_collection(file)) == [("7", "T | a b"), ("x-1", "c"), ("8", "d")]


def test_a_passage_may_be_empty(tmp_path):
    assert list(read_collection(write(tmp_path / "c.tsv", "0\t\n1\ta\n"))) == [
        ("0", ""),
        ("1", "a"),
    ]


def test_jsonl(tmp_path):
    rows = [{"_id": "d1", "title": "T", "text": "a"}, {"id": 2, "contents": "b", "title": 5}]
    file = write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))
    assert list(read_collection(file)) == [("d1", "T | a"), ("2", "5 | b")]


def test_plain_text(tmp_path):
    file = write(tmp_path / "c.txt", "first\n\nsecond\twith tab\n")
    assert list(read_collection(file)) == [("0", "first"), ("1", "second\twith tab")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.tsv", b"0\tgood\n1\tb\xe9d\n", r"c\.tsv, line 2: not UTF-8 \(byte 4 of the line, 0xe9"),
        ("c.tsv", "0\tgood\nno tab\n", r"c\.tsv, line 2: expected 'pid<TAB>text', got 'no tab'"),
        ("c.tsv", "", "the collection is empty"),
        ("c.txt", "\n\n", "the collection is empty"),
        ("c.csv", "1,a\n", r"c\.csv: a collection's name ends in one of \.tsv"),
        ("c.jsonl", "{", r"line 1: not valid JSON"),
        ("c.jsonl", "[1]", r"line 1: expected a JSON object"),
        ("c.jsonl", '{"id": 1, "body_html": "x"}', r"got the fields id, body_html"),
    ],
)
def test_unreadable_collections(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        list(read_collection(write(tmp_path / name, data)))


def test_queries(tmp_path):
    file = write(tmp_path / "q.tsv", "1\twhat is it\nq2\tand that\textra\n")
    assert read_queries(file) == {"1": "what is it", "q2": "and that"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("1\ta\n1\tb\n", r"line 2: query id '1' appears twice"),
        ("1\n", r"line 1: expected 'qid<TAB>text'"),
        ("1\t \n", r"line 1: expected 'qid<TAB>text'"),
        ("", "no queries"),
    ],
)
def test_unreadable_queries(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        read_queries(write(tmp_path / "q.tsv", data))


def test_qrels(tmp_path):
    file = write(tmp_path / "r.tsv", "1\t0\td1\t3\n1 0 d2 0\nq2\t0\td1\t1\n")
    assert read_qrels(file) == {"1": {"d1": 3, "d2": 0}, "q2": {"d1": 1}}
    for data, message in [("1\t0\td1\n", "line 1"), ("1 0 d1 high\n", "line 1"), ("", "no judge")]:
        with pytest.raises(ValueError, match=message):
            read_qrels(write(tmp_path / "bad.tsv", data))
