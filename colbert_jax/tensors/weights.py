"""The tensors of a checkpoint folder, in safetensors or torch files, read one at a time.

Files are not mapped: mapped pages would count as memory in addition to the parameters.
"""

from __future__ import annotations

import json
import math
import re
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from colbert_jax.files import present, read_json
from colbert_jax.tensors.stored import Stored
from colbert_jax.tensors.torch_file import read_torch_file

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
_INDEX = ".index.json"
WEIGHT_FILES = (SAFETENSORS, SAFETENSORS + _INDEX, TORCH, TORCH + _INDEX)

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.dnn")
# Weights of the same model in other forms, and the states of a training run.
_KNOWN = (
    *WEIGHT_FILES,
    *("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"),
    *("model.*.safetensors", "pytorch_model.*.bin", "openvino_*.bin"),
    *("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*"),
)

_HEAD_WORDS = {"colbert", "projection", "proj", "projector", "linear", "dense", "head"}
# Of sparse vectors, masked words, classes; and what this library reads when it is named itself.
_OTHER_HEADS = {"sparse", "lm", "mlm", "cls", "classifier", "classification", "pooler", "dnn"}

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the format


class Tensors:
    """The tensors of a checkpoint by name.

    TensorFlow's old names of layer-norm parameters (gamma, beta) are replaced by today's.
    """

    def __init__(self, file: Path, stored: Mapping[str, Stored]):
        """
        Args:
          file: the file that errors name.
          stored: name -> tensor.
        """
        self.file = file
        self._stored = {_modern(name): tensor for name, tensor in stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises ValueError if it is missing."""
        if name not in self._stored:
            raise ValueError(f"{self.file}: tensor {name!r} is missing")
        return self._stored[name].shape

    def renamed(self, rename: Callable[[str], str | None]) -> Tensors:
        """Return the tensors with other names, leaving out those that `rename` maps to None."""
        stored = {rename(name): tensor for name, tensor in self._stored.items()}
        return Tensors(self.file, {name: t for name, t in stored.items() if name is not None})

    def split(self, parts: Callable[[str], Sequence[str]]) -> Tensors:
        """Return the tensors with each cut, along its first dimension, into equal parts.

        Args:
          parts: name -> the names of its parts, in order; one name: it stays whole.

        Raises:
          ValueError: a first dimension that cannot be cut so.
        """
        stored: dict[str, Stored] = {}
        for name, tensor in self._stored.items():
            names = parts(name)
            if len(names) == 1:
                stored[names[0]] = tensor
                continue
            rows, rest = divmod((*tensor.shape, 0)[0], len(names))
            if rest or not rows:
                raise ValueError(
                    f"{self.file}: tensor {name!r} has shape {list(tensor.shape)}, which is not "
                    f"that of {len(names)} tensors one above the other"
                )
            for i, part in enumerate(names):
                stored[part] = tensor.rows(i * rows, (i + 1) * rows)
        return Tensors(self.file, stored)

    def read(self, name: str) -> np.ndarray:
        """Read a tensor as float32. Raises ValueError if it is missing or not finite."""
        self.shape(name)  # raises if it is missing
        return self._checked(name, self._stored[name].read())

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError if a tensor is missing or has another shape."""
        if self.shape(name) != shape:
            raise ValueError(
                f"{self.file}: tensor {name!r} has shape {list(self.shape(name))}, the "
                f"configuration asks for {list(shape)}"
            )

    def _checked(self, name: str, array: np.ndarray) -> np.ndarray:
        if not np.issubdtype(array.dtype, np.floating) and array.dtype != ml_dtypes.bfloat16:
            raise ValueError(f"{self.file}: tensor {name!r} is {array.dtype}, not floating point")
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise ValueError(f"{self.file}: tensor {name!r} holds NaN or infinite values")
        return array

    def read_many(self, transposed: Mapping[str, bool]) -> dict[str, np.ndarray]:
        """Read several tensors as float32, into memory that JAX on a CPU uses without a copy.

        Copying takes most of the time, so there are two threads. Fresh memory is expensive, so each
        thread reads all tensors that are to be transposed into the same scratch memory.

        Args:
          transposed: names, and whether to transpose each.

        Raises:
          ValueError: a tensor is missing or not finite.
        """
        scratch = threading.local()

        def one(item: tuple[str, bool]) -> tuple[str, np.ndarray]:
            name, transpose = item
            shape, stored = self.shape(name), self._stored[name]
            size = math.prod(shape)
            buffer = None
            if stored.dtype == np.float32 and stored.strides is None:
                if not transpose:
                    return name, self._checked(name, stored.read(_aligned(shape).reshape(-1)))
                buffer = getattr(scratch, "buffer", None)
                if buffer is None or buffer.size < size:
                    buffer = scratch.buffer = np.empty(size, np.float32)
            array = self._checked(name, stored.read(buffer))
            array = array.T if transpose else array
            out = _aligned(array.shape)
            out[...] = array
            return name, out

        with ThreadPoolExecutor(2) as pool:
            return dict(pool.map(one, transposed.items()))


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Empty float32 memory at an address that JAX on a CPU uses without a copy."""
    size = math.prod(shape) * 4
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.float32).reshape(shape)


def other_weights(names: Iterable[str]) -> list[str]:
    """Choose the files that may hold more of a model than its own weight file does.

    Args:
      names: the files of one folder.

    Returns:
      those that are named like weights, but not like the model's weights in any form.
    """
    return sorted(
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in _WEIGHTS)
        and not any(fnmatch(name, pattern) for pattern in _KNOWN)
    )


def is_head(name: str) -> bool:
    """Whether a file of a checkpoint's folder holds, by its name, a projection of token embeddings.

    It is one of `other_weights`, a word of its name says so, and none names another kind of head.
    """
    words = set(re.split(r"[\W\d_]+", name.lower()))
    right = bool(words & _HEAD_WORDS) and not words & _OTHER_HEADS
    return right and "/" not in name and bool(other_weights([name]))


def find_tensors(folder: Path) -> Tensors:
    """Open the weights of a folder: safetensors before torch files, single before sharded files.

    Raises:
      FileNotFoundError: there is no weight file, or a shard is missing.
      ValueError: a damaged file, or an index that points outside the folder.
    """
    for name in WEIGHT_FILES:
        file = folder / name
        if present(file):
            return open_tensors(file)
    raise FileNotFoundError(
        f"{folder}: missing weight file: expected one of {', '.join(WEIGHT_FILES)}"
    )


def open_tensors(file: Path) -> Tensors:
    """Open the tensors of a file: safetensors, torch, or an index of shards; see `find_tensors`."""
    if file.name.endswith(_INDEX):
        return Tensors(file, _sharded(file))
    return Tensors(file, _stored(file))


def _stored(file: Path) -> Mapping[str, Stored]:
    if file.suffix == ".safetensors":
        return safetensors_header(file)
    return state_dict(file, read_torch_file(file))


def state_dict(file: Path, value: Any) -> Mapping[str, Stored]:
    """Find the tensors in a torch file's value, or in its `state_dict` or `model_state_dict`.

    Args:
      file: for error messages.
      value: as `read_torch_file` returns it.

    Raises:
      ValueError: there are none.
    """
    if isinstance(value, dict):
        for key in ("state_dict", "model_state_dict"):
            if isinstance(value.get(key), dict):
                value = value[key]
        found = {str(k): v for k, v in value.items() if isinstance(v, Stored)}
        if found:
            return found
    raise ValueError(f"{file}: holds no named tensors")


def _sharded(file: Path) -> dict[str, Stored]:
    fields = read_json(file)
    places = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{file}: expected an object with a 'weight_map'")
    stored: dict[str, Stored] = {}
    shards: dict[str, Mapping[str, Stored]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(
                f"{file}: tensor {name!r} is in {shard!r}; a shard must be a file of this folder"
            )
        if shard not in shards:
            if not present(file.parent / shard):
                raise FileNotFoundError(f"{file}: shard {shard} is missing in {file.parent}")
            shards[shard] = _stored(file.parent / shard)
        if name not in shards[shard]:
            raise ValueError(f"{file}: tensor {name!r} is not in its shard {shard}")
        stored[name] = shards[shard][name]
    return stored


def safetensors_header(file: Path) -> dict[str, Stored]:
    """Read the tensors of a safetensors file from its header. Raises ValueError if damaged."""

    def damaged(reason: str) -> ValueError:
        return ValueError(f"{file}: damaged or truncated weight file: {reason}")

    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise damaged("shorter than its header")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _LONGEST_HEADER):
            raise damaged(f"its header claims {length} bytes, the file has {size}")
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise damaged(f"header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise damaged("header is not an object")
    stored = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            sizes = [begin, end, *shape]
        except (TypeError, KeyError, ValueError):
            raise damaged(f"tensor {name!r} lacks dtype, shape or data_offsets") from None
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes):
            raise damaged(f"tensor {name!r} has sizes that are not whole numbers")
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise ValueError(f"{file}: tensor {name!r} is {kind}; supported: {', '.join(_DTYPES)}")
        dtype = _DTYPES[kind]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise damaged(f"tensor {name!r} of shape {list(shape)} has {end - begin} bytes")
        if 8 + length + end > size:
            raise damaged(f"tensor {name!r} ends at byte {8 + length + end}, the file at {size}")
        stored[name] = Stored(file, 8 + length + begin, dtype, shape, None)
    return stored


def _modern(name: str) -> str:
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
