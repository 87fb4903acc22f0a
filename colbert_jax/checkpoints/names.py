"""Hugging Face's tensor names for the parameters of the backbones.

A table an architecture: path of a module in our state -> name of the module in theirs, `*` for the
number of the layer. What a module holds follows from the last part of our path.
"""

from __future__ import annotations

from collections.abc import Iterator

from colbert_jax.models.config import BackboneConfig, ElectraConfig, ModernBertConfig

_WORD_POSITION = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
_BERT = {
    **_WORD_POSITION,
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "layers.*.attention.query": "encoder.layer.*.attention.self.query",
    "layers.*.attention.key": "encoder.layer.*.attention.self.key",
    "layers.*.attention.value": "encoder.layer.*.attention.self.value",
    "layers.*.attention.output": "encoder.layer.*.attention.output.dense",
    "layers.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.intermediate": "encoder.layer.*.intermediate.dense",
    "layers.*.output": "encoder.layer.*.output.dense",
    "layers.*.output_norm": "encoder.layer.*.output.LayerNorm",
}
_DISTILBERT = {
    **_WORD_POSITION,
    "layers.*.attention.query": "transformer.layer.*.attention.q_lin",
    "layers.*.attention.key": "transformer.layer.*.attention.k_lin",
    "layers.*.attention.value": "transformer.layer.*.attention.v_lin",
    "layers.*.attention.output": "transformer.layer.*.attention.out_lin",
    "layers.*.attention_norm": "transformer.layer.*.sa_layer_norm",
    "layers.*.intermediate": "transformer.layer.*.ffn.lin1",
    "layers.*.output": "transformer.layer.*.ffn.lin2",
    "layers.*.output_norm": "transformer.layer.*.output_layer_norm",
}
_MPNET = {
    **_WORD_POSITION,
    "relative_position": "encoder.relative_attention_bias",
    "layers.*.attention.query": "encoder.layer.*.attention.attn.q",
    "layers.*.attention.key": "encoder.layer.*.attention.attn.k",
    "layers.*.attention.value": "encoder.layer.*.attention.attn.v",
    "layers.*.attention.output": "encoder.layer.*.attention.attn.o",
    "layers.*.attention_norm": "encoder.layer.*.attention.LayerNorm",
    "layers.*.intermediate": "encoder.layer.*.intermediate.dense",
    "layers.*.output": "encoder.layer.*.output.dense",
    "layers.*.output_norm": "encoder.layer.*.output.LayerNorm",
}
_MODERNBERT = {
    "embeddings.word": "embeddings.tok_embeddings",
    "embeddings.norm": "embeddings.norm",
    "layers.*.attention_norm": "layers.*.attn_norm",
    "layers.*.attention.qkv": "layers.*.attn.Wqkv",
    "layers.*.attention.output": "layers.*.attn.Wo",
    "layers.*.mlp_norm": "layers.*.mlp_norm",
    "layers.*.mlp.input": "layers.*.mlp.Wi",
    "layers.*.mlp.output": "layers.*.mlp.Wo",
    "final_norm": "final_norm",
}
_MODULES: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "electra": _BERT | {"projection": "embeddings_project"},
    "mpnet": _MPNET,
    "modernbert": _MODERNBERT,
}
_EMBEDDINGS = ("word", "position", "token_type", "relative_position")

# What models with a head put before the names of the backbone's tensors.
PREFIXES: dict[str, str] = {
    "bert": "bert.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "distilbert": "distilbert.",
    "electra": "electra.",
    "mpnet": "mpnet.",
    "modernbert": "model.",
}

# The class of a backbone without a head in transformers.
MODEL_CLASSES: dict[str, str] = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "distilbert": "DistilBertModel",
    "electra": "ElectraModel",
    "mpnet": "MPNetModel",
    "modernbert": "ModernBertModel",
}

# Parts of the names of tensors that token embeddings do not use, to be looked for in "." + name:
# poolers, heads, and a buffer of old releases.
_HEADS = (".pooler.", ".classifier.", ".qa_outputs.", ".position_ids")
IGNORED: dict[str, tuple[str, ...]] = {
    "bert": (*_HEADS, ".cls."),
    "roberta": (*_HEADS, ".lm_head."),
    "xlm-roberta": (*_HEADS, ".lm_head."),
    "distilbert": (*_HEADS, ".vocab_", ".pre_classifier."),
    "electra": (*_HEADS, ".discriminator_", ".generator_", ".sequence_summary."),
    "mpnet": (*_HEADS, ".lm_head."),
    "modernbert": (*_HEADS, ".head.", ".decoder."),
}


def tensor_names(config: BackboneConfig, prefix: str = "") -> dict[tuple, str]:
    """Path in the NNX state of the backbone -> name of the tensor, behind `prefix`.

    A `kernel` is the transpose of its tensor: torch keeps [out, in], Flax [in, out].
    """
    names: dict[tuple, str] = {}
    for ours, theirs in _modules(config):
        path = tuple(int(part) if part.isdigit() else part for part in ours.split("."))
        for leaf, name in _leaves(config, ours):
            names[*path, leaf] = f"{prefix}{theirs}.{name}"
    return names


def _modules(config: BackboneConfig) -> Iterator[tuple[str, str]]:
    """Our path and their name of every module that holds parameters."""
    for ours, theirs in _MODULES[config.model_type].items():
        if "*" not in ours:
            square = isinstance(config, ElectraConfig) and (
                config.embedding_size == config.hidden_size
            )
            if not (ours == "projection" and square):
                yield ours, theirs
            continue
        # The first layer of ModernBERT gets its input normalised by the embeddings.
        unnormed = isinstance(config, ModernBertConfig) and ours.endswith("attention_norm")
        for i in range(int(unnormed), config.num_hidden_layers):
            yield ours.replace("*", str(i)), theirs.replace("*", str(i))


def _leaves(config: BackboneConfig, module: str) -> Iterator[tuple[str, str]]:
    """Our and their name of each parameter of a module."""
    last = module.split(".")[-1]
    if last in _EMBEDDINGS:
        yield "embedding", "weight"
        return
    yield ("scale" if last.endswith("norm") else "kernel"), "weight"
    if _has_bias(config, module):
        yield "bias", "bias"


def _has_bias(config: BackboneConfig, module: str) -> bool:
    if not isinstance(config, ModernBertConfig):
        return True
    if module.endswith("norm"):
        return config.norm_bias
    return config.attention_bias if ".attention." in module else config.mlp_bias
