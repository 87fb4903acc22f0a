"""What every backbone's architecture has: its configuration, and its entry in the register.

Fields have BERT's names; where the `config.json` of another architecture has other names, `renamed`
maps ours to theirs. Defaults are those of transformers. The sizes have no default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from flax import nnx

from colbert_jax.config import require, require_types
from colbert_jax.models.activations import activation

MAX_LAYERS = 1000  # far above any model; a damaged file may claim more


class LayerConfig(Protocol):
    """What a transformer layer needs of a configuration, of texts or of images."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def initializer_range(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The fields of every architecture. Raises ValueError for values that do not fit together."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0

    model_types: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    layers_alike: ClassVar[bool] = True  # from the second on
    fixed: ClassVar[frozenset[str]] = frozenset()  # fields that no config.json has
    scales_rotation: ClassVar[bool] = False  # whether `read_fields` reads `rope_scaling`

    def __post_init__(self) -> None:
        require_types(self)
        require(
            self.model_type in self.model_types,
            f"model_type {self.model_type!r} is not one of {', '.join(self.model_types)}",
        )
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self.require_positive(*sizes, "intermediate_size")
        require(
            self.num_hidden_layers <= MAX_LAYERS,
            f"num_hidden_layers must be <= {MAX_LAYERS}, got {self.num_hidden_layers}",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
            f"{self.num_attention_heads}",
        )
        require(
            0 <= self.pad_token_id < self.vocab_size,
            f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}",
        )
        require(
            self.max_length >= 1,
            f"max_position_embeddings {self.max_position_embeddings} leaves no position for a "
            "token",
        )
        activation(self.hidden_act)

    def require_positive(self, *names: str) -> None:
        """Raise ValueError for the first of these fields that is below 1."""
        for name in names:
            require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def first_position(self) -> int:
        """Row of the position embeddings that the first token gets."""
        return 0

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that the positions allow."""
        return self.max_position_embeddings - self.first_position

    def with_layers(self, layers: int) -> Self:
        """Return the same architecture with the first `layers` layers only."""
        return dataclasses.replace(self, num_hidden_layers=layers)

    def has_module(self, path: str) -> bool:
        """Whether there is a module at this path of the tensor table."""
        return True

    def tensor(self, name: str) -> str:
        """Return the name of a tensor, from the one in the table."""
        return name

    def is_unused(self, tensor: str) -> bool:
        """Whether this model leaves out a tensor that others of its architecture use."""
        return False

    def has_bias(self, path: str) -> bool:
        """Whether the dense layer or layer normalisation at this path has a bias."""
        return True

    @classmethod
    def usual_fields(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a `config.json` in transformers' words, from one of the model's own repository.

        Raises ValueError for settings that would change the numbers and are not implemented.
        """
        return fields

    @classmethod
    def read_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that a `config.json` holds in another form than one field each.

        Raises ValueError for settings that would change the numbers and are not implemented.
        """
        return {}

    def written_fields(self) -> dict[str, Any]:
        """Return the fields of `config.json` that `read_fields` reads."""
        return {}


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: our configuration and module, and what transformers calls their parts.

    tensors: path of a module in our state -> name of the module in theirs, `*` for the number of a
      layer. What a module holds follows from the last part of our path.
    prefix: what models with a head put before the names of the backbone's tensors.
    model_class: transformers' class of the backbone without a head.
    unused: parts of the names of tensors that token embeddings do not use (heads), to be looked
      for in "." + name, beside those that all architectures have.
    pooler: whether transformers' class builds a pooler over the first token.
    token_types: whether its forward takes `token_type_ids`.
    other_names: parts of names that other libraries give the tensors -> transformers' names; for a
      tensor that holds several, one above the other, all their names with "|" between them.
    also: tells a `config.json` that has another `model_type` or none. If None, there is none.
    """

    model_type: str
    config: type[BackboneConfig]
    module: type[nnx.Module]
    tensors: Mapping[str, str]
    prefix: str
    model_class: str
    unused: tuple[str, ...] = ()
    pooler: bool = False
    token_types: bool = False
    other_names: Mapping[str, str] = field(default_factory=dict)
    also: Callable[[Mapping[str, Any]], bool] | None = None


def named_tensors(
    table: Mapping[str, str], layers: int, leaves: Callable[[str], Mapping[str, str]], prefix: str
) -> dict[tuple, str]:
    """Map paths in an NNX state to tensor names, from a table of modules as `Architecture` has it.

    Args:
      leaves: path of a module -> our and their name of each of its parameters; none: there is no
        such module.
    """
    names: dict[tuple, str] = {}
    for ours, theirs in table.items():
        for i in range(layers if "*" in ours else 1):
            module = ours.replace("*", str(i))
            path = tuple(int(part) if part.isdigit() else part for part in module.split("."))
            for leaf, name in leaves(module).items():
                names[*path, leaf] = f"{prefix}{theirs.replace('*', str(i))}.{name}"
    return names
