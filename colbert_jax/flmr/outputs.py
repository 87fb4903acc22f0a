"""Outputs of `FLMRModelForRetrieval`, with upstream's field names."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class _Output:
    """Gives fields by attribute, by name and by position, as upstream's outputs do."""

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)  # type: ignore

    def keys(self) -> list[str]:
        """Names of the fields that are not None."""
        return [name for name in self._fields if getattr(self, name) is not None]  # type: ignore

    def to_tuple(self) -> tuple:
        """The fields that are not None, in order."""
        return tuple(getattr(self, name) for name in self.keys())


class _QueryFields(NamedTuple):
    pooler_output: jax.Array
    late_interaction_output: jax.Array
    text_encoder_attentions: tuple[jax.Array, ...] | None = None
    text_encoder_hidden_states: tuple[jax.Array, ...] | None = None
    vision_encoder_attentions: tuple[jax.Array, ...] | None = None
    vision_encoder_hidden_states: tuple[jax.Array, ...] | None = None
    transformer_mapping_network_attentions: None = None
    transformer_mapping_network_hidden_states: None = None


class FLMRQueryEncoderOutput(_Output, _QueryFields):
    """pooler_output [B, D], the first row before normalisation; late_interaction_output [B, Lq, D]
    of unit rows, zeros where a token is masked, the text's before the image's; attentions
    [B, heads, L, L] and hidden states [B, L, H] of every layer where asked for, those of the vision
    encoder [B * regions, ...]."""


class _ContextFields(NamedTuple):
    pooler_output: jax.Array | None
    late_interaction_output: Any
    context_mask: jax.Array | None = None
    text_encoder_attentions: tuple[jax.Array, ...] | None = None
    text_encoder_hidden_states: tuple[jax.Array, ...] | None = None
    vision_encoder_attentions: tuple[jax.Array, ...] | None = None
    vision_encoder_hidden_states: tuple[jax.Array, ...] | None = None
    transformer_mapping_network_attentions: None = None
    transformer_mapping_network_hidden_states: None = None


class FLMRContextEncoderOutput(_Output, _ContextFields):
    """As FLMRQueryEncoderOutput, with a normalised pooler_output and context_mask bool[B, Ld, 1];
    the image's rows are before the text's. With `keep_dims=False` late_interaction_output is a list
    of [tokens, D] without masked rows."""


class _RetrievalFields(NamedTuple):
    loss: jax.Array
    scores: jax.Array
    in_batch_negative_loss: jax.Array | None
    query_late_interaction_output: jax.Array
    context_late_interaction_output: jax.Array
    query_attentions: Any = None
    query_hidden_states: Any = None
    context_attentions: Any = None
    context_hidden_states: Any = None


class FLMRModelForRetrievalOutput(_Output, _RetrievalFields):
    """loss and in_batch_negative_loss are scalars; scores [B, n + 1], of each query with its own
    documents; the token embeddings of queries and documents."""
