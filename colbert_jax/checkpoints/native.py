"""The layout of this library: `model.safetensors` and `colbert_jax.json`, nothing else.

Tensors have the names of the NNX state, and kernels are [in, out] as in Flax; the JSON holds the
architecture, every setting and the tokenizer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.checkpoints.common import Checkpoint, save_tensors, set_path
from colbert_jax.config import ColBERTConfig, IndexConfig, SearchConfig, TextConfig, written
from colbert_jax.files import present, read_object, write_json
from colbert_jax.models.backbones import config_from_huggingface, to_huggingface
from colbert_jax.models.colbert import DenseConfig, EncoderConfig, param_shapes
from colbert_jax.tensors.weights import SAFETENSORS, Tensors, open_tensors
from colbert_jax.text import ModelTokenizer

FILE = "colbert_jax.json"
VERSION = 1
_QUERY = "query_encoder."
_SPARSE = "sparse_linear."


def detect(folder: Path) -> bool:
    """Whether `colbert_jax.json` is there."""
    return present(folder / FILE)


def read(folder: Path, *, dim: int | None = None, **_: Any) -> Checkpoint:
    """Read a folder; arguments and errors as for `checkpoints.read_checkpoint`."""
    file = folder / FILE
    fields = read_object(file)
    if fields.get("version") != VERSION:
        raise ValueError(
            f"{file}: version {fields.get('version')!r} is not {VERSION}; convert the checkpoint "
            "again, or update colbert_jax"
        )
    try:
        encoder = EncoderConfig(
            config_from_huggingface(fields["backbone"]),
            tuple(DenseConfig(**layer) for layer in fields["head"]),
            fields.get("normalized", True),
        )
        config = ColBERTConfig(
            similarity=fields["similarity"],
            interaction=fields.get("interaction", "maxsim"),
            text=TextConfig(**fields["text"]),
            index=IndexConfig(**fields["index"]),
            search=SearchConfig(**fields["search"]),
            metadata=fields["metadata"],
        )
        tokenizer = ModelTokenizer.from_json(fields["tokenizer"], file)
    except KeyError as error:
        raise ValueError(f"{file}: field {error} is missing") from None
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"{file}: {error}") from None
    if dim is not None and dim != encoder.dim:
        raise ValueError(f"{folder}: dim was given as {dim}, but the head gives {encoder.dim}")
    if not present(folder / SAFETENSORS):
        raise FileNotFoundError(f"{folder}: {SAFETENSORS} is missing")
    tensors = open_tensors(folder / SAFETENSORS)
    names = {path: _name(path) for path in param_shapes(encoder)}
    separate = any(name.startswith(_QUERY) for name in tensors.names())
    poolers = [name for name in tensors.names() if name.startswith("pooler.")]
    sparse = [name for name in tensors.names() if name.startswith(_SPARSE)]
    known = {*names.values(), *poolers, *sparse}
    known |= {_QUERY + name for name in names.values()} if separate else set()
    extra = sorted(set(tensors.names()) - known)
    if extra:
        raise ValueError(f"{tensors.file}: tensors that {FILE} does not describe: {extra[:5]}")
    return Checkpoint(
        folder,
        encoder,
        config,
        tokenizer,
        _params(tensors, encoder, names, ""),
        query_params=_params(tensors, encoder, names, _QUERY) if separate else None,
        pooler={name: tensors.read(name) for name in poolers},
        sparse={name.removeprefix(_SPARSE): tensors.read(name) for name in sparse},
        weights=tensors.file,
    )


def _params(tensors: Tensors, encoder: EncoderConfig, names: dict, prefix: str) -> dict:
    for path, shape in param_shapes(encoder).items():
        tensors.check_shape(prefix + names[path], shape)
    arrays = tensors.read_many({prefix + name: False for name in names.values()})
    params: dict = {}
    for path, name in names.items():
        set_path(params, path, arrays[prefix + name])
    return params


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the two files."""
    config = checkpoint.config
    fields: dict[str, Any] = {
        "version": VERSION,
        "backbone": to_huggingface(checkpoint.encoder.backbone),
        "head": [dataclasses.asdict(layer) for layer in checkpoint.encoder.head],
        "similarity": config.similarity,
        "interaction": config.interaction,
        "normalized": checkpoint.encoder.normalized,
        "text": dataclasses.asdict(config.text),
        "index": written(config.index),
        "search": written(config.search),
        "metadata": dict(config.metadata),
        "tokenizer": checkpoint.tokenizer.to_json(),
    }
    tensors: dict[str, np.ndarray] = dict(checkpoint.pooler)
    tensors |= {_SPARSE + name: array for name, array in checkpoint.sparse.items()}
    for params, prefix in ((checkpoint.params, ""), (checkpoint.query_params, _QUERY)):
        if params is not None:
            tensors |= {prefix + _name(path): array for path, array in _flat(params)}
    save_tensors(folder / SAFETENSORS, tensors)
    write_json(folder / FILE, fields)


def kept(config: ColBERTConfig) -> ColBERTConfig:
    """Return the settings as they will be read: all of them."""
    return config


def _flat(tree: dict, path: tuple = ()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), np.ascontiguousarray(value, np.float32)
