"""The language of filters: which documents a search may find, by their fields.

    {"year": {"gte": 2020, "lt": 2024}, "lang": "en", "tags": {"contains": "x"}}

A filter is a dict of fields; all of its entries are meant. An entry holds a value, which the field
must equal, or a dict of operators, which are all meant:

    eq, ne              equal to a value, or not
    in                  equal to one of a list of values
    gt, gte, lt, lte    greater, less
    contains            a list of strings has this string
    exists              True: the document has the field; False: it has not

`{"and": [filter, ...]}`, `{"or": [filter, ...]}` and `{"not": filter}` combine filters.

`ne` and `not` are complements: they hold for the documents for which `eq`, or the filter inside,
does not hold, and so for documents without the field. Numbers are compared with numbers; strings,
and dates as text in ISO 8601 (those with a time zone in UTC), with these, character by character.
A bool equals a bool only, and nothing equals a list: 1 is not True, and "abc" is neither below nor
above 2020.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from colbert_jax.data.fields import Value, plain_name, plain_scalar

# Values are kept, and compared, apart by kind. An empty list has a row too, for `exists`.
NUMBER, STRING, BOOLEAN, ELEMENT, EMPTY = range(5)
MAX_DEPTH = 50
MAX_CONDITIONS = 1000
MAX_VALUES = 1_000_000

_ORDER = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_OPERATORS = ("eq", "ne", "in", *_ORDER, "contains", "exists")


class FilterError(ValueError):
    """A filter that is not of the language, or names a field that no document has."""


class Lookup(NamedTuple):
    """Documents whose field has a value that stands all comparisons.

    name: the field. path: where in the filter it stands. kind: of the values; None: any, for
    `exists`. comparisons: SQL operators and values. among: the value must be one of these.
    """

    name: str
    path: str
    kind: int | None
    comparisons: tuple[tuple[str, Any], ...] = ()
    among: frozenset[Any] | None = None

    def sql(self) -> tuple[str, list[Any]]:
        """Its condition on a row of the table of values, and the parameters in it."""
        terms = ["name = ?"]
        parameters: list[Any] = [self.name]
        if self.kind is not None:
            terms.append("kind = ?")
            parameters.append(self.kind)
        for operator, value in self.comparisons:
            terms.append(f"value {operator} ?")
            parameters.append(value)
        if self.among is not None:
            terms.append(f"value IN ({', '.join('?' * len(self.among))})")
            parameters.extend(self.among)
        return " AND ".join(terms), parameters


class All(NamedTuple):
    """Documents that are in all parts."""

    parts: tuple[Expression, ...]


class Some(NamedTuple):
    """Documents that are in one of the parts."""

    parts: tuple[Expression, ...]


class Not(NamedTuple):
    """Documents that are not in the part."""

    part: Expression


Expression = Lookup | All | Some | Not


def stored(value: Value) -> list[tuple[int, Any]]:
    """The kind and form of a field's value, or of each element of a list, in the table."""
    if isinstance(value, list):
        return [(ELEMENT, item) for item in dict.fromkeys(value)] or [(EMPTY, 0)]
    if isinstance(value, bool):
        return [(BOOLEAN, int(value))]
    if isinstance(value, int | float):
        return [(NUMBER, value)]
    return [(STRING, value if isinstance(value, str) else _as_text(value))]


def _as_text(value: datetime.date) -> str:
    if isinstance(value, datetime.datetime) and value.utcoffset() is not None:
        value = value.astimezone(datetime.UTC)
    return value.isoformat()


def parse_json_filter(text: str) -> dict[str, Any]:
    """A filter from JSON, as on a command line. Dates are strings there.

    Raises:
      FilterError: not a JSON object, or a key twice in one.
    """
    try:
        where = json.loads(text, object_pairs_hook=_object)
    except FilterError:
        raise
    except (ValueError, RecursionError) as error:
        raise FilterError(f"the filter is not valid JSON: {error}: {text:.80}") from None
    if not isinstance(where, dict):
        raise FilterError(f'the filter must be an object, as in {{"year": 2020}}, got {text:.80}')
    return where


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise FilterError(
                f"the filter has {name!r} twice in one object: put all operators of a field into "
                'one object, or combine with "and"'
            )
        found[name] = value
    return found


def parse_filter(where: Mapping[str, Any]) -> Expression:
    """Check a filter and take it apart. An empty one lets every document through.

    Raises:
      FilterError: what is wrong, and where in the filter.
    """
    return _Parser().filter(where, "where", 0)


class _Parser:
    def __init__(self) -> None:
        self._conditions = self._values = 0

    def filter(self, where: Any, path: str, depth: int) -> Expression:
        if not isinstance(where, Mapping):
            raise FilterError(
                f"{path}: expected a dict of fields, as in {{'year': {{'gte': 2020}}}}, got "
                f"{where!r:.80}"
            )
        if depth > MAX_DEPTH:
            raise FilterError(f"{path:.80}...: nested deeper than {MAX_DEPTH}")
        parts: list[Expression] = []
        for name, value in where.items():
            at = f"{path}[{name!r:.60}]"
            if name in ("and", "or"):
                parts.append(self._combined(name, value, at, depth))
            elif name == "not":
                parts.append(Not(self.filter(value, at, depth + 1)))
            else:
                parts.extend(self._field(name, value, at))
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _combined(self, name: str, filters: Any, path: str, depth: int) -> Expression:
        if not isinstance(filters, list | tuple) or not filters:
            raise FilterError(f"{path}: expected a list of one filter or more, got {filters!r:.80}")
        parts = tuple(
            self.filter(part, f"{path}[{i}]", depth + 1) for i, part in enumerate(filters)
        )
        return All(parts) if name == "and" else Some(parts)

    def _field(self, name: Any, value: Any, path: str) -> Iterator[Expression]:
        try:
            plain_name(name)
        except (TypeError, ValueError) as error:
            raise FilterError(f"{path}: {error}") from None
        is_plain = not isinstance(value, Mapping)
        value = {"eq": value} if is_plain else value
        if not value:
            raise FilterError(f"{path}: names no operator; there are {', '.join(_OPERATORS)}")
        ranges: dict[int, list[tuple[str, Any]]] = {}
        for operator, operand in value.items():
            self._count(path)
            at = path if is_plain else f"{path}[{operator!r:.60}]"
            if operator in _ORDER:
                kind, one = self._ordered(operand, at)
                ranges.setdefault(kind, []).append((_ORDER[operator], one))
            else:
                yield self._condition(name, operator, operand, at, path)
        for kind, comparisons in ranges.items():
            yield Lookup(name, path, kind, tuple(comparisons))

    def _count(self, path: str) -> None:
        self._conditions += 1
        if self._conditions > MAX_CONDITIONS:
            raise FilterError(
                f"{path:.80}: more than {MAX_CONDITIONS} conditions: gather values with 'in'"
            )

    def _condition(self, name: str, operator: Any, operand: Any, at: str, path: str) -> Expression:
        if operator in ("eq", "ne"):
            kind, value = self._scalar(operand, at)
            equal = Lookup(name, path, kind, (("=", value),))
            return equal if operator == "eq" else Not(equal)
        if operator == "in":
            return self._among(name, operand, at, path)
        if operator == "contains":
            if not isinstance(operand, str):
                raise FilterError(
                    f"{at}: one string that the list has, got {operand!r:.80}; for several, "
                    "combine conditions with 'and' or 'or'"
                )
            return Lookup(name, path, ELEMENT, (("=", self._scalar(operand, at)[1]),))
        if operator == "exists":
            if not isinstance(operand, bool):
                raise FilterError(f"{at}: True or False, got {operand!r:.80}")
            present = Lookup(name, path, None)
            return present if operand else Not(present)
        raise FilterError(f"{at}: no such operator; there are {', '.join(_OPERATORS)}")

    def _among(self, name: str, operand: Any, at: str, path: str) -> Expression:
        if isinstance(operand, str | bytes | Mapping) or not hasattr(operand, "__iter__"):
            raise FilterError(f"{at}: a list of values, got {operand!r:.80}")
        kinds: dict[int, set[Any]] = {}
        for i, item in enumerate(operand):
            self._values += 1
            if self._values > MAX_VALUES:
                raise FilterError(f"{at}: more than {MAX_VALUES} values")
            kind, value = self._scalar(item, f"{at}[{i}]")
            kinds.setdefault(kind, set()).add(value)
        parts = tuple(
            Lookup(name, path, kind, among=frozenset(values)) for kind, values in kinds.items()
        )
        return Some(parts) if parts else Lookup(name, path, NUMBER, among=frozenset())

    def _ordered(self, operand: Any, at: str) -> tuple[int, Any]:
        kind, value = self._scalar(operand, at)
        if kind == BOOLEAN:
            raise FilterError(f"{at}: bools have no order: use 'eq'")
        return kind, value

    def _scalar(self, value: Any, at: str) -> tuple[int, Any]:
        if value is None:
            raise FilterError(f"{at}: None is no value: use {{'exists': False}}")
        if isinstance(value, list | tuple | set | frozenset):
            raise FilterError(
                f"{at}: a field is not compared with a list: use {{'in': [...]}} for one of "
                "several values, {'contains': '...'} for a field that is a list"
            )
        try:
            return stored(plain_scalar(value))[0]
        except (TypeError, ValueError) as error:
            raise FilterError(f"{at}: {error}") from None
