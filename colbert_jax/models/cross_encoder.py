"""The cross-encoder: one score for a query and a document read together (Nogueira and Cho, 2019).

It is BERT's sequence classifier with one class, as in ms-marco-MiniLM: the hidden state of [CLS]
goes through BERT's pooler, a dense layer with tanh, and a dense layer to one number. These two
layers are the head of an `EncoderConfig`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from colbert_jax.models.bert import BertConfig
from colbert_jax.models.colbert import DenseConfig, EncoderConfig, make_encoder
from colbert_jax.models.pooling import apply_head


def cross_encoder_config(backbone: BertConfig) -> EncoderConfig:
    """Add the pooler and the classifier to a backbone as its head."""
    width = backbone.hidden_size
    pooler = DenseConfig(width, width, bias=True, activation="Tanh")
    return EncoderConfig(backbone, (pooler, DenseConfig(width, 1, bias=True)))


def pair_scores(
    config: EncoderConfig,
    params: dict,
    ids: jax.Array,
    attended: jax.Array,
    types: jax.Array,
    *,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Score pairs, `[CLS] query [SEP] document [SEP]`.

    Args:
      config: from `cross_encoder_config`.
      params: as for `models.colbert.make_encoder`.
      ids: int32[B, L].
      attended: int32[B], how many leading tokens take part in attention.
      types: int32[B, L], 0 up to and including the first [SEP], 1 after it.
      dtype: what the backbone's dense layers compute in; the head computes in float32.

    Returns:
      float32[B], logits.
    """
    mask = jnp.arange(ids.shape[1]) < attended[:, None]
    x = make_encoder(config, params, dtype).backbone(ids, mask, types=types)
    return apply_head(config, params, x[:, 0].astype(jnp.float32))[:, 0]
