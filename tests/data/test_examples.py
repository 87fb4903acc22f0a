"""Sources of training examples, over files written here in the formats of their documentation."""

import contextlib
import gzip
import json
import sys
import tracemalloc

import numpy as np
import pytest

from colbert_jax.data import texts as texts_module
from colbert_jax.data.examples import (
    Check,
    Example,
    concatenate,
    dataset_examples,
    most_positives,
    pair_examples,
    positives_of,
    stanford_examples,
    subset,
)
from colbert_jax.data.texts import Texts
from colbert_jax.evaluation import read_collection

PASSAGES = ["zero", "one", "two", "three", "four", "five"]


def write(file, data):
    data = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def files(tmp_path):
    """Queries and a collection; `make` adds the examples and opens all three."""

    class Files:
        queries = write(tmp_path / "queries.tsv", "7\twhat\n300\twho\nx\twhy\n")
        collection = write(
            tmp_path / "collection.tsv", "".join(f"{i}\t{t}\n" for i, t in enumerate(PASSAGES))
        )

        def make(self, data, name="examples.jsonl", **settings):
            return stanford_examples(
                write(tmp_path / name, data), self.queries, self.collection, **settings
            )

    return Files()


# ---- Stanford's files


def test_scored_examples(files):
    """`[qid, [pid, score], ...]`, as in colbertv2.0_msmarco_64way; ids are numbers or strings."""
    source = files.make('[7, [3, 1.5], [0, -2], [5, 0]]\n\n["300", ["1", 9], [2, 8.25], [4, 7]]\n')
    assert (len(source), source.nway, source.scored) == (2, 3, True)
    assert source[0] == Example("what", ("three", "zero", "five"), (1.5, -2.0, 0.0))
    assert source[1] == Example("who", ("one", "two", "four"), (9.0, 8.25, 7.0))
    assert source[-1] == source[np.int64(1)] == source[1]
    with pytest.raises(IndexError):
        source[2]


def test_only_the_first_nway_count(files):
    data = "[7, [3, 1.5], [0, -2], [5, NaN]]\n[7, [1, 2], [2, 1]]\n"
    source = files.make(data, nway=2)
    assert source[0] == Example("what", ("three", "zero"), (1.5, -2.0))
    assert source[1] == Example("what", ("one", "two"), (2.0, 1.0))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("triples.jsonl", '[7, 3, 0]\n["x", 1, "2"]\n'),
        ("triples.tsv", "7\t3\t0\r\nx\t1\t2\r\n"),
        ("triples.tsv.gz", "\ufeff7\t3\t0\nx\t1\t2"),
    ],
)
def test_examples_without_scores(files, name, data):
    source = files.make(data, name)
    assert (source.nway, source.scored) == (2, False)
    expected = [Example("what", ("three", "zero"), None), Example("why", ("one", "two"), None)]
    assert [source[i] for i in range(len(source))] == expected


def test_scores_left_out(files):
    source = files.make("[7, [3, 1.5], [0, NaN]]\n[7, 1, [2]]\n", scores=False)
    assert not source.scored
    assert source[0] == Example("what", ("three", "zero"), None)
    assert source[1] == Example("what", ("one", "two"), None)


def test_queries_below_a_header(files):
    write(files.queries, "query\tquery-id\nwhat\t7\nwhy\tx\n")
    source = files.make('[7, 1, 2]\n["x", 1, 2]\n')
    assert [source[0].query, source[1].query] == ["what", "why"]


def test_queries_in_stanfords_json(files, tmp_path):
    files.queries = write(
        tmp_path / "queries.json", jsonl({"qid": 7, "question": "what"}, {"_id": "b", "text": "c"})
    )
    source = files.make('[7, 1, 2]\n["b", 1, 2]\n')
    assert [source[0].query, source[1].query] == ["what", "c"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("c.tsv", "\ufeff0\ta\tT\n1\tb\n2\tc\n"),
        ("c.tsv", "id\ttext\ttitle\n1\tb\n2\tc\n3\td\tT\n"),
        ("c.tsv", "d9\ta\n\n \nd1\tb\tT\n007\tc\r\n"),
        ("c.tsv", "".join(f"{i}\tpassage {i}\n" for i in range(8, 102))),
        ("c.tsv", "".join(f"{i}\tpassage {i}\n" for i in [*range(120), 119 + 2])),
        ("c.tsv.gz", "0\ta\n1\tb"),
        ("c.jsonl", jsonl({"_id": "d1", "title": "T", "text": "a"}, {"id": 2, "contents": "b"})),
        ("c.txt", "first\n\nsecond\twith tab\n"),
        ("c.txt", "first\nsecond\n\n"),
        ("c.tsv", "title\ttext\tdocno\nT\ta\t7\n\tb\t8\n"),
        ("c.tsv", "D1\thttps://x.org\tT\tbody\nD2\thttp://y\t\tb\n"),
        ("c.tsv", "\nid\ttext\n7\ta\n"),
        ("c.tsv", "a\t\tT\nb\tc\t\t\n"),
    ],
)
def test_passages_are_those_that_the_collections_reader_gives(tmp_path, name, data):
    file = write(tmp_path / name, data)
    gap = pytest.warns(UserWarning, match="blank lines, which are no documents")
    has_gap = name == "c.txt" and "\n\n" in data.strip()
    with gap if has_gap else contextlib.nullcontext():
        expected = list(read_collection(file))
    with gap if has_gap else contextlib.nullcontext():
        passages = Texts.passages(file)
    assert len(passages) == len(expected)
    for row, (pid, text) in enumerate(expected):
        assert passages.row(pid) == row and passages.text(row) == text
        if pid == str(int(pid) if pid.isdigit() else -1):
            assert passages.row(int(pid)) == row
    for unknown in ("", "00", "x", "-1", "1.0", "999", 999, -1, "\uff11", str(1 << 70)):
        with pytest.raises(KeyError):
            passages.row(unknown)


def test_ids_in_any_order(tmp_path):
    rng = np.random.default_rng(0)
    ids = [f"d{n}" for n in rng.permutation(3000)]
    passages = Texts.passages(write(tmp_path / "c.tsv", "".join(f"{i}\t<{i}>\n" for i in ids)))
    for pid in rng.choice(ids, 300).tolist():
        assert passages.text(passages.row(pid)) == f"<{pid}>"


def test_ids_whose_hashes_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "hash", len, raising=False)
    passages = Texts.passages(write(tmp_path / "c.tsv", "aa\tx\nb\ty\ncc\tz\nd\tw\n"))
    assert [passages.row(pid) for pid in ("aa", "b", "cc", "d")] == [0, 1, 2, 3]
    for unknown in ("bb", "zz", "a", "e", "abc"):
        with pytest.raises(KeyError):
            passages.row(unknown)


def test_a_collection_stays_on_disk(tmp_path):
    text = "x" * 400
    file = write(tmp_path / "c.tsv", "".join(f"{i}\t{text}\n" for i in range(40_000)))
    tracemalloc.start()
    try:
        passages = Texts.passages(file)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert passages.text(39_999) == text
    assert kept < 12 * 40_000  # of 16 MB: 8 bytes a line


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[7, 1, 2]\n[7, 1\n", r"examples\.jsonl, line 2: not valid JSON"),
        ("[7, 1, 2]\n\n\n" + "[" * 100_000 + "\n", r"line 4: not valid JSON"),
        ("[7, 1, 2]\n{}\n", r"line 2: expected \[qid, pid, \.\.\.\].* got '\{\}'"),
        ("[7]\n", r"line 1: expected \[qid, pid, \.\.\.\]"),
        ("7 1 2\n", r"line 1: expected JSON, .* with tabs between, got '7 1 2'"),
        ("[7, [1, 3], [2]]\n", r"line 1: passage 2, \[2\], has no score: write \[pid, score\]"),
        ("[7, [1, 3], [2, 1]]\n[7, [1, 3], 2]\n", r"line 2: passage 2, 2, has no score"),
        ("[7, [1, 3], [2, 1]]\n[7, 1, 2]\n", r"line 2: passage 1, 1, has no score"),
        ("[7, 1, 2]\n[7, [1, 3], [2, 1]]\n", r"line 2: scores here, but none on the first line"),
        ("[7, [1, 3, 5], [2, 1, 5]]\n", r"line 1: passage 1: expected \[pid, score\], got \[1, 3"),
        ("[7, [1, 3], [2, NaN]]\n", r"line 1: the score of document 2 is nan, not a finite number"),
        ("[7, [1, -Infinity]]\n", r"line 1: the score of document 1 is -inf, not a finite"),
        ("[7, [1, 1e39]]\n", r"line 1: the score of document 1 is 1e\+39, not a finite"),
        ("[7, [1, 1" + "0" * 400 + "]]\n", r"line 1: the score of document 1 is 1000"),
        ("[7, [1, null]]\n", r"line 1: the score of document 1 is None, not a finite"),
        ('[7, [1, "3"]]\n', r"line 1: the score of document 1 is '3', not a finite"),
        ("[7, [1, true]]\n", r"line 1: the score of document 1 is True, not a finite"),
        ("[7, 1, 2]\n[7, 1]\n", r"line 2: 1 passages, but nway is 2: lower nway or take the line"),
        ("[7, 1, 2]\n[8, 1, 2]\n", r"line 2: query id 8 is not in .*queries\.tsv: give the file"),
        ("[7, 1, 6]\n", r"line 1: passage id 6 is not in .*collection\.tsv: give the file"),
        ('[7, 1, "01"]\n', r"line 1: passage id '01' is not in"),
        ("[7, 1, -1]\n", r"line 1: passage id -1 is not in"),
        ("[7, 1, 2.0]\n", r"line 1: passage id must be a number or a string, got 2\.0"),
        ("[7, 1, true]\n", r"line 1: passage id must be a number or a string, got true"),
        ("[null, 1, 2]\n", r"line 1: query id must be a number or a string, got null"),
        (b"[7, 1, 2]\n[7, 1, \xff]\n", r"line 2: not UTF-8 \(byte 8 of the line, 0xff\)"),
        ("", r"examples\.jsonl: the file is empty"),
        (" \n\n", r"examples\.jsonl: the file is empty"),
    ],
)
def test_unreadable_examples(files, data, message):
    with pytest.raises(ValueError, match=message):
        files.make(data)


def test_nway_that_no_line_has(files):
    with pytest.raises(ValueError, match=r"line 1: 2 passages, but nway is 3: lower nway"):
        files.make("[7, 1, 2]\n", nway=3)
    with pytest.raises(ValueError, match="nway must be at least 1, got 0"):
        files.make("[7, 1, 2]\n", nway=0)


@pytest.mark.parametrize(
    ("which", "data", "message"),
    [
        (
            "queries",
            "7\ta\n7\tb\n",
            r"line 2: query id '7' appears twice, first at .*line 1",
        ),
        ("queries", "7\n", r"line 1: expected an id, a tab and a text, got '7'"),
        ("queries", "7\t \n", r"line 1: \S*queries\.tsv, line 1: query '7' is empty: give it a"),
        ("queries", '{"qid": 7}\n', r"line 1: expected an id .* got the fields qid"),
        ("queries", r'{"qid": 7, "question": "\ud800"}', r"query '7' is not valid Unicode: char"),
        ("collection", "a\tx\nb\ty\na\tz\n", r"line 3: passage id 'a' appears twice, first .* 1"),
        ("collection", "1\tx\n2\t\t \n", r"line 1: \S*collection\.tsv, line 2: passage '2' is emp"),
        ("collection", "a\tx\nno tab\n", r"collection\.tsv, line 2: expected an id, a tab"),
        ("queries", "7\twhat\tis\n", r"queries\.tsv, line 1: .*3 fields, expected qid, text:"),
        ("queries", "7\twhat\r8\tis\n", r"queries\.tsv, line 1: a carriage return inside"),
        ("collection", "1\ta\tb\tc\n2\td\n", r"line 1: 4 fields, expected pid, text\[, title\]"),
        ("collection", "1\ta\r2\tb\r", r"collection\.tsv, line 1: a carriage return inside"),
        ("collection", "id\tyear\n1\tx\n", r"collection\.tsv, line 1: this looks like a header"),
        ("collection", "id\ttext\n", r"collection\.tsv: nothing below the header"),
        ("collection", "", r"collection\.tsv: the file is empty"),
    ],
)
def test_unreadable_texts(files, which, data, message):
    write(getattr(files, which), data)
    with pytest.raises(ValueError, match=message):
        files.make("[7, 1, 2]\n")


def test_an_empty_passage_is_an_error_where_an_example_names_it(files):
    write(files.collection, "0\t\n1\tx\n2\ty\n")
    assert files.make("[7, 1, 2]\n")[0].documents == ("x", "y")
    with pytest.raises(ValueError, match=r"jsonl, line 2: .*tsv, line 1: passage '0' is empty"):
        files.make("[7, 1, 2]\n[7, 2, 0]\n")


def test_damaged_gzip(files, tmp_path):
    files.collection = write(tmp_path / "c.tsv.gz", "0\tx\n" * 100)
    data = files.collection.read_bytes()
    for damaged in (data[:-12], b"no gzip"):
        files.collection.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"c\.tsv\.gz: damaged"):
            files.make("[7, 1, 2]\n")
        with pytest.raises(ValueError, match=r"c\.tsv\.gz: damaged"):
            list(read_collection(files.collection))


def test_a_large_file_is_checked_at_its_beginning_and_as_it_is_read(files):
    check = Check(whole=10, first=2)
    with pytest.raises(ValueError, match="line 2: passage id 9"):
        files.make("[7, 1, 2]\n[7, 1, 9]\n", check=check)
    source = files.make("[7, 1, 2]\n[7, 2, 3]\n[7, 1, 9]\n", check=check)
    assert source[1].documents == ("two", "three")
    with pytest.raises(ValueError, match=r"examples\.jsonl, line 3: passage id 9 is not in"):
        source[2]


def test_fingerprints(files):
    data = "[7, [1, 3], [2, 1]]\n[7, [2, 3], [1, 1]]\n"
    first = files.make(data).fingerprint
    assert files.make(data, "copy.jsonl").fingerprint == first
    others = [
        files.make(data, scores=False),
        files.make(data, nway=1),
        files.make(data.replace("[1, 1]", "[1, 2]")),
        files.make(data + "[7, [1, 3], [2, 1]]\n"),
    ]
    write(files.collection, "0\ta\n1\tb\n2\tc\n")
    others.append(files.make(data))
    assert len({first, *(source.fingerprint for source in others)}) == 6


def test_the_real_64way_file(shared_data):
    def lines(file):
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
        return data.decode().removesuffix("\n").split("\n")

    folder = shared_data / "train" / "msmarco_v2_pool"
    file = folder / "examples_64way.jsonl"
    source = stanford_examples(file, folder / "queries.tsv", folder / "collection.tsv.gz")
    assert (len(source), source.nway, source.scored) == (129, 64, True)
    queries = dict(line.split("\t")[:2] for line in lines(folder / "queries.tsv"))
    passages = [line.split("\t")[1] for line in lines(folder / "collection.tsv.gz")]
    for line, example in zip(lines(file), source, strict=True):
        qid, *pairs = json.loads(line)
        assert example.query == queries[str(qid)]
        assert list(example.documents) == [passages[pid] for pid, _ in pairs]
        assert list(example.scores) == [score for _, score in pairs]


# ---- pairs


def test_pairs(tmp_path):
    rows = [{"q": "a", "p": "b", "n": "c", "other": 3}, {"q": "d", "p": "e", "n": "f"}]
    for name in ("pairs.jsonl", "pairs.jsonl.gz"):
        file = write(tmp_path / name, "\ufeff" + jsonl(*rows))
        source = pair_examples(file, query="q", positive="p")
        assert (len(source), source.nway, source.scored) == (2, 1, False)
        assert source[1] == Example("d", ("e",), None)
        source = pair_examples(file, query="q", positive="p", negatives="n")
        assert source.nway == 2 and source[0] == Example("a", ("b", "c"), None)


def test_pairs_with_several_negatives_and_scores(tmp_path):
    rows = [
        {"query": "a", "positive": "b", "hard": ["c", "d"], "easy": "e", "score": [4, 3, 2, 1]},
        {"query": "f", "positive": "g", "hard": ["h", "i", "j"], "easy": "k", "score": [9.5] * 5},
    ]
    file = write(tmp_path / "pairs.jsonl", jsonl(*rows))
    fields = dict(negatives=["hard", "easy"], scores="score")
    source = pair_examples(file, **fields)
    assert (source.nway, source.scored) == (4, True)
    assert source[0] == Example("a", ("b", "c", "d", "e"), (4.0, 3.0, 2.0, 1.0))
    assert source[1] == Example("f", ("g", "h", "i", "j"), (9.5,) * 4)
    assert pair_examples(file, nway=2, **fields)[0] == Example("a", ("b", "c"), (4.0, 3.0))


def test_triples_of_texts(tmp_path):
    """ColBERTv1's triples.train.small.tsv."""
    file = write(tmp_path / "triples.train.small.tsv", "what\tyes\tno\nwho\tme\tyou\tthem\n")
    source = pair_examples(file)
    assert source.nway == 2
    assert [*source] == [Example("what", ("yes", "no"), None), Example("who", ("me", "you"), None)]
    with pytest.raises(ValueError, match=r"line 2: expected query, positive, \.\.\. with tabs"):
        pair_examples(write(file, "what\tyes\tno\nwho\n"))
    with pytest.raises(ValueError, match=r"line 2: 1 documents, but nway is 2"):
        pair_examples(write(file, "what\tyes\tno\nwho\tme\n"))


GOOD = {"query": "a", "positive": "b", "n": ["c", "d"], "s": [3, 2, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": ""}, r"p\.jsonl, line 2: field 'query' is empty: give it a text"),
        ({"positive": " \n"}, r"line 2: field 'positive' is empty"),
        ({"n": ["c", ""]}, r"line 2: field 'n' is empty"),
        ({"n": ["c", None]}, r"line 2: field 'n' must hold texts, got None"),
        ({"query": 5}, r"line 2: field 'query' must hold texts, got 5"),
        ({"positive": ["b"]}, r"line 2: field 'positive' must hold texts, got \['b'\]"),
        ({"query": "\ud800"}, r"line 2: field 'query' is not valid Unicode: character 0 is a lone"),
        ({"n": ["c"], "s": [1, 2]}, r"line 2: 2 documents, but nway is 3: lower nway or take"),
        ({"n": ["c", "d", "e"]}, r"line 2: 3 scores for 4 documents"),
        ({"s": [3, float("nan"), 1]}, r"line 2: the score of document 2 is nan"),
        ({"s": 3}, r"line 2: field 's' must be a list of scores, got 3"),
    ],
)
def test_unreadable_pairs(tmp_path, change, message):
    file = write(tmp_path / "p.jsonl", jsonl(GOOD, GOOD | change))
    with pytest.raises(ValueError, match=message):
        pair_examples(file, negatives="n", scores="s")


def parquet(file, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


def test_pairs_in_tables_and_their_fields(tmp_path, caplog):
    """Fields are found by their names, whatever the case; the log says which."""
    rows = [
        {"id": "7", "Question": "a, b", "ANSWER": 'b "c"', "neg": "n"},
        {"id": "8", "Question": "d", "ANSWER": "e", "neg": "m"},
    ]
    csv = 'id,Question,ANSWER,neg\r\n7,"a, b","b ""c""",n\r\n8,d,e,m\r\n'
    tsv = "id\tQuestion\tANSWER\tneg\n" + "".join("\t".join(r.values()) + "\n" for r in rows)
    files = [
        write(tmp_path / "p.csv", csv),
        write(tmp_path / "p.csv.gz", csv),
        write(tmp_path / "p.tsv", tsv),
        write(tmp_path / "p.jsonl.gz", jsonl(*rows)),
        parquet(tmp_path / "p.parquet", rows),
    ]
    for file in files:
        with caplog.at_level("INFO", "colbert_jax"):
            source = pair_examples(file)
        assert list(source) == [Example("a, b", ('b "c"',), None), Example("d", ("e",), None)]
        assert "the query is 'Question', the document 'ANSWER'; not read: id, neg" in caplog.text
        caplog.clear()
        both = pair_examples(file, query="Question", negatives="neg")
        assert both.nway == 2 and both[1].documents == ("e", "m")
        assert both.fingerprint != source.fingerprint
    assert pair_examples(files[0]).fingerprint == pair_examples(files[0]).fingerprint


def test_lists_in_parquet(tmp_path):
    rows = [{"query": "a", "positive": "b", "hard": ["c", "d"], "s": [3.0, 2.0, 1.0]}]
    source = pair_examples(parquet(tmp_path / "p.parquet", rows), negatives="hard", scores="s")
    assert source[0] == Example("a", ("b", "c", "d"), (3.0, 2.0, 1.0))


def test_fields_that_are_not_found(tmp_path):
    for name, text, known, message in [
        ("a.jsonl", '{"src": "x", "title": "y"}', {}, r"a\.jsonl, line 1: no field 'query' and no "
         r"field 'positive', it has 'src', 'title': name the one with the query \(query=\) and the "
         r"one with the document that answers it \(positive=\)"),
        ("a2.jsonl", '{"text": "x", "t": "y"}', {}, r"no field 'query', it has 'text', 't': "
         r"name the one with the query \(query=\)$"),
        ("b.jsonl", '{"query": "x", "abs": "y"}', {}, "no field 'positive'.*answers it"),
        ("c.csv", "title,abs\nx,y\n", {"query": "title"}, "no field 'positive', it has 'title', '"),
        ("d.csv", "q,p\na,b\nc,\n", {"query": "q", "positive": "p"}, "d.csv, line 3: field 'p'"),
        ("e.tsv", "a\tb\n", {"query": "q"}, r"line 1: no header with 'q': there is 'a\\tb'"),
        ("f.tsv", "query\tanswer\na\n", {}, "line 2: 1 fields with tabs between, and the h"),
        ("g.csv", "", {}, "the file is empty"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pair_examples(write(tmp_path / name, text), **known)


def test_subset(tmp_path):
    rows = [{"query": f"{i // 2}", "positive": f"d{i}"} for i in range(6)]
    whole = pair_examples(write(tmp_path / "p.jsonl", jsonl(*rows)))
    part = subset(whole, np.array([4, 1]))
    assert [x.documents[0] for x in part] == ["d4", "d1"]
    assert most_positives(part) == 2 and positives_of(part, "0") == ("d0", "d1")
    assert part.fingerprint != subset(whole, np.array([1, 4])).fingerprint
    with pytest.raises(ValueError, match="no example is left"):
        subset(whole, np.array([], int))


def test_unreadable_lines_of_pairs(tmp_path):
    for line, message in [
        ("[1]", "line 1: expected a JSON object"),
        ("{", "line 1: not valid JSON"),
        ('{"query": "a"}', "line 1: no field 'positive', it has 'query'"),
    ]:
        with pytest.raises(ValueError, match=message):
            pair_examples(write(tmp_path / "p.jsonl", line))
    with pytest.raises(FileNotFoundError):
        pair_examples(tmp_path / "nowhere.jsonl")


# ---- Hugging Face data sets


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


COLUMNS = {
    "question": ["a", "b", "c"],
    "answer": ["x", "y", "z"],
    "wrong": ["u", "v", "w"],
    "texts": [["x", "u"], ["y", "v"], ["z", "w"]],
    "scores": [[2.0, 1.0], [4.0, 3.5], [9.0, -1.0]],
    "id": [1, 2, 3],
}


def test_data_sets(datasets, tmp_path):
    data = datasets.Dataset.from_dict(COLUMNS)
    source = dataset_examples(data, query="question", positive="answer", negatives="wrong")
    assert (len(source), source.nway, source.scored) == (3, 2, False)
    assert source[1] == Example("b", ("y", "v"), None)
    source = dataset_examples(data, query="question", documents="texts", scores="scores")
    assert source.scored and source[1] == Example("b", ("y", "v"), (4.0, 3.5))
    # The same from a folder, of all splits, and from a file through load_dataset.
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "splits")
    write(tmp_path / "rows.jsonl", jsonl(*data))
    fields = dict(query="question", documents="texts", scores="scores")
    for place, load in (
        (tmp_path / "one", {}),
        (str(tmp_path / "splits"), {}),
        ("json", {"data_files": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "c")}),
    ):
        other = dataset_examples(place, **fields, **load)
        assert [*other] == [*source] and other.fingerprint == source.fingerprint
    assert len(dataset_examples(tmp_path / "splits", split="test", **fields)) == 1
    shifted = datasets.Dataset.from_dict(COLUMNS | {"scores": [[2.0, 1.0]] * 3})
    assert dataset_examples(shifted, **fields).fingerprint != source.fingerprint


def test_unreadable_data_sets(datasets):
    data = datasets.Dataset.from_dict(COLUMNS)

    def fails(message, dataset=data, **settings):
        with pytest.raises(ValueError, match=message):
            dataset_examples(dataset, **settings)

    fails(
        "no column 'reply', 'w'; it has 'question'",
        query="question",
        positive="reply",
        negatives="w",
    )
    fails("name either the column of `documents`", query="question")
    fails("name either", query="question", positive="answer", documents="texts")
    fails("row 0: field 'id' must hold texts, got 1", query="id", positive="answer")
    fails(
        "streamed data can be neither shuffled nor resumed",
        datasets.IterableDatasetDict(),
        query="question",
        positive="answer",
    )
    splits = datasets.DatasetDict(test=data)
    fails("no split 'train', it has test", splits, query="question", positive="answer")
    fails("the data set is empty", data.select([]), query="question", positive="answer")
    bad = datasets.Dataset.from_dict({"q": ["a", ""], "p": ["x", "y"]})
    fails("the data set, row 1: field 'q' is empty", bad, query="q", positive="p")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "colbert-jax\[train\]"'):
        dataset_examples("name", query="q", positive="p")


# ---- together


def test_concatenation(tmp_path):
    sources = []
    for n, size in enumerate((2, 1, 4)):
        rows = [{"query": f"q{n}{i}", "positive": "p"} for i in range(size)]
        sources.append(pair_examples(write(tmp_path / f"{n}.jsonl", jsonl(*rows))))
    both = concatenate(sources)
    assert (len(both), both.nway, both.scored) == (7, 1, False)
    expected = ["q00", "q01", "q10", "q20", "q21", "q22", "q23"]
    assert [both[i].query for i in range(7)] == expected
    assert both[-1].query == "q23"
    with pytest.raises(IndexError):
        both[7]
    assert concatenate(sources[::-1]).fingerprint != both.fingerprint
    with pytest.raises(ValueError, match=r"the same nway, got \[1, 2\]: give each the same `nway`"):
        other = write(tmp_path / "n.jsonl", jsonl({"query": "q", "positive": "p", "n": "n"}))
        concatenate([sources[0], pair_examples(other, negatives="n")])
    with pytest.raises(ValueError, match=r"the same scored, got \[False, True\]"):
        other = write(tmp_path / "s.jsonl", jsonl({"query": "q", "positive": "p", "s": [1]}))
        concatenate([sources[0], pair_examples(other, scores="s")])
    with pytest.raises(ValueError, match="no source"):
        concatenate([])


@pytest.mark.parametrize(
    "line", ['["%s", 1, 2]', '[1, "%s", 2]', '[1, ["%s"], 2]', '{"%s": 1}', '"%s"', "%s"]
)
def test_messages_are_short_whatever_a_line_holds(tmp_path, line):
    (tmp_path / "q.tsv").write_text("1\tone\n")
    (tmp_path / "c.tsv").write_text("1\tone\n2\ttwo\n")
    (tmp_path / "t.jsonl").write_text("[1, 1, 2]\n" + line % ("9" * 100_000) + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2: ") as error:
        stanford_examples(tmp_path / "t.jsonl", tmp_path / "q.tsv", tmp_path / "c.tsv")
    assert len(str(error.value)) < 500
    (tmp_path / "p.jsonl").write_text('{"query": "a", "%s": "b"}\n' % ("x" * 100_000))
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: no field 'positive'") as error:
        pair_examples(tmp_path / "p.jsonl")
    assert len(str(error.value)) < 500
