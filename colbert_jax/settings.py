"""Settings dataclasses on the command line and in JSON files.

A field becomes a flag of its name. A field that is itself a dataclass gives its fields' flags:
those of `training` and `text` as they are, those of others with the field's name before them
(`--first-lr`). A flag's help is what the docstring of its class says of the field.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from colbert_jax.config import require_types
from colbert_jax.files import read_object

_FLAT = ("training", "text")
_PREFIX = "set:"


def add_arguments(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add a flag for every setting; the parsed result has only those that are given.

    The flags of a settings dataclass inside, and those of each part of its docstring ("Loss:"),
    are a group in the help.
    """
    groups: dict[str, Any] = {}
    texts: dict[type, dict[str, tuple[str, str]]] = {}
    for path, owner, hint, default in _fields(kind):
        if owner not in texts:
            texts[owner] = explained(owner)
        text, part = texts[owner].get(path[-1], ("", ""))
        known = "required" if default is _MISSING else f"default: {_shown(default)}"
        title = ": ".join(filter(None, (path[0] if len(path) > 1 else "settings", part.lower())))
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(
            _flag(path),
            dest=_PREFIX + ".".join(path),
            type=_parser(hint),
            default=argparse.SUPPRESS,
            metavar=_metavar(hint),
            help=f"{text.replace('%', '%%')} ({known})" if text else known,
        )


def explained(kind: type) -> dict[str, tuple[str, str]]:
    """What the docstrings of a dataclass and its bases say of each field, and under which heading.

    Entries are `name: text` or `name, name: text`, further lines are indented more; a heading is a
    line of its own, before its entries, which are indented.
    """
    found: dict[str, tuple[str, str]] = {}
    for one in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(one) or not one.__doc__:
            continue
        names = {f.name for f in dataclasses.fields(one)}
        heading, depth = "", 0
        entry: list[str] = []
        for line in inspect.cleandoc(one.__doc__).splitlines():
            indent = len(line) - len(line.lstrip())
            start = re.match(r"(\w+(?:, \w+)*): +(\S.*)", line.strip())
            if start is not None and set(start[1].split(", ")) <= names:
                entry, depth = start[1].split(", "), indent
                text = start[2]
            elif entry and line.strip() and indent > depth:
                text = f"{found[entry[0]][0]} {line.strip()}"
            else:
                title = re.fullmatch(r"(\w[\w ]*?)(?: \(.*\))?:", line)
                if line.strip() and not indent:
                    heading = title[1] if title else ""
                entry = []
                continue
            for name in entry:
                found[name] = (text, heading)
    return {name: (_plain(text), heading) for name, (text, heading) in found.items()}


def required_flags(kind: type) -> list[str]:
    """The flags that have no default, with what they take."""
    return [
        f"{_flag(path)} {_metavar(hint)}"
        for path, _, hint, default in _fields(kind)
        if default is _MISSING
    ]


def flag_names(kind: type) -> set[str]:
    """The names of all settings, those inside others too."""
    return {path[-1] for path, *_ in _fields(kind)}


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
        if isinstance(value, list) and typing.get_origin(inner) is tuple:  # as JSON has it
            value = tuple(value)
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


def _plain(text: str) -> str:
    """A docstring's text as help: without the marks of code, and None as it is typed."""
    return re.sub(r"\bIf None\b", "If none", text.replace("`", "")).rstrip(".")


def _fields(
    kind: type, outer: tuple = (), base: Any = None
) -> Iterator[tuple[tuple, type, Any, Any]]:
    """(path, its dataclass, type, default) of every setting that is not a dataclass."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = _default(field) if base is None else getattr(base, field.name)
        path = (*outer, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], path, None if default is _MISSING else default)
        else:
            yield path, kind, hints[field.name], default


def _flag(path: tuple[str, ...]) -> str:
    return "--" + "-".join(part for part in path if part not in _FLAT).replace("_", "-")


def _kinds(hint: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """The type without None, whether None is allowed, and words that are (of a `Literal`)."""
    if not isinstance(hint, types.UnionType) and typing.get_origin(hint) is not typing.Union:
        return hint, False, ()
    kinds = [k for k in typing.get_args(hint) if k is not type(None)]
    words = [w for k in kinds if typing.get_origin(k) is Literal for w in typing.get_args(k)]
    return kinds[0], len(kinds) < len(typing.get_args(hint)), tuple(words)


def _parser(hint: Any):
    kind, optional, words = _kinds(hint)

    def parse(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if text.lower() in words:
            return text.lower()
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
            return text.lower() == "true"
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(item(part) for part in text.split(",") if part)
        return kind(text)

    parse.__name__ = getattr(kind, "__name__", "list")  # argparse says "invalid int value"
    return parse


def _metavar(hint: Any) -> str:
    """The values that a flag takes: INT|none, true|false, TEXT,..."""
    kind, optional, words = _kinds(hint)
    name = {bool: "true|false", str: "TEXT"}.get(kind)
    if typing.get_origin(kind) is tuple:
        name = "TEXT,..."
    name = name or getattr(kind, "__name__", str(kind)).upper()
    return "|".join([name, *words, *(["none"] if optional else [])])


def _shown(default: Any) -> str:
    if default is None or default in ("", ()):
        return "none"
    return (str(default).lower() if isinstance(default, bool) else str(default)).replace("%", "%%")
