"""Warnings of what a checkpoint does not say, or says and is not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from colbert_jax.runtime import warn


def expect_any(file: Path, fields: Mapping[str, Any], known: Iterable[str], instead: str) -> None:
    """Warn if a settings file is absent, or holds nothing that belongs into it.

    Args:
      fields: what it holds; {} if it is absent.
      known: names, of which there should be one.
      instead: what is read instead.
    """
    if not fields.keys() & set(known):
        what = "holds no setting of its kind" if file.exists() else "is missing"
        warn(f"{file}: {what}: {instead}")
