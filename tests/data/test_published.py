"""Every published format, from a tiny sample written on the spot."""

import gzip
import json
import sys
import types

import pytest

from colbert_jax.data.collections import read_collection, read_documents, read_qrels, read_queries
from colbert_jax.data.documents import Documents
from colbert_jax.data.lines import Lines
from colbert_jax.data.published import read_test_collection
from colbert_jax.data.tables import parse_columns

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow (the extra tables) is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

DOCS = [
    {"_id": "d 1", "title": "Heat", "text": "of flow", "metadata": {"year": 1999}},
    {"_id": "d2", "title": "", "text": "cats, and dogs"},
    {"_id": "d3", "title": "", "text": ""},
]
QUERIES = [{"_id": "1", "text": "warm"}, {"_id": "2", "text": "pets"}, {"_id": "3", "text": "no"}]


def put(folder, name, data):
    """Write a file, packed and laid out as its name says; rows are mappings."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(data), path)
        return path
    if not isinstance(data, str):
        data = "".join(json.dumps(row) + "\n" for row in data)
    packed = data.encode()
    if name.endswith(".gz"):
        packed = gzip.compress(packed)
    elif name.endswith(".zst"):
        packed = pyarrow.compress(packed, "zstd", asbytes=True)
    path.write_bytes(packed)
    return path


def texts(collection):
    return {pid: text for pid, text, _ in collection.documents()}


TEXTS = {"d 1": "Heat | of flow", "d2": "cats, and dogs", "d3": ""}
QRELS = {"1": {"d 1": 2}, "2": {"d2": 1, "d3": 0}}
TSV_QRELS = "query-id\tcorpus-id\tscore\n1\td 1\t2\n2\td2\t1\n2\td3\t0\n2\td2\t1\n"


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_beir(tmp_path, packed):
    put(tmp_path, f"corpus.jsonl{packed}", DOCS)
    put(tmp_path, f"queries.jsonl{packed}", QUERIES)
    put(tmp_path, f"qrels/test.tsv{packed}", TSV_QRELS)
    put(tmp_path, "qrels/dev.tsv", TSV_QRELS)
    found = read_test_collection(tmp_path)
    assert found.describe() == "BEIR folder, 3 documents, 2 test queries"
    assert found.name == tmp_path.name
    assert texts(found) == TEXTS and found.qrels == QRELS
    assert found.queries == {"1": "warm", "2": "pets"}
    assert next(found.documents())[2] == {"year": 1999}
    notes = "\n".join(found.notes)
    assert "1 judgements are there twice with one gain, first at" in notes and "line 5" in notes
    assert "1 queries without a judgement: left out" in notes
    assert "1 documents have an empty text, 'd3' first" in notes
    assert "fields of documents: year" in notes
    assert [item[0] for item in Documents(found)] == ["d 1", "d2", "d3"]
    assert read_test_collection(tmp_path, split="dev").split == "dev"
    with pytest.raises(ValueError, match="there is no split 'train': queries are there for dev, t"):
        read_test_collection(tmp_path, split="train")


def test_nanobeir_parquet_and_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"query-id": q, "corpus-id": p} for q, p in (("1", "d 1"), ("2", "d2"))]
    put(tmp_path, "corpus/train-00000-of-00002.parquet", DOCS[:2])
    put(tmp_path, "corpus/train-00001-of-00002.parquet", [{"_id": "d3", "text": "end"}])
    put(tmp_path, "queries/train-00000-of-00001.parquet", QUERIES)
    put(tmp_path, "qrels/train-00000-of-00001.parquet", rows)
    found = read_test_collection(tmp_path)
    assert found.describe() == "data set folder, 3 documents, 2 queries"
    assert texts(found) == TEXTS | {"d3": "end"}
    assert found.qrels == {"1": {"d 1": 1}, "2": {"d2": 1}}
    documents = [{"key": "a", "abstract": "b", "head": "c", "year": 3}]
    found = read_test_collection(
        datasets.Dataset.from_list(documents),
        queries=datasets.Dataset.from_list([{"n": "1", "ask": "b"}]),
        qrels=datasets.Dataset.from_list([{"n": "1", "key": "a", "good": 2}]),
        columns={"id": "key", "text": "abstract", "title": "head"},
        query_columns={"id": "n", "text": "ask"},
        qrel_columns={"query": "n", "document": "key", "gain": "good"},
        name="mine",
    )
    assert list(found.documents()) == [("a", "c | b", {"year": 3})]
    assert found.qrels == {"1": {"a": 2}} and found.name == "mine"


def test_lotte(tmp_path):
    put(tmp_path, "test/collection.tsv", "0\tflow of heat\n1\tcats\n")
    for kind in ("search", "forum"):
        put(tmp_path, f"test/questions.{kind}.tsv", "0\twarm?\n")
        rows = [{"qid": 0, "query": "warm?", "url": "http://x", "answer_pids": [0, 1]}]
        put(tmp_path, f"test/qas.{kind}.jsonl", rows)
    found = read_test_collection(tmp_path / "test", split="forum")
    assert found.describe() == "LoTTE folder, 2 documents, 1 forum queries"
    assert found.qrels == {"0": {"0": 1, "1": 1}}
    with pytest.raises(ValueError, match=r"choose one: queries are there for forum, search"):
        read_test_collection(tmp_path / "test")
    with pytest.raises(ValueError, match=r"has no collection itself; is .*test meant\?"):
        read_test_collection(tmp_path)
    put(tmp_path, "test/collection.tsv.gz", "0\tflow\n")
    with pytest.raises(ValueError, match=r"collection\.tsv and collection\.tsv\.gz may both"):
        read_test_collection(tmp_path / "test", split="forum")


def test_msmarco(tmp_path):
    put(tmp_path / "p", "collection.tsv", "0\tflow\n1\tcats\n")
    put(tmp_path / "p", "queries.dev.small.tsv", "7\twarm\n")
    put(tmp_path / "p", "qrels.dev.small.tsv", "7\t0\t0\t1\n9\t0\t1\t1\n")
    with pytest.warns(UserWarning, match=r"p: 1 judged queries are not among the queries, '9' for"):
        found = read_test_collection(tmp_path / "p")
    assert found.describe() == "MS MARCO folder, 2 documents, 1 dev.small queries"
    folder = tmp_path / "d"
    put(folder, "msmarco-docs.tsv.gz", "D1\thttp://x\tT\tbody\nD2\thttp://y\tU\tmore\n")
    put(folder, "msmarco-docdev-queries.tsv.gz", "7\twarm\n")
    put(folder, "msmarco-docdev-qrels.tsv.gz", "7 0 D1 1\n")
    found = read_test_collection(folder)
    assert found.form == "MS MARCO documents" and texts(found) == {
        "D1": "T | body",
        "D2": "U | more",
    }
    columns = parse_columns("id=0,text=3,title=2,link=1")
    first = next(read_documents(folder / "msmarco-docs.tsv.gz", columns=columns))
    assert first == ("D1", "T | body", {"link": "http://x"})


@pytest.mark.parametrize(
    "topics",
    [
        "<top>\n<num> Number: 301\n<title> Heat &amp;\nflow\n<desc> Description:\nWarm.\n</top>\n",
        '<?xml version="1.0"?>\n<topics>\n<topic number="301">\n<query>Heat &amp; flow</query>\n'
        "<desc>Warm.</desc></topic>\n</topics>\n",
        "<top>\n<num>301</num>\n<title>Heat &amp; flow</title><desc>Warm.</desc>\n</top>\n",
    ],
)
def test_trec_topics(tmp_path, topics):
    file = put(tmp_path, "topics.txt.gz", topics)
    notes = []
    assert read_queries(file, notes=notes) == {"301": "Heat & flow"}
    assert "only id and text are used, not desc" in notes[0]
    assert read_queries(file, columns={"text": "desc"}) == {"301": "Warm."}
    put(tmp_path, "collection.tsv", "a\tflow\n")
    put(tmp_path, "qrels.txt", "301 0 a 1\n")
    assert read_test_collection(tmp_path).describe() == "folder, 1 documents, 1 queries"
    with pytest.raises(ValueError, match=r"topic '301' has no narr; it has"):
        read_queries(file, columns={"text": "narr"})


def test_csv(tmp_path):
    file = put(tmp_path, "c.csv", 'Doc ID,text,year\n1,"a, ""b""\nand c",2001\n\n2,d,\n')
    assert list(read_documents(file)) == [
        ("1", 'a, "b"\nand c', {"year": "2001"}),
        ("2", "d", {"year": ""}),
    ]
    assert read_queries(put(tmp_path, "q.csv", "query-id,text,kind\n1,a,x\n")) == {"1": "a"}
    file = put(tmp_path, "r.csv", "query-id,corpus-id,score\n1,2,1.0\n")
    assert read_qrels(file) == {"1": {"2": 1}}
    with pytest.raises(ValueError, match=r"r\.csv, line 2: a gain must be a whole number"):
        read_qrels(put(tmp_path, "r.csv", "query-id,corpus-id,score\n1,2,0.5\n"))
    plain = put(tmp_path, "n.csv", "x,1\ny,2\n")
    found = read_collection(plain, columns={"id": 1, "text": 0})
    assert list(found) == [("1", "x"), ("2", "y")]
    with pytest.raises(ValueError, match=r"line 2: there is no column 'body'; there are Doc ID, t"):
        list(read_collection(tmp_path / "c.csv", columns={"id": "Doc ID", "text": "body"}))
    with pytest.raises(ValueError, match="give the names in the header, or places from 0"):
        parse_columns("id=0,text=body")


def test_zst_lines_and_damage(tmp_path):
    file = put(tmp_path, "c.tsv.zst", "".join(f"{n}\ttext {n}\n" for n in range(3000)))
    assert len(Lines(file)) == len(list(read_collection(file))) == 3000
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"c\.tsv\.zst: damaged after line"):
        list(read_collection(file))
    with pytest.raises(ValueError, match=r"c\.tsv\.zst: damaged"):
        Lines(file)


def test_what_does_not_fit_is_said(tmp_path):
    files = dict(queries=put(tmp_path, "q.tsv", "1\ta\n"), qrels=put(tmp_path, "r", "1 0 x 1\n"))
    with pytest.raises(ValueError, match=r"documents 0 and 2, .* both have the id 'x'"):
        read_test_collection(put(tmp_path, "c.tsv", "x\ta\ny\tb\nx\tc\n"), **files)
    with pytest.raises(ValueError, match=r"1 of 1 judged documents are not in the collection"):
        read_test_collection(put(tmp_path, "c.tsv", "y\tb\n"), **files)
    put(tmp_path, "r", "1 0 x 0\n1 0 y 0\n")
    with pytest.warns(UserWarning, match=r"1 of 2 judged documents are not .*'x', for example"):
        found = read_test_collection(tmp_path / "c.tsv", **files)
    assert "1 queries have no relevant document" in found.notes[-1]
    put(tmp_path, "r", "2 0 y 1\n")
    with pytest.raises(ValueError, match=r"no query has a judgement: a query's id is '1'"):
        read_test_collection(tmp_path / "c.tsv", **files)
    with pytest.raises(ValueError, match=r"no collection of a known form.* there is c\.tsv, q"):
        read_test_collection(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        read_test_collection(tmp_path / "none")
    with pytest.raises(TypeError, match="queries and qrels go together"):
        read_test_collection(tmp_path, queries=files["queries"])


def test_ids_of_ir_datasets(tmp_path):
    ir_datasets = pytest.importorskip("ir_datasets", reason="the extra ir-datasets")
    dataset = ir_datasets.create_dataset(
        str(put(tmp_path, "c.tsv", "a\tflow\nb\tcats\n")),
        str(put(tmp_path, "q.tsv", "1\twarm\n")),
        str(put(tmp_path, "r", "1 0 a 1\n")),
    )
    ir_datasets.registry.register("colbert-jax-test", dataset)
    found = read_test_collection("ir_datasets:colbert-jax-test")
    assert found.describe() == "collection of ir_datasets, 2 documents, 1 queries"
    assert texts(found) == {"a": "flow", "b": "cats"} and found.qrels == {"1": {"a": 1}}
    with pytest.raises(ValueError, match="no id of ir_datasets"):
        read_test_collection("ir_datasets:none/such")


@pytest.mark.parametrize("beside", [False, True])
def test_data_sets_of_the_hub(monkeypatch, beside):
    """NanoBEIR has the judgements in a configuration, BEIR in a repository of their own."""
    rows = {
        "corpus": DOCS[1:],
        "queries": QUERIES,
        "qrels": [{"query-id": "2", "corpus-id": "d2", "score": 1}],
    }

    def load(name, part=None):
        if beside and part == "qrels":
            raise ValueError("unknown configuration")
        part = part or name.rpartition("-")[2]
        return {"test": tuple(rows[part])}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    found = read_test_collection("datasets:owner/Nano")
    assert found.describe() == "data set, 2 documents, 1 test queries" and found.name == "Nano"
