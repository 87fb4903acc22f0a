"""Settings that a checkpoint has and another library's layout has no place for.

They are carried in a file of their own, which no other library opens, so that a checkpoint that is
converted and converted back is the same: how its indexes are compressed and searched, and the
settings of the training that made it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from colbert_jax.checkpoints.common import Checkpoint
from colbert_jax.config import ColBERTConfig
from colbert_jax.files import check_types, present, read_object, write_json

FILE = "colbert_jax_settings.json"
_TYPES = {"index": dict, "search": dict, "similarity": str, "interaction": str, "metadata": dict}


def write(config: ColBERTConfig, kept: ColBERTConfig, folder: Path) -> None:
    """Write the settings that `folder` would lose; no file if there are none.

    Args:
      config: the checkpoint's settings.
      kept: the same as the layout will read them.
    """
    fields = {
        "index": _changed(config.index, kept.index),
        "search": _changed(config.search, kept.search),
        "similarity": config.similarity if config.similarity != kept.similarity else None,
        "interaction": config.interaction if config.interaction != kept.interaction else None,
        "metadata": {
            name: value
            for name, value in config.metadata.items()
            if name not in kept.metadata or kept.metadata[name] != value
        },
    }
    fields = {name: value for name, value in fields.items() if value}
    if fields:
        write_json(folder / FILE, fields)


def _changed(settings: Any, kept: Any) -> dict[str, Any]:
    values, others = vars(settings), vars(kept)
    return {name: value for name, value in values.items() if value != others[name]}


def restore(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Return the checkpoint with the settings that were carried beside it.

    Raises ValueError naming the file.
    """
    file = (path.parent if path.is_file() else path) / FILE
    if not present(file):
        return checkpoint
    fields, config = read_object(file), checkpoint.config
    unknown = sorted(fields.keys() - _TYPES.keys())
    if unknown:
        raise ValueError(f"{file}: unknown fields: {', '.join(unknown)[:80]}")
    check_types(file, fields, _TYPES)
    try:
        config = ColBERTConfig(
            similarity=fields.get("similarity") or config.similarity,
            interaction=fields.get("interaction") or config.interaction,
            text=config.text,
            index=dataclasses.replace(config.index, **fields.get("index") or {}),
            search=dataclasses.replace(config.search, **fields.get("search") or {}),
            metadata={**config.metadata, **(fields.get("metadata") or {})},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    return dataclasses.replace(checkpoint, config=config)
