"""Fields of documents: what their names and values may be."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Value = str | int | float | bool | datetime.date | list[str]  # a datetime is a date
RESERVED = ("and", "or", "not")  # words of the language of filters
_MOST = 1 << 63  # whole numbers are kept in 64 bits


def check_fields(fields: Any, document: str) -> dict[str, Value]:
    """A document's fields as plain Python values; those that are None are left out.

    Args:
      document: what errors call it.

    Raises:
      TypeError, ValueError: a name or a value that no field can have, naming document and field.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"{document}: fields must be a dict, got {type(fields).__name__}")
    checked = {}
    for name, value in fields.items():
        if value is None:
            continue
        try:
            checked[plain_name(name)] = plain_value(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{document}: field {name!r:.60}: {error}") from None
    return checked


def usable_fields(fields: Mapping[Any, Any]) -> tuple[dict[str, Value], dict[str, str]]:
    """The fields that can be kept, and, by name, why others can not."""
    kept: dict[str, Value] = {}
    wrong: dict[str, str] = {}
    for name, value in fields.items():
        if value is None:
            continue
        try:
            kept[plain_name(name)] = plain_value(value)
        except (TypeError, ValueError) as error:
            wrong[str(name)] = str(error)
    return kept, wrong


def plain_name(name: Any) -> str:
    """A field's name. Raises TypeError or ValueError for what can be none."""
    if not isinstance(name, str):
        raise TypeError(f"a field's name is a string, got {type(name).__name__}")
    if not name:
        raise ValueError("a field's name may not be empty")
    if name in RESERVED:
        raise ValueError(f"{name!r} is a word of the language of filters: name the field otherwise")
    return _string(name)


def plain_value(value: Any) -> Value:
    """A field's value. Raises TypeError or ValueError for what can be none."""
    if isinstance(value, list | tuple):
        strings = [item for item in value if isinstance(item, str)]
        if len(strings) < len(value):
            other = next(item for item in value if not isinstance(item, str))
            raise TypeError(f"a list must hold strings only, got {other!r:.60}")
        return list(map(_string, strings))
    return plain_scalar(value)


def plain_scalar(value: Any) -> str | int | float | bool | datetime.date:
    """One value. Raises TypeError or ValueError for what can be none."""
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -_MOST <= value < _MOST:
            raise ValueError("a whole number beyond 64 bits: give it as a string")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a number must be finite, got {value}")
        return float(value)
    if isinstance(value, datetime.date):
        return _date(value)
    raise TypeError(
        "a value must be a string, a number, a bool, a date or a list of strings, got "
        f"{type(value).__name__} {value!r:.60}"
    )


def _string(value: str) -> str:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"not valid Unicode: character {error.start}") from None
    return str.__str__(value)


def _date(value: datetime.date) -> datetime.date:
    if value != value:  # pandas' NaT
        raise ValueError("not a date: give None where there is none")
    if not isinstance(value, datetime.datetime):
        return datetime.date(value.year, value.month, value.day)
    plain = datetime.datetime.combine(value.date(), value.time(), value.tzinfo)
    try:
        if plain.tzinfo is not None:
            plain.astimezone(datetime.UTC)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"a date that UTC does not have: {error}") from None
    return plain
