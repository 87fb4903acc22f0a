"""Settings dataclasses on the command line and in JSON files.

A field becomes a flag of its name. A field that is itself a dataclass gives its fields' flags:
those of `training` and `text` as they are, those of others with the field's name before them
(`--first-lr`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from colbert_jax.config import require_types
from colbert_jax.files import read_object

_FLAT = ("training", "text")
_PREFIX = "set:"


def add_arguments(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add a flag for every setting; the parsed result has only those that are given."""
    for path, hint, default in _fields(kind):
        known = "required" if default is dataclasses.MISSING else f"default: {_shown(default)}"
        parser.add_argument(
            _flag(path),
            dest=_PREFIX + ".".join(path),
            type=_parser(hint),
            default=argparse.SUPPRESS,
            metavar=_metavar(hint),
            help=known,
        )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line has, nested as the dataclass is."""
    nested: dict[str, Any] = {}
    for name, value in vars(args).items():
        if not name.startswith(_PREFIX):
            continue
        *outer, last = name.removeprefix(_PREFIX).split(".")
        place = nested
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def merge(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings; later ones win, field by field."""
    out: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            both = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
            out[name] = merge(out[name], value) if both else value
    return out


def make(kind: type, values: Mapping[str, Any], where: str = "the settings") -> Any:
    """Make a settings dataclass from nested values.

    Raises:
      ValueError: an unknown or missing setting, or a wrong value, by name; `where` says whose.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        shown = ", ".join(name[:80] for name in unknown[:5])
        raise ValueError(f"{where}: unknown setting {shown}; there are {', '.join(fields)}")
    missing = [n for n, f in fields.items() if n not in values and _default(f) is _MISSING]
    if missing:
        raise ValueError(f"{where}: these settings have no default: {', '.join(missing)}")
    arguments = {}
    for name, value in values.items():
        inner: Any = hints[name]
        nested = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        if nested and not isinstance(value, Mapping | inner):
            raise ValueError(f"{where}: {name} must be an object of settings, got {value!r:.60}")
        if nested and isinstance(value, Mapping):
            default = _default(fields[name])
            base = {} if default is _MISSING else dataclasses.asdict(default)
            value = make(inner, {**base, **value}, f"{where}, {name}")
        arguments[name] = value
    try:
        made = kind(**arguments)
        require_types(made)
        return made
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def read_settings(file: str | Path) -> dict[str, Any]:
    """Read settings from a JSON file."""
    return read_object(Path(file))


def to_json(settings: Any) -> str:
    """All settings, as the text of a file that `read_settings` takes."""
    return json.dumps(dataclasses.asdict(settings), indent=2, ensure_ascii=False) + "\n"


_MISSING = dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    if field.default is not _MISSING:
        return field.default
    return _MISSING if field.default_factory is _MISSING else field.default_factory()


def _fields(kind: type, outer: tuple = (), base: Any = None) -> Iterator[tuple[tuple, Any, Any]]:
    """(path, type, default) of every setting that is not a dataclass."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = _default(field) if base is None else getattr(base, field.name)
        path = (*outer, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], path, None if default is _MISSING else default)
        else:
            yield path, hints[field.name], default


def _flag(path: tuple[str, ...]) -> str:
    return "--" + "-".join(part for part in path if part not in _FLAT).replace("_", "-")


def _kinds(hint: Any) -> tuple[Any, bool]:
    """The type without None, and whether None is allowed."""
    if isinstance(hint, types.UnionType):
        kinds = [k for k in typing.get_args(hint) if k is not type(None)]
        return kinds[0], len(kinds) < len(typing.get_args(hint))
    return hint, False


def _parser(hint: Any):
    kind, optional = _kinds(hint)

    def parse(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
            return text.lower() == "true"
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(item(part) for part in text.split(",") if part)
        return kind(text)

    parse.__name__ = _metavar(hint).lower()  # argparse says "invalid int value"
    return parse


def _metavar(hint: Any) -> str:
    kind, _ = _kinds(hint)
    return "true|false" if kind is bool else getattr(kind, "__name__", str(kind)).upper()


def _shown(default: Any) -> str:
    return str(default).replace("%", "%%") if default not in ("", ()) else "none"
