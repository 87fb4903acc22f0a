"""What every layout needs: safetensors files, JSON files, and parameters filled in strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from colbert_jax.config import BertConfig, ColBERTConfig
from colbert_jax.files import read_json
from colbert_jax.models.bert import activation
from colbert_jax.models.colbert import TokenEncoder

_OTHER_WEIGHTS = (
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: the architecture, the settings and the parameters.

    params: nested dict of float32 arrays, the state of `models.colbert.TokenEncoder`.
    """

    folder: Path
    backbone: BertConfig
    config: ColBERTConfig
    params: dict


def read_backbone_config(folder: Path) -> BertConfig:
    file = folder / "config.json"
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object")
    try:
        backbone = BertConfig.from_huggingface(config)
        activation(backbone.hidden_act)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return backbone


class Tensors:
    """The tensors of a folder's `model.safetensors`, read one at a time from the mapped file.

    Old TensorFlow names of layer-norm parameters (gamma, beta) appear under today's names.
    """

    def __init__(self, folder: Path):
        self.file = folder / "model.safetensors"
        if not self.file.is_file():
            others = [name for name in _OTHER_WEIGHTS if (folder / name).is_file()]
            found = f"; found {others[0]}, which is not read yet" if others else ""
            raise FileNotFoundError(f"{self.file}: missing weight file{found}")
        try:
            self._open = safe_open(self.file, framework="numpy")
            names = list(self._open.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.file}: damaged or truncated weight file: {error}") from None
        self._names = {_modern(name): name for name in names}

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open.get_slice(self._names[name]).get_shape())

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor as float32. Raises ValueError where it is missing or of another shape."""
        if name not in self._names:
            raise ValueError(f"{self.file}: tensor {name!r} is missing")
        if self.shape(name) != shape:
            raise ValueError(
                f"{self.file}: tensor {name!r} has shape {list(self.shape(name))}, "
                f"config.json asks for {list(shape)}"
            )
        array = self._open.get_tensor(self._names[name]).astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{self.file}: tensor {name!r} holds NaN or infinite values")
        return array


def _modern(name: str) -> str:
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def fill_params(
    backbone: BertConfig, dim: int | None, tensors: Tensors, names: Mapping[tuple, str]
) -> dict:
    """Parameters of a TokenEncoder from tensors in torch's layout.

    Args:
      names: path in the NNX state -> tensor name. A path that is not named must be a projection
        that the caller fills in.
    """
    model = nnx.eval_shape(lambda: TokenEncoder(backbone, dim, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(model))
    params: dict = {}
    for path, variable in state:
        if path not in names:
            continue
        shape = variable.shape
        if path[-1] == "kernel":  # torch keeps [out, in], Flax [in, out]
            array = tensors.read(names[path], shape[::-1]).T
        else:
            array = tensors.read(names[path], shape)
        set_path(params, path, jax.numpy.asarray(array))
    return params


def set_path(tree: dict, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def refuse_unknown(tensors: Tensors, known: Iterable[str], ignorable: tuple[str, ...]) -> None:
    """An extra tensor means another architecture, whose numbers would be wrong in silence."""
    extra = sorted(set(tensors.names()) - set(known))
    extra = [name for name in extra if not any(part in f".{name}" for part in ignorable)]
    if extra:
        shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise ValueError(f"{tensors.file}: tensors that a BERT encoder does not have: {shown}")
