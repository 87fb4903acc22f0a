"""Values held to a JSON schema: the part of the language that the server's own schemas use.

The same schemas are published as OpenAPI, so what is published is what is checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_ARTICLES = {
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


class SchemaError(ValueError):
    """A value that is not of its schema: where in it, and what is wrong."""


def checked(value: Any, schema: Schema, where: str = "the body") -> Any:
    """The value, with the defaults of what an object leaves out.

    Args:
      where: what errors call it.

    Raises:
      SchemaError: it is not of the schema.
    """
    if "anyOf" in schema:
        return _any_of(value, schema["anyOf"], where)
    kind = schema.get("type")
    if kind is not None:
        is_bool = isinstance(value, bool)
        if not isinstance(value, _TYPES[kind]) or (is_bool and kind != "boolean"):
            raise SchemaError(f"{where} must be {_ARTICLES[kind]}, got {_shown(value)}")
    if "enum" in schema and value not in schema["enum"]:
        listed = ", ".join(map(json.dumps, schema["enum"]))
        raise SchemaError(f"{where} must be one of {listed}, got {_shown(value)}")
    if kind in ("integer", "number"):
        _check_number(value, schema, where)
    elif kind == "string":
        _check_length(len(value), schema, "Length", "characters", where)
    elif kind == "array":
        _check_length(len(value), schema, "Items", "items", where)
        inner = schema.get("items", {})
        return [checked(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    elif kind == "object":
        return _object(value, schema, where)
    return value


def from_query(text: str, schema: Schema, where: str) -> Any:
    """A parameter of an address as a value of its schema, which `checked` has yet to see.

    Raises:
      SchemaError: the text cannot be one.
    """
    kind = schema.get("type", "string")
    if kind == "string":
        return text
    if kind == "boolean":
        known = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in known:
            raise SchemaError(f"{where} must be true or false, got {_shown(text)}")
        return known[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SchemaError(f"{where} must be {_ARTICLES[kind]}, got {_shown(text)}") from None


def _any_of(value: Any, schemas: list[Schema], where: str) -> Any:
    """The first that fits; of one that has the value's type, the error says more.

    One with an "x-when" is meant where an object has that field.
    """
    named = None
    for schema in schemas:
        if isinstance(value, dict) and schema.get("x-when") in value:
            return checked(value, schema, where)
    for schema in schemas:
        try:
            return checked(value, schema, where)
        except SchemaError as error:
            if isinstance(value, _TYPES[schema["type"]]):
                named = error
    if named is not None:
        raise named
    listed = " or ".join(_ARTICLES[schema["type"]] for schema in schemas)
    raise SchemaError(f"{where} must be {listed}, got {_shown(value)}")


def _check_number(value: float, schema: Schema, where: str) -> None:
    if not math.isfinite(value):
        raise SchemaError(f"{where} must be finite, got {value}")
    if value < schema.get("minimum", -math.inf):
        raise SchemaError(f"{where} must be at least {schema['minimum']}, got {_shown(value)}")
    if value > schema.get("maximum", math.inf):
        raise SchemaError(f"{where} must be at most {schema['maximum']}, got {_shown(value)}")


def _check_length(length: int, schema: Schema, what: str, unit: str, where: str) -> None:
    least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}", math.inf)
    if length < least:
        raise SchemaError(f"{where} must have at least {least} {unit}, got {length}")
    if length > most:
        raise SchemaError(f"{where} may have at most {most} {unit}, got {length}")


def _object(value: Mapping[str, Any], schema: Schema, where: str) -> dict[str, Any]:
    known = schema.get("properties", {})
    more = schema.get("additionalProperties", True)
    path = "" if where == "the body" else f"{where}."
    for name in schema.get("required", ()):
        if name not in value:
            raise SchemaError(f"{path}{name} is missing")
    unknown = sorted(value.keys() - known.keys())
    if unknown and more is False:
        raise SchemaError(
            f"{where} has no field {_shown(unknown[0])}; it has {', '.join(sorted(known))}"
        )
    result = {name: one["default"] for name, one in known.items() if "default" in one}
    for name, item in value.items():
        result[name] = checked(item, known[name], f"{path}{name}") if name in known else item
    return result


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value))
    return text if len(text) <= 60 else text[:57] + "..."
