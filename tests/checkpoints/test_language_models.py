"""PyLate folders of language models: LFM2-ColBERT and pplx-embed-late, against transformers."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from support import WORDS
from tokenizers import models, pre_tokenizers, processors

from colbert_jax import ColBERT
from colbert_jax.checkpoints import convert_checkpoint, detect_layout, read_checkpoint

TEXTS = ["what is a river", "fish", " ".join(WORDS[:30])]
SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MODELS = {
    "LFM2-ColBERT": dict(model_type="lfm2", layer_types=["conv", "full_attention", "conv"]),
    "pplx": dict(model_type="qwen3", head_dim=8),
}
SETTINGS = {
    "LFM2-ColBERT": dict(query_prefix="[Q] ", document_prefix="[D] "),
    "pplx": dict(query_prefix="", document_prefix="", attend_to_expansion_tokens=True),
}


def write_tokenizer(folder, name):
    """LFM2's puts one token before a text, Qwen3's none; both end queries with the last token."""
    special = ["<|pad|>", "<|startoftext|>", "<|im_end|>", "[Q] ", "[D] ", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *WORDS]))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    if name == "LFM2-ColBERT":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|startoftext|> $A",
            pair="<|startoftext|> $A $B",
            special_tokens=[("<|startoftext|>", 1)],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = dict(pad_token="<|pad|>", eos_token="<|im_end|>", bos_token="<|startoftext|>")
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return len(vocabulary)


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """A folder as PyLate writes it, and token ids to token embeddings by torch."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    transformers = pytest.importorskip("transformers")
    name = request.param
    folder = tmp_path_factory.mktemp("made") / name
    folder.mkdir()
    fields = SIZES | MODELS[name] | {"vocab_size": write_tokenizer(folder, name), "pad_token_id": 0}
    kind = fields.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in encoder.named_parameters():
            parameter.normal_(float("norm" in parameter_name), 0.3)
    encoder.save_pretrained(folder)
    if name == "pplx":
        written = json.loads((folder / "config.json").read_text())
        written |= {"model_type": "bidirectional_pplx_qwen3", "use_bidirectional_attention": True}
        (folder / "config.json").write_text(json.dumps(written))
    dense = torch.randn(12, 16)
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": dense.numpy()}, folder / "1_Dense" / "model.safetensors")
    sizes = {"in_features": 16, "out_features": 12, "bias": False}
    activation = {"activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "1_Dense" / "config.json").write_text(json.dumps(sizes | activation))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    settings = dict(query_length=16, document_length=20, skiplist_words=["the"])
    settings |= SETTINGS[name] | {"do_query_expansion": True}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))

    def embed(ids, attended):
        mask = torch.zeros(1, len(ids), dtype=torch.long)
        mask[:, :attended] = 1
        if name == "pplx":
            blocked = (mask == 0)[:, None, None].expand(1, 1, len(ids), len(ids))
            full = torch.zeros(blocked.shape).masked_fill(blocked, torch.finfo().min)
            mask = {"full_attention": full}
        with torch.inference_mode():
            hidden = encoder(torch.from_numpy(ids).long()[None], mask).last_hidden_state[0]
            return torch.nn.functional.normalize(hidden @ dense.T, dim=-1).numpy()

    return name, folder, embed


def test_parity(made):
    name, folder, embed = made
    assert detect_layout(folder) == "pylate"
    model = ColBERT.from_pretrained(folder, devices=jax.devices()[:1])
    ids, attended = model.tokenizer.queries(TEXTS)
    for row, count, ours in zip(ids, attended, model.encode_queries(TEXTS), strict=True):
        assert row[-1] == 2 or count == 16  # filled up with the end of the sequence
        np.testing.assert_allclose(ours, embed(row, count), atol=1e-5)
    rows = model.tokenizer.documents(TEXTS).ids
    assert len(rows[2]) == 20
    start = [1, 4] if name == "LFM2-ColBERT" else []
    assert rows[1].tolist() == [*start, model.tokenizer._tokenizer.token_to_id("fish")]
    for row, ours in zip(rows, model.encode_documents(TEXTS), strict=True):
        np.testing.assert_allclose(ours, embed(row, len(row))[model.tokenizer.kept(row)], atol=1e-5)


def test_written_again(made, tmp_path):
    _, folder, _ = made
    before = read_checkpoint(folder)
    for layout in ("pylate", "native", "sentence-transformers"):
        convert_checkpoint(folder, tmp_path / layout, layout)
        after = read_checkpoint(tmp_path / layout)
        assert after.encoder == before.encoder
        for a, b in zip(*(jax.tree.leaves(c.params) for c in (before, after)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_quantized(made):
    """The filters of convolutions stay as they are."""
    _, folder, _ = made
    full = ColBERT.from_pretrained(folder, devices=jax.devices()[:1])
    small = ColBERT.from_pretrained(folder, quantization="int8", devices=jax.devices()[:1])
    ours, theirs = (m.encode_documents(TEXTS).values for m in (small, full))
    assert (ours * theirs).sum(axis=1).min() > 0.95
