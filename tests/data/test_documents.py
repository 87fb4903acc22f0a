"""Documents from all kinds of sources."""

import datetime
import json
import operator
import warnings

import pytest

from colbert_jax.data.documents import Documents

PAIRS = [("a", "one"), ("b", "two")]


@pytest.mark.parametrize(
    "source",
    [
        PAIRS,
        iter(PAIRS),
        [list(pair) for pair in PAIRS],
        dict(PAIRS),
        [{"id": "a", "text": "one"}, {"_id": "b", "contents": "two", "title": ""}],
    ],
)
def test_sources_with_ids(source):
    assert list(Documents(source)) == PAIRS


def test_sources_without_ids():
    assert list(Documents(["one", "two"])) == ["one", "two"]
    assert list(Documents([{"text": "one", "title": "T"}])) == ["T | one"]
    assert list(Documents([])) == []


def test_whole_numbers_are_ids():
    assert list(Documents([(7, "seven"), {"id": 8, "text": "eight"}])) == [
        ("7", "seven"),
        ("8", "eight"),
    ]


def test_a_file(tmp_path):
    file = tmp_path / "c.tsv"
    file.write_text("a\tone\nb\ttwo\n")
    assert list(Documents(file)) == list(Documents(str(file))) == PAIRS
    with pytest.raises(FileNotFoundError):
        Documents(tmp_path / "nowhere.tsv")


def test_a_dataset():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"id": ["a", "b"], "text": ["one", "two"]})
    assert list(Documents(rows)) == PAIRS
    assert list(Documents(rows.to_iterable_dataset())) == PAIRS
    with pytest.raises(TypeError, match="choose train or test"):
        Documents(datasets.DatasetDict(train=rows, test=rows))


def test_length_hint():
    assert operator.length_hint(Documents(PAIRS)) == 2
    assert operator.length_hint(Documents(iter(PAIRS))) == 0


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (3, TypeError, "documents must be an iterable"),
        (b"one", TypeError, "documents must be an iterable"),
        ([3], TypeError, "document 0: expected a string"),
        (["one", None], TypeError, "document 1: expected a string"),
        ([("a", None)], TypeError, "document 0: a text must be a string"),
        ([(None, "one")], TypeError, "document 0: an id must be"),
        ([(1.5, "one")], TypeError, "document 0: an id must be"),
        ([("a", "one", None)], TypeError, "document 0: expected a string"),
        ([{"id": "a"}], ValueError, r"document 0: expected an id .* got the fields id"),
        (["one", ("b", "two")], ValueError, "document 1 has an id, but those before"),
        ([("a", "one"), "two"], ValueError, "document 1 has no id, but those before"),
    ],
)
def test_bad_sources_are_named(source, error, match):
    with pytest.raises(error, match=match):
        list(Documents(source))


def test_the_first_document_is_checked_at_once_and_the_rest_is_read_later():
    def source():
        yield "one"
        raise RuntimeError("read too early")

    documents = Documents(source())
    assert next(documents) == "one"
    with pytest.raises(RuntimeError, match="read too early"):
        next(documents)
    with pytest.raises(TypeError, match="document 0"):
        Documents([None])


FIELDS = [("a", "T | one", {"year": 2020, "tags": ["x"]}), ("b", "two")]


def test_what_a_record_has_beside_id_text_and_title_are_fields(tmp_path):
    records = [
        {"id": "a", "year": 2020, "title": "T", "text": "one", "tags": ["x"], "lang": None},
        {"id": "b", "text": "two", "metadata": {}},
    ]
    assert list(Documents(records)) == FIELDS
    assert list(Documents(Documents(records))) == FIELDS
    assert list(Documents(FIELDS)) == FIELDS
    assert list(Documents(records, fields=False)) == [("a", "T | one"), ("b", "two")]
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    assert list(Documents(file)) == FIELDS


def test_fields_without_ids():
    documents = ["zero", {"text": "one", "year": 1}, (None, "two", {"year": 2}), {"text": "three"}]
    found = ["zero", (None, "one", {"year": 1}), (None, "two", {"year": 2}), "three"]
    assert list(Documents(documents)) == list(Documents(found)) == found
    with pytest.raises(ValueError, match="document 1 has an id, but those before it have no id"):
        list(Documents(["zero", ("a", "one", {"year": 1})]))


def test_metadata_lies_beside_the_other_fields():
    metadata = {"url": "u", "year": 1, "text": "not the text"}
    ((_, text, fields),) = Documents([{"_id": "a", "text": "t", "year": 2, "metadata": metadata}])
    assert text == "t"
    assert fields == {"year": 2, "url": "u", "metadata.year": 1, "text": "not the text"}
    assert list(Documents([{"id": "a", "text": "t", "metadata": "m"}])) == [
        ("a", "t", {"metadata": "m"})
    ]


def test_a_second_name_for_id_or_text_is_a_field():
    assert list(Documents([{"_id": "a", "id": 7, "text": "t", "body": "b"}])) == [
        ("a", "t", {"id": 7, "body": "b"})
    ]


def test_a_url_that_a_header_names_is_a_field(tmp_path):
    file = tmp_path / "c.tsv"
    file.write_text("id\tURL\ttitle\ttext\n7\thttp://x\tT\ta\n8\t\t\tb\n")
    assert list(Documents(file)) == [("7", "T | a", {"URL": "http://x"}), ("8", "b")]
    file.write_text("D1\thttps://x.org/a\tT\tbody\n")  # MS MARCO's documents
    assert list(Documents(file)) == [("D1", "T | body")]


BAD = '{"id": "%s", "text": "t", "ok": 1, "vector": [1, 2], "n": %s, "and": "x"}\n'


def test_what_no_field_can_hold_is_left_out_of_files(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text(BAD % ("a", 3) + BAD % ("b", "NaN") + BAD % ("c", '{"m": 1}'))
    expected = [("a", "t", {"ok": 1, "n": 3}), *((i, "t", {"ok": 1}) for i in "bc")]
    with pytest.warns(UserWarning) as caught:
        documents = Documents(file)
        assert not caught.list
        assert list(documents) == expected
    (warning,) = caught
    for part in (
        r"'vector' of 3 documents, first of document 0 (id 'a'): a list must hold strings only",
        r"'n' of 2 documents, first of document 1 (id 'b'): a number must be finite, got nan",
        r"'and' of 3 documents, first of document 0 (id 'a'): 'and' is a word of the language",
    ):
        assert part in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(Documents(file, fields=False)) == [(i, "t") for i in "abc"]


def test_what_no_field_can_hold_is_left_out_of_datasets():
    datasets = pytest.importorskip("datasets")
    when = datetime.datetime(2020, 1, 1)
    rows = datasets.Dataset.from_dict(
        {"id": ["a", "b"], "text": ["t", "u"], "when": [when, None], "vector": [[0.5], None]}
    )
    for source in (rows, rows.to_iterable_dataset()):
        with pytest.warns(UserWarning, match="'vector' of 1 document, first of document 0"):
            assert list(Documents(source)) == [("a", "t", {"when": when}), ("b", "u")]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"vector": [1, 2]}, TypeError, "field 'vector': a list must hold strings only, got 1"),
        ({"n": float("nan")}, ValueError, "field 'n': a number must be finite"),
        ({"or": 1}, ValueError, "field 'or': 'or' is a word of the language"),
        ({3: 1}, TypeError, "field 3: a field's name is a string"),
    ],
)
def test_what_no_field_can_hold_is_an_error_in_objects(fields, error, message):
    for document in ({"id": "a", "text": "t", **fields}, ("a", "t", fields)):
        with pytest.raises(error, match=rf"document 1 \(id 'a'\): {message}"):
            list(Documents([("z", "t"), document]))
    with pytest.raises(error, match=f"document 0: {message}"):
        Documents([{"text": "t", **fields}])
