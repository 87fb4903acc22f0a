"""What every layout needs: a checkpoint in memory, parameters from tensors and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from colbert_jax.checkpoints.names import IGNORED, PREFIXES, tensor_names
from colbert_jax.checkpoints.tokenizer import write_tokenizer
from colbert_jax.config import ColBERTConfig, TextConfig
from colbert_jax.files import read_object, write_json
from colbert_jax.models.colbert import EncoderConfig, param_shapes
from colbert_jax.models.config import BackboneConfig, config_from_huggingface, to_huggingface
from colbert_jax.tensors.weights import Tensors
from colbert_jax.text import ModelTokenizer, TextTokenizer

# What the forward of a transformers model takes, where token types are among it.
_INPUTS = {
    "bert": ("input_ids", "token_type_ids", "attention_mask"),
    "electra": ("input_ids", "token_type_ids", "attention_mask"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: architecture, settings, tokenizer and parameters.

    folder: where it was read from.
    params: nested dict of float32 arrays, the state of `models.colbert.TokenEncoder`.
    query_params: the same for an encoder of the queries' own; None: one encoder for both.
    pooler: BERT's pooler by tensor name, which token embeddings do not use and which some
      originals want to find.
    """

    folder: Path
    encoder: EncoderConfig
    config: ColBERTConfig
    tokenizer: ModelTokenizer
    params: dict
    query_params: dict | None = None
    pooler: Mapping[str, np.ndarray] = field(default_factory=dict)

    def with_text(self, **changes: Any) -> Checkpoint:
        """The same with other text settings."""
        if "mask_punctuation" in changes and "skiplist_words" not in changes:
            changes["skiplist_words"] = None  # which would overrule it
        return self.with_text_config(dataclasses.replace(self.config.text, **changes))

    def with_text_config(self, text: TextConfig) -> Checkpoint:
        return dataclasses.replace(self, config=dataclasses.replace(self.config, text=text))

    def text_tokenizer(self) -> TextTokenizer:
        """Texts to token ids. Raises ValueError where the tokenizer does not fit the encoder."""
        try:
            tokenizer = TextTokenizer(self.tokenizer, self.config.text)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        vocabulary = self.encoder.backbone.vocab_size
        if tokenizer.vocab_size > vocabulary:
            raise ValueError(
                f"{self.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the encoder only "
                f"{vocabulary}"
            )
        return tokenizer


def fingerprint(known: list[Any], params: dict) -> str:
    """A short hash of settings (JSON) and weights.

    It covers the first values of every tensor, so it tells checkpoints apart without reading all of
    them.
    """
    digest = hashlib.sha256(json.dumps(known).encode())
    for path, array in jax.tree.leaves_with_path(params):
        digest.update(f"{path}{array.shape}".encode())
        digest.update(np.asarray(array.reshape(-1)[:1024]).tobytes())
    return digest.hexdigest()[:16]


def read_backbone(file: Path) -> BackboneConfig:
    """The architecture of a `config.json`."""
    try:
        return config_from_huggingface(read_object(file))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(file) in message else f"{file}: {message}") from None


def find_prefix(tensors: Tensors, backbone: BackboneConfig) -> str:
    """What stands before the names of the backbone's tensors: its usual prefix, or nothing."""
    first = next(iter(tensor_names(backbone).values()))
    for prefix in (PREFIXES[backbone.model_type], ""):
        if prefix + first in tensors:
            return prefix
    raise ValueError(
        f"{tensors.file}: no {backbone.model_type} encoder in it: tensor {first!r} is missing"
    )


def backbone_paths(backbone: BackboneConfig, prefix: str) -> dict[tuple, str]:
    """Path in the state of a TokenEncoder -> tensor name, of the backbone."""
    return {("backbone", *path): name for path, name in tensor_names(backbone, prefix).items()}


def head_paths(encoder: EncoderConfig, layer: int) -> dict[tuple, str]:
    """Path -> tensor name, of one dense layer of the head."""
    config, path = encoder.head[layer], ("head", layer)
    names: dict[tuple, str] = {(*path, "linear", "kernel"): "linear.weight"}
    if config.bias:
        names[*path, "linear", "bias"] = "linear.bias"
    if config.residual and config.in_features != config.out_features:
        names[*path, "residual", "kernel"] = "residual.weight"
    return names


def fill_params(
    encoder: EncoderConfig, sources: Iterable[tuple[Tensors, Mapping[tuple, str]]]
) -> dict:
    """Parameters of a TokenEncoder from tensors in torch's layout.

    Args:
      sources: tensors, and which path each of them fills. A path that none fills is left out.
    """
    params: dict = {}
    shapes = param_shapes(encoder)
    for tensors, names in sources:
        # torch keeps kernels as [out, in], Flax as [in, out]
        transposed = {name: path[-1] == "kernel" for path, name in names.items()}
        for path, name in names.items():
            tensors.check_shape(name, shapes[path][:: -1 if transposed[name] else 1])
        arrays = tensors.read_many(transposed)
        for path, name in names.items():
            set_path(params, path, arrays[name])
    return params


def set_path(tree: dict, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def get_path(tree: dict, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def refuse_unknown(
    tensors: Tensors, backbone: BackboneConfig, known: Iterable[str], also: Sequence[str] = ()
) -> None:
    """An extra tensor means another architecture, whose numbers would be wrong in silence."""
    ignorable = (*IGNORED[backbone.model_type], *also)
    extra = sorted(set(tensors.names()) - set(known))
    extra = [name for name in extra if not any(part in f".{name}" for part in ignorable)]
    if extra:
        shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise ValueError(
            f"{tensors.file}: tensors that a {backbone.model_type} encoder with this head does "
            f"not have: {shown}"
        )


def read_pooler(tensors: Tensors, prefix: str) -> dict[str, np.ndarray]:
    names = [f"pooler.dense.{part}" for part in ("weight", "bias")]
    return {name: tensors.read(prefix + name) for name in names if prefix + name in tensors}


# --- Writing --------------------------------------------------------------------------------


def tensors_of(params: dict, names: Mapping[tuple, str]) -> dict[str, np.ndarray]:
    """Tensors in torch's layout from parameters."""
    tensors = {}
    for path, name in names.items():
        array = np.asarray(get_path(params, path), np.float32)
        tensors[name] = np.ascontiguousarray(array.T if path[-1] == "kernel" else array)
    return tensors


def backbone_tensors(
    checkpoint: Checkpoint, params: dict, prefix: str, *, pooler: bool
) -> dict[str, np.ndarray]:
    """The backbone's tensors behind `prefix`; with `pooler`, zeros where the checkpoint has none.

    Originals that build a pooler would else fill it at random and warn.
    """
    backbone = checkpoint.encoder.backbone
    tensors = tensors_of(params, backbone_paths(backbone, prefix))
    if pooler and backbone.model_type in ("bert", "roberta", "xlm-roberta", "mpnet"):
        width = backbone.hidden_size
        zeros = {
            "pooler.dense.weight": np.zeros((width, width), np.float32),
            "pooler.dense.bias": np.zeros(width, np.float32),
        }
        tensors |= {prefix + name: value for name, value in (zeros | {**checkpoint.pooler}).items()}
    return tensors


def fold_head(encoder: EncoderConfig, params: dict, layout: str) -> np.ndarray:
    """The head as one matrix [dim, hidden] for layouts that have a single projection.

    Raises ValueError where it is not linear: a bias or an activation.
    """
    matrix = np.eye(encoder.backbone.hidden_size, dtype=np.float64)
    for i, layer in enumerate(encoder.head):
        if layer.bias or layer.activation != "Identity":
            what = "a bias" if layer.bias else f"activation {layer.activation}"
            raise ValueError(
                f"the {layout} layout has one projection without bias; dense layer {i + 1} of the "
                f"head has {what}; write the pylate, sentence-transformers or flax layout"
            )
        step = np.asarray(params["head"][i]["linear"]["kernel"], np.float64)
        if layer.residual:
            same = layer.in_features == layer.out_features
            step = step + (np.eye(len(step)) if same else params["head"][i]["residual"]["kernel"])
        matrix = matrix @ step
    return np.ascontiguousarray(matrix.T, np.float32)


def one_encoder(checkpoint: Checkpoint, layout: str) -> None:
    if checkpoint.query_params is not None:
        raise ValueError(
            f"the {layout} layout has one encoder, this checkpoint has one of its own for "
            "queries; write the flmr or flax layout"
        )


def refuse_text(text: TextConfig, supported: Iterable[str], layout: str) -> None:
    """Raises ValueError for text settings, other than defaults, that a layout cannot say."""
    default = TextConfig()
    cannot = [
        f"{f.name}={getattr(text, f.name)!r}"
        for f in dataclasses.fields(text)
        if f.name not in supported and getattr(text, f.name) != getattr(default, f.name)
    ]
    if cannot:
        raise ValueError(f"the {layout} layout cannot say {', '.join(cannot)}")


def fixed_expansion(text: TextConfig, layout: str) -> None:
    """Raises ValueError where queries are filled up to less than their maximum length."""
    if text.query_minlen not in (None, text.query_maxlen):
        raise ValueError(f"the {layout} layout cannot say query_minlen={text.query_minlen}")


def masks_punctuation(checkpoint: Checkpoint, layout: str) -> bool:
    """Whether documents drop Stanford's punctuation, or nothing; else raises ValueError."""
    text = checkpoint.config.text
    dropped = set(skipped_tokens(checkpoint))
    for mask in (True, False):
        other = checkpoint.with_text(skiplist_words=None, mask_punctuation=mask)
        if dropped == set(skipped_tokens(other)):
            return mask
    raise ValueError(
        f"the {layout} layout drops ASCII punctuation or nothing; this checkpoint's skiplist has "
        f"{len(dropped)} tokens of its own (skiplist_words={text.skiplist_words!r})"
    )


def skipped_tokens(checkpoint: Checkpoint) -> list[str]:
    """The tokens that documents drop, padding apart, by id; punctuation in its usual order."""
    tokenizer = TextTokenizer(checkpoint.tokenizer, checkpoint.config.text)
    to_token = checkpoint.tokenizer.tokenizer.id_to_token
    ids = set(np.flatnonzero(tokenizer.skiplist).tolist())
    if checkpoint.config.text.skiplist_words is None:
        ids.discard(tokenizer.special.pad)
    tokens = [str(to_token(i)) for i in sorted(ids)]
    usual = [char for char in string.punctuation if char in tokens]
    return usual + [token for token in tokens if token not in usual]


def save_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file as transformers does (it asks for the format in the header)."""
    save_file(tensors, file, metadata={"format": "pt"})


def write_base(checkpoint: Checkpoint, folder: Path, architectures: list[str]) -> None:
    """`config.json` and the tokenizer's files."""
    backbone = checkpoint.encoder.backbone
    fields = to_huggingface(backbone) | {"architectures": architectures, "torch_dtype": "float32"}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", fields)
    inputs = _INPUTS.get(backbone.model_type, ("input_ids", "attention_mask"))
    write_tokenizer(folder, checkpoint.tokenizer, max_length=backbone.max_length, inputs=inputs)
