"""The backbone module of an architecture."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from colbert_jax.models.bert import Bert
from colbert_jax.models.config import (
    BackboneConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)
from colbert_jax.models.distilbert import DistilBert
from colbert_jax.models.electra import Electra
from colbert_jax.models.modernbert import ModernBert
from colbert_jax.models.mpnet import MPNet
from colbert_jax.models.roberta import Roberta

_MODULES: dict[type[BackboneConfig], Any] = {
    BertConfig: Bert,
    RobertaConfig: Roberta,
    DistilBertConfig: DistilBert,
    ElectraConfig: Electra,
    MPNetConfig: MPNet,
    ModernBertConfig: ModernBert,
}


def make_backbone(
    config: BackboneConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
) -> nnx.Module:
    """The module for that architecture; arguments as of `bert.Bert`.

    Its call takes ids int32[B, L] and attended bool[B, L] and gives float32[B, L, hidden_size].
    """
    return _MODULES[type(config)](config, dtype=dtype, rngs=rngs)
