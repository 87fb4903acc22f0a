"""The language of filters: what it refuses, and where."""

import datetime
import json
import math

import pytest

from colbert_jax.index.filters import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    All,
    FilterError,
    Lookup,
    Not,
    Some,
    parse_filter,
    parse_json_filter,
)


def nested(depth):
    where = {"a": 1}
    for _ in range(depth):
        where = {"not": where}
    return where


def test_all_entries_and_operators_are_meant():
    found = parse_filter({"year": {"gte": 2020, "lt": 2024, "ne": 2022}, "lang": "en"})
    assert isinstance(found, All) and len(found.parts) == 3
    assert found.parts[1] == Lookup(
        "year", "where['year']", 0, ((">=", 2020), ("<", 2024))
    )  # one walk over the range
    assert isinstance(found.parts[0], Not)
    assert parse_filter({}) == All(())
    assert isinstance(parse_filter({"or": [{"a": 1}, {"b": 2}]}), Some)


def test_names_and_values_are_parameters_only():
    evil = "x'; DROP TABLE search; --"
    terms, parameters = parse_filter({evil: evil}).sql()
    assert evil not in terms and parameters.count(evil) == 2


def test_json_parses_to_the_same():
    where = {"year": {"gte": 2020}, "or": [{"a": "ü"}, {"not": {"b": {"in": [1, "2", True]}}}]}
    assert parse_json_filter(json.dumps(where)) == where


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (3, r"where: expected a dict of fields"),
        ("year > 3", r"where: expected a dict of fields"),
        ({"and": {"a": 1}}, r"where\['and'\]: expected a list of one filter or more"),
        ({"or": []}, r"where\['or'\]: expected a list of one filter or more"),
        ({"or": [{"a": 1}, 2]}, r"where\['or'\]\[1\]: expected a dict of fields"),
        ({"not": [{"a": 1}]}, r"where\['not'\]: expected a dict of fields"),
        ({"": 1}, r"where\[''\]: a field's name may not be empty"),
        ({1: 1}, r"where\[1\]: a field's name is a string"),
        ({"a": {}}, r"where\['a'\]: names no operator; there are eq, ne"),
        ({"a": {"$gte": 1}}, r"where\['a'\]\['\$gte'\]: no such operator; there are eq, ne"),
        ({"a": {(): 1}}, r"no such operator"),
        ({"a": [1, 2]}, r"where\['a'\]: a field is not compared with a list: use \{'in'"),
        ({"a": {"ne": ["x"]}}, r"where\['a'\]\['ne'\]: a field is not compared with a list"),
        ({"a": None}, r"where\['a'\]: None is no value: use \{'exists': False\}"),
        ({"a": {"in": "x"}}, r"where\['a'\]\['in'\]: a list of values, got 'x'"),
        ({"a": {"in": 3}}, r"where\['a'\]\['in'\]: a list of values, got 3"),
        ({"a": {"in": [1, None]}}, r"where\['a'\]\['in'\]\[1\]: None is no value"),
        ({"a": {"gt": True}}, r"where\['a'\]\['gt'\]: bools have no order"),
        ({"a": {"contains": ["x"]}}, r"where\['a'\]\['contains'\]: one string"),
        ({"a": {"contains": 1}}, r"where\['a'\]\['contains'\]: one string"),
        ({"a": {"exists": 1}}, r"where\['a'\]\['exists'\]: True or False"),
        ({"a": math.nan}, r"where\['a'\]: a number must be finite"),
        ({"a": {"lt": math.inf}}, r"where\['a'\]\['lt'\]: a number must be finite"),
        ({"a": 1 << 63}, r"where\['a'\]: a whole number beyond 64 bits"),
        ({"a": b"x"}, r"where\['a'\]: a value must be a string"),
        ({"a": "\ud800"}, r"where\['a'\]: not valid Unicode"),
        ({"a": {"b": {"c": 1}}}, r"where\['a'\]\['b'\]: no such operator"),
        (nested(MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH}"),
        ({"or": [{"a": n} for n in range(MAX_CONDITIONS + 1)]}, "gather values with 'in'"),
    ],
)
def test_what_is_wrong_and_where(where, message):
    with pytest.raises(FilterError, match=message):
        parse_filter(where)


def test_a_filter_inside_itself():
    where = {}
    where["not"] = where
    with pytest.raises(FilterError, match="nested deeper"):
        parse_filter(where)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("year=3", "not valid JSON"),
        ("[1]", "must be an object"),
        ('{"a": 1, "a": 2}', "'a' twice in one object"),
        ('{"a": {"gt": 1, "gt": 2}}', "'gt' twice in one object"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(FilterError, match=message):
        parse_json_filter(text)


def test_values_at_the_limits_are_taken():
    parse_filter(nested(MAX_DEPTH))
    parse_filter({"a": {"in": [-(1 << 63), (1 << 63) - 1, 1e308, "", datetime.date.min]}})
