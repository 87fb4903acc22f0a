"""Values against schemas: what is said of those that do not fit."""

import pytest

from colbert_jax.serving.schema import SchemaError, checked, from_query

SCHEMA = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "minLength": 1, "maxLength": 5},
        "k": {"type": "integer", "minimum": 1, "maximum": 10, "default": 3},
        "mode": {"type": "string", "enum": ["fast", "exact"]},
        "ids": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        "docs": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    },
    "required": ["query"],
    "additionalProperties": False,
}


def test_defaults_fill_what_is_left_out():
    assert checked({"query": "a"}, SCHEMA) == {"query": "a", "k": 3}
    assert checked({"query": "a", "k": 10, "ids": ["b"]}, SCHEMA)["k"] == 10


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "the body must be an object, got 3"),
        ({}, "query is missing"),
        ({"query": 3}, "query must be a string, got 3"),
        ({"query": ""}, "query must have at least 1 characters, got 0"),
        ({"query": "abcdef"}, "query may have at most 5 characters, got 6"),
        ({"query": "a", "k": 1_000_000_000}, "k must be at most 10, got 1000000000"),
        ({"query": "a", "k": 0}, "k must be at least 1, got 0"),
        ({"query": "a", "k": True}, "k must be a whole number, got true"),
        ({"query": "a", "k": 1.5}, "k must be a whole number, got 1.5"),
        ({"query": "a", "mode": "best"}, 'mode must be one of "fast", "exact", got "best"'),
        ({"query": "a", "ids": ["b", 3]}, r"ids\[1\] must be a string, got 3"),
        ({"query": "a", "ids": ["b"] * 3}, "ids may have at most 2 items, got 3"),
        ({"query": "a", "docs": 3}, "docs must be a string or a list, got 3"),
        ({"query": "a", "docs": ["b", None]}, r"docs\[1\] must be a string, got null"),
        ({"query": "a", "K": 3}, 'the body has no field "K"; it has docs, ids, k, mode, query'),
    ],
)
def test_what_is_wrong_is_named(value, message):
    with pytest.raises(SchemaError, match=f"^{message}$"):
        checked(value, SCHEMA)


def test_numbers_must_be_finite():
    with pytest.raises(SchemaError, match="must be finite"):
        checked(float("inf"), {"type": "number"})


def test_a_field_may_choose_the_schema():
    either = {
        "anyOf": [
            {"type": "object", "required": ["a", "b"], "x-when": "a"},
            {"type": "object", "required": ["c"]},
        ]
    }
    with pytest.raises(SchemaError, match="b is missing"):
        checked({"a": 1}, either)
    with pytest.raises(SchemaError, match="c is missing"):
        checked({}, either)


def test_parameters_of_an_address():
    assert from_query("true", {"type": "boolean"}, "explain") is True
    assert from_query("12", {"type": "integer"}, "k") == 12
    assert from_query('{"a": 1}', {"type": "object"}, "where") == {"a": 1}
    for text, kind, message in (
        ("ten", "integer", 'k must be a whole number, got "ten"'),
        ("maybe", "boolean", "k must be true or false"),
        ("[" * 100_000, "object", "k must be an object"),
        ("9" * 5000, "integer", "k must be a whole number"),
    ):
        with pytest.raises(SchemaError, match=message):
            from_query(text, {"type": kind}, "k")
