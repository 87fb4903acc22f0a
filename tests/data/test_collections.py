import gzip
import json

import pytest

from colbert_jax.data.collections import read_documents
from colbert_jax.data.texts import Texts
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
    with pytest.warns(UserWarning, match=r"c\.txt: has blank lines, .* not that of its line"):
        assert list(read_collection(file)) == [("0", "first"), ("1", "second\twith tab")]
    file = write(tmp_path / "c", "first\nsecond\n\n")
    assert list(read_collection(file)) == [("0", "first"), ("1", "second")]


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("docno\ttext", "7\ta"),
        ("Doc ID\tPassage", "7\ta"),
        ("corpus-id\tcontents\turl", "7\ta\thttp://x"),
        ("url\tbody\tid", "http://x\ta\t7"),
    ],
)
def test_columns_named_by_a_header(tmp_path, header, line):
    file = write(tmp_path / "c.tsv", f"{header}\n{line}\n")
    assert list(read_collection(file)) == [("7", "a")]


def test_title_and_text_in_any_order(tmp_path):
    file = write(tmp_path / "c.tsv", "id\turl\ttitle\ttext\n7\thttp://x\tT\ta\n8\t\t\tb\n")
    assert list(read_collection(file)) == [("7", "T | a"), ("8", "b")]
    file = write(tmp_path / "c.tsv", "title\ttext\tid\nT\ta\t7\n")
    assert list(read_collection(file)) == [("7", "T | a")]


def test_msmarco_documents(tmp_path):
    """`docid, url, title, body`, known by the address in the second of four fields."""
    rows = "D1\thttps://x.org/a\tT\tbody that matters\nD2\thttp://y\tU\t\n"
    file = write(tmp_path / "c.tsv", rows)
    assert list(read_collection(file)) == [("D1", "T | body that matters"), ("D2", "U")]
    with pytest.raises(ValueError, match=r"line 3: expected 'docid<TAB>url<TAB>title<TAB>body'"):
        list(read_collection(write(tmp_path / "c.tsv", rows + "D3\thttp://z\tV\n")))


def test_a_title_without_a_text_is_the_text(tmp_path):
    file = write(tmp_path / "c.tsv", "1\t\tT\n2\ta\tU\n")
    assert list(read_collection(file)) == [("1", "T"), ("2", "U | a")]
    file = write(tmp_path / "c.jsonl", json.dumps({"_id": "a", "title": "t", "text": ""}))
    assert list(read_collection(file)) == [("a", "t")]


def test_empty_fields_at_the_end_are_no_text(tmp_path):
    assert list(read_collection(write(tmp_path / "c.tsv", "1\ta\tT\t\t\n"))) == [("1", "T | a")]
    assert read_queries(write(tmp_path / "q.tsv", "1\ta\t\n")) == {"1": "a"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("c.tsv", "id\turl\ttitle\ttext\n7\thttp://x\tT\ta\n8\t\t\tb\n"),
        ("c.tsv", "1\ta\tT\n2\tb\n"),
        ("c.jsonl", '{"_id": 1, "title": "T", "text": "a", "metadata": {"x": 1}}\n'),
        ("c.txt", "a\nb\n"),
    ],
)
def test_fields_do_not_change_ids_and_texts(tmp_path, name, data):
    file = write(tmp_path / name, data)
    assert [found[:2] for found in read_documents(file)] == list(read_collection(file))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.tsv", b"0\tgood\n1\tb\xe9d\n", r"c\.tsv, line 2: not UTF-8 \(byte 4 of the line, 0xe9"),
        ("c.tsv", "0\tgood\nno tab\n", r"c\.tsv, line 2: expected 'pid<TAB>text', got 'no tab'"),
        ("c.tsv", "", "the collection is empty"),
        ("c.txt", "\n\n", "the collection is empty"),
        ("c.xml", "1,a\n", r"c\.xml: a collection's name ends in one of \.tsv"),
        ("c.csv", "1,a\n", r"c\.csv, line 1: taken as a header, 1, a, and there is nothing below"),
        ("c.csv", "1,a\n2,b\n", r"c\.csv, line 2: expected an id .* got the fields 1, a"),
        ("c.csv", 'id,text\n1,"a\n', r"c\.csv, line 2: not valid CSV"),
        ("c.csv", "id,text\n1,a,b\n", r"c\.csv, line 2: 3 fields, expected 2"),
        ("c.csv", "id,id\n1,a\n", r"line 1: a header with empty or doubled names"),
        ("c.parquet", "no", r"c\.parquet: damaged, or not parquet"),
        ("c.tsv.zst", "no", r"c\.tsv\.zst: damaged after line 0"),
        ("c.jsonl", "{", r"line 1: not valid JSON"),
        ("c.jsonl", "[1]", r"line 1: expected a JSON object"),
        ("c.tsv", "0\ta\n1\tb\tc\td\n", r"line 2: 4 fields, expected pid, text\[, title\]: put"),
        ("c.tsv", "id\ttext\n1\ta\tb\n", r"line 2: 3 fields, expected id, text: put a space"),
        ("c.tsv", "0\ta\r1\tb\r", r"line 1: a carriage return inside the line, after '0.ta'"),
        ("c.txt", "first\rsecond", r"line 1: a carriage return inside the line"),
        ("c.tsv", "\ta\n", r"line 1: the id is empty"),
        (
            "c.tsv",
            "id\tyear\n1\ta\n",
            r"line 1: this looks like a header with the columns id, year",
        ),
        ("c.tsv", "text\tid\tyear\nb\t1\t2\n", r"line 1: this looks like a header"),
        ("c.tsv", "name\ttext\nx\ta\n", r"line 1: this looks like a header"),
        ("c.tsv", '"id"\t"text"\n"1"\t"a"\n', r"line 1: .* a header names, without quotes"),
        ("c.tsv", "id\tpid\ttext\n1\t1\ta\n", r"line 1: this looks like a header"),
        ("c.tsv", "id\ttext\n1\ta\nid\ttext\n", r"line 3: a header below the first line"),
        ("c", "0\ta\n", r"c, line 1: the file's name tells no format"),
        ("c", '{"id": 1, "text": "a"}', r"c, line 1: the file's name tells no format"),
        ("c.jsonl", r'{"id": "1", "text": "\ud800"}', r"line 1: the text is not valid Unicode"),
        ("c.jsonl", r'{"id": "\udfff", "text": "a"}', r"line 1: the id is not valid Unicode"),
        ("c.jsonl", '{"id": 1.0, "text": "a"}', r"line 1: an id must be a string or a whole"),
        ("c.jsonl", '{"id": "", "text": "a"}', r"line 1: the id is empty"),
        ("c.jsonl", '{"id": 1, "text": "a", "title": ["b"]}', r"line 1: a title must be a string"),
        ("c.jsonl", '{"id": 1, "body_html": "x"}', r"got the fields id, body_html"),
    ],
)
def test_unreadable_collections(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        list(read_collection(write(tmp_path / name, data)))


def test_queries(tmp_path):
    file = write(tmp_path / "q.tsv", "1\twhat is it\nq2\tand that\n")
    assert read_queries(file) == {"1": "what is it", "q2": "and that"}


@pytest.mark.parametrize(
    "data",
    [
        "qid\ttext\n1\ta\n",
        "query_id\tquery\n1\ta\n",
        "Question\tID\na\t1\n",
        '{"_id": "1", "text": "a", "metadata": {}}\n',
        '\ufeff{"qid": 1,\t"question": "a"}\n',
    ],
)
def test_queries_with_a_header_or_as_json(tmp_path, data):
    assert read_queries(write(tmp_path / "q.tsv", data)) == {"1": "a"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("1\ta\n1\tb\n", r"line 2: query id '1' appears twice"),
        ("1\n", r"line 1: expected 'qid<TAB>text'"),
        ("1\t \n", r"line 1: expected 'qid<TAB>text'"),
        ("1\ta\n2\tb\tc\n", r"line 2: 3 fields, expected qid, text: put a space"),
        ("1\t\tb\n", r"line 1: 3 fields, expected qid, text"),
        ("1\t \t\n", r"line 1: expected 'qid<TAB>text', but query '1' is empty"),
        ("1\ta\r2\tb\r", r"line 1: a carriage return inside the line"),
        ("qid\ttext\tsplit\n1\ta\ttest\n", r"line 1: this looks like a header"),
        ('{"qid": 1, "question": "\\ud800"}', r"line 1: the text is not valid Unicode"),
        ('{"qid": 1}', r"line 1: expected an id .* got the fields qid"),
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


def test_qrels_with_a_header(tmp_path):
    for header, line in (
        ("query-id\tcorpus-id\tscore", "q 1\td 1\t2"),
        ("qid iteration docno relevance", "q1 0 d1 2"),
    ):
        (found,) = read_qrels(write(tmp_path / "r.tsv", f"{header}\n{line}\n")).values()
        assert list(found.values()) == [2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("1 0 a 1\n1 0 b 1\n1 0 a 0\n", r"line 3: document 'a' of query '1' has the gain 0 here"),
        ("1 0 a 1_0\n", r"line 1: expected 'qid 0 pid gain'"),
        ("1 0 a 1000000000000\n", r"line 1: expected 'qid 0 pid gain'"),
    ],
)
def test_contradicting_or_unreadable_judgements(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        read_qrels(write(tmp_path / "r.tsv", data))


def test_a_judgement_may_be_given_twice(tmp_path):
    assert read_qrels(write(tmp_path / "r.tsv", "1 0 a 1\n1 0 a 1\n")) == {"1": {"a": 1}}


@pytest.mark.parametrize("name", ["c.tsv", "c.jsonl", "c.txt", "c.tsv.gz"])
def test_a_zero_byte_is_refused(tmp_path, name):
    """A disk that lost power leaves blocks of them, and UTF-16 has them beside its letters."""
    form = {"c.jsonl": '{"_id": "%d", "text": "%s"}', "c.txt": "%d %s"}.get(name, "%d\t%s")
    data = "".join(form % (i, text) + "\n" for i, text in enumerate(["whole", "on\0e"])).encode()
    file = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    for read in (read_collection, lambda path: Texts.passages(path).items(checked=True)):
        with pytest.raises(
            ValueError, match=rf"{name}, line 2: a NUL byte, after '.*on': the file"
        ):
            list(read(file))
