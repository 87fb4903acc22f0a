"""jina-colbert-v2's files, under its own repository's names, against transformers' model."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from colbert_jax import ColBERT
from colbert_jax.checkpoints import convert_checkpoint, detect_layout, read_checkpoint
from colbert_jax.models.backbones import config_from_huggingface, tensor_names, transformers_names
from colbert_jax.models.colbert import EncoderConfig, param_shapes

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints" / "transformers_xlm-roberta"
TEXTS = ["a river runs through the city", "fish", "what is the capital of france?"]
# What the published config.json says of the architecture: no model_type.
PUBLISHED = {
    "architectures": ["HF_ColBERT"],
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "lora_adaptations": None,
    "matryoshka_dimensions": None,
    "max_position_embeddings": 8194,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "position_embedding_type": "rotary",
    "rotary_emb_base": 10000.0,
    "truncate_dim": None,
    "type_vocab_size": 1,
    "vocab_size": 250004,
}
OURS = {  # of transformers' names -> of the published file
    "embeddings.LayerNorm": "emb_ln",
    "self_attn.o_proj": "mixer.out_proj",
    "post_attention_layernorm": "norm1",
    "post_mlp_layernorm": "norm2",
}


def published_name(name):
    for theirs, published in OURS.items():
        name = name.replace(f"{theirs}.", f"{published}.")
    return name.replace("layers.", "encoder.layers.")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small folder as the published one, and transformers' model of the same weights."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("jina") / "jina"
    shutil.copytree(GOLDEN, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[QueryMarker]", "[DocumentMarker]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    small = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2)
    small |= dict(max_position_embeddings=66, vocab_size=tokenizer.get_vocab_size())
    (folder / "config.json").write_text(json.dumps(PUBLISHED | small))
    config = transformers.AutoConfig.for_model(
        "jina_embeddings_v3",
        **small,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.normal_(float("orm" in name and name.endswith("weight")), 0.3)
    linear = torch.randn(12, 16)
    state, tensors = encoder.state_dict(), {"linear.weight": linear.numpy()}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused = published_name(name.replace("self_attn.q_proj", "mixer.Wqkv"))
            tensors[f"roberta.{fused}"] = torch.cat(parts).numpy()
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[f"roberta.{published_name(name)}"] = tensor.numpy()
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors"
    )
    settings = dict(query_token_id="[QueryMarker]", doc_token_id="[DocumentMarker]", dim=12)
    settings |= dict(query_maxlen=16, doc_maxlen=60, attend_to_mask_tokens=True)
    (folder / "artifact.metadata").write_text(json.dumps(settings | {"mask_punctuation": True}))

    def embed(ids, dim):
        with torch.inference_mode():
            ids = torch.from_numpy(ids).long()[None]
            hidden = encoder(ids, torch.ones_like(ids)).last_hidden_state[0]
            return torch.nn.functional.normalize((hidden @ linear.T)[:, :dim], dim=-1).numpy()

    return folder, embed


@pytest.mark.parametrize("dim", [None, 8])
def test_parity(made, dim):
    folder, embed = made
    assert detect_layout(folder) == "stanford"
    model = ColBERT.from_pretrained(folder, truncate_dim=dim, devices=jax.devices()[:1])
    assert model.dim == (dim or 12)
    queries, ids = model.encode_queries(TEXTS), model.tokenizer.queries(TEXTS)
    assert set(map(len, ids.ids)) == {16} and (ids.attended == 16).all()  # the filling is attended
    for row, ours in zip(ids.ids, queries, strict=True):
        np.testing.assert_allclose(ours, embed(row, model.dim), atol=1e-5)
    documents = model.tokenizer.documents(TEXTS).ids
    for row, ours in zip(documents, model.encode_documents(TEXTS), strict=True):
        theirs = embed(row, model.dim)[model.tokenizer.kept(row)]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_saved_for_transformers(made, tmp_path):
    """Written under the names that transformers loads without code of the repository."""
    transformers = pytest.importorskip("transformers")
    folder, _ = made
    for layout in ("stanford", "pylate", "native"):
        convert_checkpoint(folder, tmp_path / layout, layout)
    before, after = (
        jax.tree.leaves(read_checkpoint(f).params) for f in (folder, tmp_path / "native")
    )
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    _, said = transformers.AutoModel.from_pretrained(tmp_path / "pylate", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]


def test_full_size_names():
    """The names and shapes of the published file, without its weights."""
    config = config_from_huggingface(PUBLISHED)
    assert config.rope_theta == 10_000 and config.max_length == 8194
    shapes = param_shapes(EncoderConfig.projecting(config, 128))
    names = tensor_names(config, "roberta.")
    assert len(names) == 4 + 24 * 16
    fused = transformers_names(config, "roberta.encoder.layers.23.mixer.Wqkv.bias")
    assert fused == [f"roberta.layers.23.self_attn.{part}_proj.bias" for part in "qkv"]
    assert set(fused) <= set(names.values())
    assert shapes["backbone", "layers", 23, "attention", "query", "kernel"] == (1024, 1024)
    published = {published_name(name) for name in names.values()}
    back = {n for p in published for n in transformers_names(config, p)}
    assert back == set(names.values())


def test_a_fused_tensor_of_another_shape(made, tmp_path):
    from safetensors.numpy import load_file

    folder = shutil.copytree(made[0], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = "roberta.encoder.layers.0.mixer.Wqkv.bias"
    save_file(tensors | {name: tensors[name][:-1]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"Wqkv\.bias' has shape \[47\], which is not that of 3"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_emb_base": None}, "rotary_emb_base is missing"),
        ({"rotary_emb_base": -1.0}, "rope_theta must be > 0"),
        ({"hidden_size": 48}, "head_dim must be even"),
        ({"position_embedding_type": "alibi"}, "model_type None is not supported"),
        (
            {"model_type": "xlm-roberta", "lora_adaptations": ["retrieval.query", "separation"]},
            r"lora_adaptations \['retrieval.query', 'separation'\]: adapters of tasks, which",
        ),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(PUBLISHED | changes)


@pytest.mark.parametrize(
    ("dim", "message"),
    [(0, "must be between 1 and the model's 12"), (13, "must be between 1 and the model's 12")],
)
def test_bad_widths(made, dim, message):
    with pytest.raises(ValueError, match=f"truncate_dim {message}"):
        ColBERT.from_pretrained(made[0], truncate_dim=dim)
