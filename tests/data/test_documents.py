"""Documents from all kinds of sources."""

import operator

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
