"""What all layouts share: a checkpoint in memory, parameters from tensors and back."""

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

from colbert_jax.checkpoints.tokenizer import write_tokenizer
from colbert_jax.config import ColBERTConfig, TextConfig
from colbert_jax.files import read_object, write_json
from colbert_jax.images import ImageConfig
from colbert_jax.models.backbones import (
    architecture,
    config_from_huggingface,
    is_unused,
    tensor_names,
    to_huggingface,
    transformers_names,
)
from colbert_jax.models.colbert import EncoderConfig, param_shapes
from colbert_jax.models.config import BackboneConfig
from colbert_jax.models.flmr import ImageEncoderConfig
from colbert_jax.runtime import apart, warn
from colbert_jax.tensors.weights import Tensors, find_tensors
from colbert_jax.text import ModelTokenizer, TextTokenizer


@dataclass(frozen=True)
class ImageSide:
    """FLMR's image encoder: architecture and parameters.

    params: nested dict of float32 arrays, the state of `models.flmr.ImageEncoder`.
    context_params: the same, without a mapping network, for a second one that encodes documents. If
      None, one encoder serves both.
    pixels: how an image becomes pixel values. If None, as CLIP does it for that size.
    in_queries, text_in_queries: whether a query with an image has token embeddings of the image,
      and of its text.
    """

    config: ImageEncoderConfig
    params: dict
    context_params: dict | None = None
    pixels: ImageConfig | None = None
    in_queries: bool = True
    text_in_queries: bool = True

    @property
    def context_config(self) -> ImageEncoderConfig:
        """Of the encoder of documents' images: one of their own has no mapping network."""
        own = self.context_params is not None
        return dataclasses.replace(self.config, mapping=None) if own else self.config

    @property
    def image_config(self) -> ImageConfig:
        """How an image becomes pixel values."""
        return self.pixels or ImageConfig.square(self.config.vision.image_size)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: architecture, settings, tokenizer and parameters.

    folder: where it was read from.
    params: nested dict of float32 arrays, the state of `models.colbert.TokenEncoder`.
    query_params: the same for a second encoder that encodes queries. If None, one encoder serves
      queries and documents.
    pooler: BERT's pooler by tensor name. Token embeddings do not use it; some original libraries
      expect it in a checkpoint.
    sparse: `weight` float32[1, hidden_size] and `bias` float32[1] of bge-m3's lexical weights; {}
      where there are none.
    weights: the file that the parameters were read from, for errors.
    images: FLMR's image encoder. If None, the model is of texts only.
    """

    folder: Path
    encoder: EncoderConfig
    config: ColBERTConfig
    tokenizer: ModelTokenizer
    params: dict
    query_params: dict | None = None
    pooler: Mapping[str, np.ndarray] = field(default_factory=dict)
    sparse: Mapping[str, np.ndarray] = field(default_factory=dict)
    weights: Path | None = None
    images: ImageSide | None = None

    def with_text(self, **changes: Any) -> Checkpoint:
        """Return the checkpoint with some text settings changed."""
        if "mask_punctuation" in changes and "skiplist_words" not in changes:
            changes["skiplist_words"] = None  # it would overrule mask_punctuation
        return self.with_text_config(dataclasses.replace(self.config.text, **changes))

    def with_text_config(self, text: TextConfig) -> Checkpoint:
        """Return the checkpoint with other text settings."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, text=text))

    def truncated(self, dim: int) -> Checkpoint:
        """Return the checkpoint with the first `dim` features of its token embeddings, which are
        normalised after that (Matryoshka, Kusupati et al., 2022).

        Raises ValueError for a width that the model does not have, or without a head to shorten.
        """
        head, full = self.encoder.head, self.encoder.dim
        if not 1 <= dim <= full:
            raise ValueError(f"truncate_dim must be between 1 and the model's {full}, got {dim}")
        if dim == full:
            return self
        last = len(head) - 1
        if (
            not head
            or self.images is not None
            or (head[-1].residual and head[-1].in_features == full)
        ):
            raise ValueError(
                f"truncate_dim {dim}: this model has no last dense layer that can be shortened"
            )

        def cut(params: dict) -> dict:
            layer = {
                part: {name: np.ascontiguousarray(a[..., :dim]) for name, a in leaves.items()}
                for part, leaves in params["head"][last].items()
            }
            return params | {"head": params["head"] | {last: layer}}

        shorter = dataclasses.replace(head[-1], out_features=dim)
        return dataclasses.replace(
            self,
            encoder=dataclasses.replace(self.encoder, head=(*head[:-1], shorter)),
            params=cut(self.params),
            query_params=None if self.query_params is None else cut(self.query_params),
        )

    def text_tokenizer(self) -> TextTokenizer:
        """Make the tokenizer of texts. Raises ValueError if it does not fit the encoder."""
        file = self.tokenizer.file or self.folder
        vocabulary = self.encoder.backbone.vocab_size
        try:
            largest, token = self.tokenizer.largest_id
            if largest >= vocabulary:
                raise ValueError(
                    f"its token {token!r:.80} has the id {largest}, but the word embeddings in "
                    f"{self.weights or self.folder} are of the ids 0 to {vocabulary - 1}: they are "
                    "not of one model"
                )
            tokenizer = TextTokenizer(self.tokenizer, self.config.text)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if file.name == "vocab.txt" and largest + 1 < vocabulary:
            warn(
                f"{file}: has {largest + 1} tokens, {self.weights or self.folder} embeddings of "
                f"{vocabulary}: if the file was cut off, fetch it again"
            )
        return tokenizer


@apart()
def fingerprint(known: list[Any], params: dict) -> str:
    """Hash settings (JSON values) and weights, to tell checkpoints apart.

    Only the first values of every tensor are hashed, so that not all of them are read.
    """
    digest = hashlib.sha256(json.dumps(known).encode())
    for path, array in jax.tree.leaves_with_path(params):
        digest.update(f"{path}{array.shape}".encode())
        digest.update(np.asarray(array.reshape(-1)[:1024]).tobytes())
    return digest.hexdigest()[:16]


def read_backbone(file: Path, language: str | None = None) -> BackboneConfig:
    """Read the architecture from a `config.json`. Raises ValueError, naming the file.

    language: of X-MOD, in place of the file's default.
    """
    try:
        fields = read_object(file)
        if language is not None:
            if fields.get("model_type") != "xmod":
                raise ValueError("language= is for models of X-MOD, which this is not")
            fields["default_language"] = language
        return config_from_huggingface(fields)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(file) in message else f"{file}: {message}") from None


def open_backbone(folder: Path, backbone: BackboneConfig) -> Tensors:
    """Open the weights of a folder under transformers' names, whoever saved them."""
    return find_tensors(folder).split(lambda name: transformers_names(backbone, name))


def find_prefix(tensors: Tensors, backbone: BackboneConfig) -> str:
    """Return the prefix of the backbone's tensor names: the usual one of its architecture, or "".

    Raises ValueError if its first tensor is missing under both.
    """
    first = next(iter(tensor_names(backbone).values()))
    for prefix in (architecture(backbone).prefix, ""):
        if prefix + first in tensors:
            return prefix
    raise ValueError(
        f"{tensors.file}: has no {backbone.model_type} encoder: tensor {first!r} is missing"
    )


def backbone_paths(backbone: BackboneConfig, prefix: str) -> dict[tuple, str]:
    """Map paths in a TokenEncoder's state to tensor names, for the backbone."""
    return {("backbone", *path): name for path, name in tensor_names(backbone, prefix).items()}


def head_paths(encoder: EncoderConfig, layer: int) -> dict[tuple, str]:
    """Map paths in a TokenEncoder's state to tensor names, for one dense layer of the head."""
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
    """Read a TokenEncoder's parameters from tensors in torch's layout.

    Args:
      sources: pairs of tensors and a map from paths to names among them. Paths that no map holds
        are left out of the result.

    Raises:
      ValueError: a tensor is missing, of another shape, or not finite.
    """
    return read_params(param_shapes(encoder), sources)


def read_params(
    shapes: Mapping[tuple, tuple[int, ...]],
    sources: Iterable[tuple[Tensors, Mapping[tuple, str]]],
) -> dict:
    """Read a module's parameters, of these shapes by path; see `fill_params`."""
    params: dict = {}
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
    """Set a value in nested dicts, making those that are missing."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def get_path(tree: dict, path: tuple) -> Any:
    """Return a value from nested dicts."""
    for key in path:
        tree = tree[key]
    return tree


def refuse_unknown(
    tensors: Tensors, backbone: BackboneConfig, known: Iterable[str], also: Sequence[str] = ()
) -> None:
    """Raise ValueError for tensors that the encoder has no place for.

    They mean another architecture, whose embeddings would be wrong without a warning.

    Args:
      known: the names that are read.
      also: parts of names to ignore, to be looked for in "." + name, beside those that the
        architecture's models have.
    """
    extra = [
        name
        for name in sorted(set(tensors.names()) - set(known))
        if not is_unused(backbone, name) and not any(part in f".{name}" for part in also)
    ]
    if extra:
        shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise ValueError(
            f"{tensors.file}: tensors that a {backbone.model_type} encoder with this head does "
            f"not have: {shown}"
        )


def read_pooler(tensors: Tensors, prefix: str) -> dict[str, np.ndarray]:
    """Read BERT's pooler; {} where there is none."""
    names = [f"pooler.dense.{part}" for part in ("weight", "bias")]
    return {name: tensors.read(prefix + name) for name in names if prefix + name in tensors}


# --- Writing --------------------------------------------------------------------------------


def tensors_of(params: dict, names: Mapping[tuple, str]) -> dict[str, np.ndarray]:
    """Turn parameters into tensors in torch's layout; the inverse of `fill_params`."""
    tensors = {}
    for path, name in names.items():
        array = np.asarray(get_path(params, path), np.float32)
        tensors[name] = np.ascontiguousarray(array.T if path[-1] == "kernel" else array)
    return tensors


def backbone_tensors(
    checkpoint: Checkpoint, params: dict, prefix: str, *, pooler: bool
) -> dict[str, np.ndarray]:
    """Return the backbone's tensors, their names after `prefix`.

    Args:
      pooler: whether to add a pooler, of zeros if the checkpoint has none. Original libraries that
        build a pooler would otherwise fill it at random and warn.
    """
    backbone = checkpoint.encoder.backbone
    tensors = tensors_of(params, backbone_paths(backbone, prefix))
    if pooler and architecture(backbone).pooler:
        width = backbone.hidden_size
        zeros = {
            "pooler.dense.weight": np.zeros((width, width), np.float32),
            "pooler.dense.bias": np.zeros(width, np.float32),
        }
        tensors |= {prefix + name: value for name, value in (zeros | {**checkpoint.pooler}).items()}
    return tensors


def fold_head(encoder: EncoderConfig, params: dict, layout: str) -> np.ndarray:
    """Multiply the head into one matrix float32[D, hidden_size], for layouts with one projection.

    Raises ValueError if the head is not linear: a layer has a bias or an activation.
    """
    matrix = np.eye(encoder.backbone.hidden_size, dtype=np.float64)
    for i, layer in enumerate(encoder.head):
        if layer.bias or layer.activation != "Identity":
            what = "a bias" if layer.bias else f"activation {layer.activation}"
            raise ValueError(
                f"the {layout} layout has one projection without bias; dense layer {i + 1} of the "
                f"head has {what}; write the pylate, sentence-transformers or native layout"
            )
        step = np.asarray(params["head"][i]["linear"]["kernel"], np.float64)
        if layer.residual:
            same = layer.in_features == layer.out_features
            step = step + (np.eye(len(step)) if same else params["head"][i]["residual"]["kernel"])
        matrix = matrix @ step
    return np.ascontiguousarray(matrix.T, np.float32)


def one_encoder(checkpoint: Checkpoint, layout: str) -> None:
    """Raise ValueError if queries have a second encoder."""
    if checkpoint.query_params is not None:
        raise ValueError(
            f"the {layout} layout has one encoder, this checkpoint has two; write the flmr or "
            "native layout"
        )


def refuse_text(text: TextConfig, supported: Iterable[str], layout: str) -> None:
    """Raise ValueError for text settings, other than defaults, that a layout cannot store."""
    default = TextConfig()
    cannot = [
        f"{f.name}={getattr(text, f.name)!r}"
        for f in dataclasses.fields(text)
        if f.name not in supported and getattr(text, f.name) != getattr(default, f.name)
    ]
    if cannot:
        raise ValueError(f"the {layout} layout cannot store {', '.join(cannot)}")


def fixed_expansion(text: TextConfig, layout: str) -> None:
    """Raise ValueError if queries are filled up to less than their maximum length."""
    if text.query_minlen not in (None, text.query_maxlen):
        raise ValueError(f"the {layout} layout cannot store query_minlen={text.query_minlen}")


def masks_punctuation(checkpoint: Checkpoint, layout: str) -> bool:
    """Return True if documents drop ASCII punctuation, as Stanford's do, and False if nothing.

    Raises ValueError if they drop other tokens.
    """
    text = checkpoint.config.text
    dropped = set(skipped_tokens(checkpoint))
    for mask in (True, False):
        other = checkpoint.with_text(skiplist_words=None, mask_punctuation=mask)
        if dropped == set(skipped_tokens(other)):
            return mask
    raise ValueError(
        f"the {layout} layout drops ASCII punctuation or nothing; this checkpoint drops "
        f"{len(dropped)} tokens (skiplist_words={text.skiplist_words!r})"
    )


def skipped_tokens(checkpoint: Checkpoint) -> list[str]:
    """List the tokens that documents drop, without padding: punctuation first, others by id."""
    tokenizer = TextTokenizer(checkpoint.tokenizer, checkpoint.config.text)
    to_token = checkpoint.tokenizer.tokenizer.id_to_token
    ids = set(np.flatnonzero(tokenizer.skiplist).tolist())
    if checkpoint.config.text.skiplist_words is None:
        ids.discard(tokenizer.special.pad)
    tokens = [str(to_token(i)) for i in sorted(ids)]
    usual = [char for char in string.punctuation if char in tokens]
    return usual + [token for token in tokens if token not in usual]


def save_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file whose header names the format, as transformers requires."""
    save_file(tensors, file, metadata={"format": "pt"})


def write_base(checkpoint: Checkpoint, folder: Path, architectures: list[str]) -> None:
    """Write `config.json` and the tokenizer's files.

    Args:
      architectures: the classes that `config.json` names.

    Raises ValueError for an architecture that transformers does not have.
    """
    backbone = checkpoint.encoder.backbone
    fields = to_huggingface(backbone) | {"architectures": architectures, "torch_dtype": "float32"}
    if fields.get("rope_scaling"):
        raise ValueError(
            f"transformers has no {backbone.model_type} with rope_scaling "
            f"{fields['rope_scaling']!r}, and would compute other embeddings; write the native "
            "layout"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", fields)
    types = ("token_type_ids",) if architecture(backbone).token_types else ()
    inputs = ("input_ids", *types, "attention_mask")
    write_tokenizer(folder, checkpoint.tokenizer, max_length=backbone.max_length, inputs=inputs)
