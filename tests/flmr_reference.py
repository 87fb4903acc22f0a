"""FLMR's model once more, plainly in torch, from tensors by their published names."""

from __future__ import annotations

import torch
import transformers
from torch.nn.functional import gelu, layer_norm, linear, normalize

CONTEXT, QUERY = "context", "query"


def tensors_of(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def apply(tensors, name, x):
    return linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def bert_states(tensors, side, fields, ids, attended):
    """The last states of BERT [B, L, H]."""
    fields = {k: v for k, v in fields.items() if k != "model_type"}
    config = transformers.BertConfig(**fields, attn_implementation="eager")
    bert = transformers.BertModel(config).eval()
    start = f"{side}_text_encoder.bert_model."
    own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    assert set(own) == set(dict(bert.named_parameters()))
    ids, attended = torch.from_numpy(ids).long(), torch.from_numpy(attended).long()
    # Not load_state_dict: gradients are to reach the tensors.
    out = torch.func.functional_call(bert, own, (ids,), {"attention_mask": attended})
    return out.last_hidden_state


def clip_states(tensors, side, fields, pixels):
    """All states of CLIP's vision transformer, each [N, 1 + patches, Dv]."""
    config = transformers.CLIPVisionConfig(**fields, attn_implementation="eager")
    clip = transformers.CLIPVisionModel(config).eval()
    start = f"{side}_vision_encoder.vision_model.vision_model."
    own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    head = "vision_model." if any(k.startswith("vision_model.") for k in clip.state_dict()) else ""
    clip.load_state_dict({head + k: v for k, v in own.items()}, strict=False)
    assert {k.removeprefix(head) for k in clip.state_dict()} - {"embeddings.position_ids"} <= set(
        own
    )
    return clip(pixels, output_hidden_states=True).hidden_states


def project(tensors, side, class_tokens, dim):
    """Class tokens [B, regions, Dv] to [B, regions * prefix, D]."""
    x = torch.tanh(apply(tensors, f"{side}_vision_projection.model.0", class_tokens))
    x = apply(tensors, f"{side}_vision_projection.model.2", x)
    return x.reshape(len(x), -1, dim)


def attention(tensors, name, x, other, heads):
    """One block of BERT: attention without a mask, added and normalised."""

    def split(part, y):
        y = apply(tensors, f"{name}.self.{part}", y)
        return y.reshape(*y.shape[:2], heads, -1).transpose(1, 2)

    query, key, value = split("query", x), split("key", other), split("value", other)
    weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)
    y = (weights @ value).transpose(1, 2).reshape(x.shape)
    return norm(tensors, f"{name}.output", x + apply(tensors, f"{name}.output.dense", y))


def norm(tensors, name, x):
    weight, bias = (tensors[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
    return layer_norm(x, weight.shape, weight, bias, 1e-12)


def map_patches(tensors, patches, text, heads, layers=1):
    """Patches [B, n, Dv], which attend to each other and to text [B, L, H]: [B, n, D]."""
    x = apply(tensors, "transformer_mapping_input_linear", patches)
    for i in range(layers):
        layer = f"transformer_mapping_network.layer.{i}"
        x = attention(tensors, f"{layer}.attention", x, x, heads)
        x = attention(tensors, f"{layer}.crossattention", x, text, heads)
        y = gelu(apply(tensors, f"{layer}.intermediate.dense", x))
        x = norm(tensors, f"{layer}.output", x + apply(tensors, f"{layer}.output.dense", y))
    return apply(tensors, "transformer_mapping_output_linear", x)


def query_rows(tensors, fields, ids, attended, kept, pixels, heads=None, side=QUERY):
    """Token embeddings of queries before normalisation: text, class tokens, patches.

    pixels: [B, regions, C, H, W]. heads: of the mapping network; None where there is none.
    """
    states = bert_states(tensors, side, fields["text_config"], ids, attended)
    text = apply(tensors, f"{side}_text_encoder_linear", states) * torch.from_numpy(kept)[..., None]
    batch, regions = pixels.shape[:2]
    images = torch.from_numpy(pixels).flatten(0, 1)
    seen = clip_states(tensors, QUERY, fields["vision_config"], images)
    class_tokens = seen[-1][:, 0].unflatten(0, (batch, regions))
    rows = [text, project(tensors, side, class_tokens, text.shape[-1])]
    if heads is not None:
        # Each region of an image by itself.
        patches = seen[-2][:, 1:].unflatten(0, (batch, regions))
        keys = states[:, : fields.get("transformer_mapping_cross_attention_length", 32)]
        rows += [map_patches(tensors, patches[:, r], keys, heads) for r in range(regions)]
    return torch.cat(rows, dim=1)


def document_rows(tensors, fields, ids, attended, kept):
    """Token embeddings of documents of text before normalisation; each side has its encoder."""
    states = bert_states(tensors, CONTEXT, fields["text_config"], ids, attended)
    rows = apply(tensors, f"{CONTEXT}_text_encoder_linear", states)
    return rows * torch.from_numpy(kept)[..., None]


def in_batch_loss(queries, documents, kept, ways):
    """Cross-entropy of each query's first own document among all documents of the batch."""
    similarity = torch.einsum("bqd,nkd->bnqk", queries, documents)
    similarity = similarity.masked_fill(~torch.from_numpy(kept)[None, :, None], -9999.0)
    scores = similarity.max(dim=-1).values.sum(dim=-1)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(queries)) * ways)


def unit(rows):
    return normalize(rows, dim=-1)
