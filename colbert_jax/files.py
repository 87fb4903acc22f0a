"""Small files: read with errors that name them, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """Parse a JSON file; the error names the file and the place."""
    try:
        return json.loads(file.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError or ValueError naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent}: {file.name} is missing")
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return fields


def check_types(file: Path, fields: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Hold fields of a JSON object to their types, where they are there and not null.

    Args:
      kinds: field -> type, or [type] for a list of it.

    Raises:
      ValueError: naming the file and the field.
    """
    for name, kind in kinds.items():
        value = fields.get(name)
        one = kind[0] if isinstance(kind, list) else kind
        items = value if isinstance(kind, list) and isinstance(value, list) else [value]
        whole = isinstance(value, list) == isinstance(kind, list)
        right = all(
            isinstance(item, one) and (one is bool or not isinstance(item, bool)) for item in items
        )
        if value is not None and not (whole and right):
            one = one[-1] if isinstance(one, tuple) else one
            wanted = f"a list of {one.__name__}" if isinstance(kind, list) else one.__name__
            raise ValueError(f"{file}: {name} must be {wanted}, got {value!r:.80}")


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def short_json(value: Any, most: int) -> str:
    """JSON of at most so many characters, for errors."""
    text = json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."
