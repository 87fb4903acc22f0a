"""Small files: read with errors that name them, written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """Parse a JSON file; the error names the file and the place."""
    try:
        return json.loads(file.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
