"""Layouts told apart by their files; every field of the metadata; damaged checkpoints."""

import json
import shutil

import numpy as np
import pytest
import support
from safetensors.numpy import load_file, save_file
from tokenizers import BertWordPieceTokenizer, Tokenizer

from colbert_jax import ColBERT
from colbert_jax.checkpoints import convert_checkpoint, read_checkpoint
from colbert_jax.config import IndexConfig, SearchConfig, TextConfig
from colbert_jax.mining import load_teacher


@pytest.fixture
def folder(stanford_folder, tmp_path):
    return shutil.copytree(stanford_folder, tmp_path / "copy")


def edit_json(file, **changes):
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_field_of_the_metadata(tmp_path):
    fields = dict(
        query_token_id="[unused1]",
        doc_token_id="[unused0]",
        query_maxlen=20,
        doc_maxlen=40,
        mask_punctuation=False,
        attend_to_mask_tokens=True,
        similarity="l2",
        dim=8,
        nbits=4,
        kmeans_niters=20,
        ncells=3,
        centroid_score_threshold=0.3,
        ndocs=512,
    )
    checkpoint = read_checkpoint(support.write_stanford(tmp_path / "c", **fields))
    config = checkpoint.config
    assert checkpoint.encoder.dim == 8 and config.similarity == "l2"
    assert config.text == TextConfig(20, 40, "[unused1]", "[unused0]", True, True, False)
    assert config.index == IndexConfig(nbits=4, kmeans_niters=20)
    assert config.search == SearchConfig(3, 0.3, 512)
    assert config.metadata["lr"] == 1e-05 and config.metadata["checkpoint"] == "somewhere/else"
    assert config.metadata["meta"]["version"] == "colbert-v0.4"


def test_stanfords_defaults_where_fields_are_absent_or_null(folder):
    """As in colbertv2.0, whose metadata has no marker fields and several nulls."""
    edit_json(
        folder / "artifact.metadata",
        query_token_id=...,
        doc_token_id=...,
        nbits=...,
        query_maxlen=None,
        ncells=None,
    )
    config = read_checkpoint(folder).config
    assert (config.text.query_token_id, config.text.doc_token_id) == ("[unused0]", "[unused1]")
    assert config.text.query_maxlen == 32 and config.index.nbits == 1
    assert config.search == SearchConfig()


def test_a_config_key_is_unwrapped(folder):
    file = folder / "artifact.metadata"
    file.write_text(json.dumps({"config": json.loads(file.read_text())}))
    assert read_checkpoint(folder).config.text.query_maxlen == 16


def test_without_metadata_the_projection_tells(folder):
    (folder / "artifact.metadata").unlink()
    with pytest.warns(UserWarning, match=r"artifact\.metadata: is missing: Stanford's default"):
        checkpoint = read_checkpoint(folder)
    assert checkpoint.encoder.dim == 16 and checkpoint.config.text == TextConfig()


def test_plain_defaults(plain_folder):
    checkpoint = read_checkpoint(plain_folder)
    config = checkpoint.config
    assert checkpoint.encoder.head == () and config.index.nbits == 2
    assert config.text == TextConfig.untrained(query_maxlen=96, doc_maxlen=96)


def test_old_layer_norm_names_half_precision_and_position_ids(plain_folder, tmp_path):
    copy = shutil.copytree(plain_folder, tmp_path / "old")

    def age(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].astype(np.float16)
            for new, old in (("weight", "gamma"), ("bias", "beta")):
                if name.endswith(f"LayerNorm.{new}"):
                    tensors[name.replace(new, old)] = tensors.pop(name)
        tensors["embeddings.position_ids"] = np.arange(96)[None]

    edit_tensors(copy, age)
    a, b = read_checkpoint(copy).params, read_checkpoint(plain_folder).params
    new, old = (p["backbone"]["embeddings"]["norm"]["scale"] for p in (b, a))
    assert old.dtype == np.float32
    np.testing.assert_allclose(old, new, atol=1e-3)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "missing weight file"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ValueError,
            r"pytorch_model\.bin: ",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-100]
            ),
            ValueError,
            r"model\.safetensors: damaged or truncated",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"junk"),
            ValueError,
            r"model\.safetensors: damaged or truncated",
        ),
        (
            lambda f: edit_tensors(
                f, lambda t: t.update({"bert.embeddings.LayerNorm.bias": np.zeros(7)})
            ),
            ValueError,
            r"'bert\.embeddings\.LayerNorm\.bias' has shape \[7\], the configuration asks",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.pop("bert.encoder.layer.1.output.dense.weight")),
            ValueError,
            r"'bert\.encoder\.layer\.1\.output\.dense\.weight' is missing",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.pop("linear.weight")),
            ValueError,
            r"'linear\.weight' is missing",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"bert.rotary.inv_freq": np.zeros(2)})),
            ValueError,
            r"tensors that a bert encoder with this head does not have: bert\.rotary\.inv_freq",
        ),
        (
            lambda f: edit_json(f / "config.json", model_type="t5"),
            ValueError,
            r"config\.json: model_type 't5' is not supported; supported: 'bert', 'roberta'",
        ),
        (
            lambda f: edit_json(f / "config.json", hidden_act="snake"),
            ValueError,
            r"hidden_act 'snake' is not supported; supported: gelu",
        ),
        (
            lambda f: (f / "config.json").write_text("{"),
            ValueError,
            r"config\.json: not valid JSON",
        ),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
        (
            lambda f: edit_json(f / "artifact.metadata", dim=64),
            ValueError,
            r"the settings have dim 64, but linear\.weight projects to 16",
        ),
        (
            lambda f: edit_json(f / "artifact.metadata", interaction="xtr"),
            ValueError,
            r"interaction 'xtr' is not supported; supported: colbert, flipr",
        ),
        (
            lambda f: edit_json(f / "artifact.metadata", reranker=True),
            ValueError,
            "reranker True is not supported",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t["linear.weight"].fill(np.nan)),
            ValueError,
            r"'linear\.weight' holds NaN",
        ),
        (
            lambda f: edit_json(f / "config.json", num_attention_heads=0),
            ValueError,
            "num_attention_heads must be >= 1",
        ),
        (
            lambda f: edit_json(f / "artifact.metadata", query_maxlen="32"),
            ValueError,
            r"artifact\.metadata: query_maxlen must be int, got '32'",
        ),
    ],
)
def test_damaged_checkpoints(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        read_checkpoint(folder)


def test_another_width_than_the_checkpoint_has(folder, tmp_path):
    assert read_checkpoint(folder, dim=16).encoder.dim == 16
    with pytest.raises(ValueError, match="dim was given as 8, but"):
        read_checkpoint(folder, dim=8)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_checkpoint(tmp_path / "nowhere")


def far_special(template):
    """A post-processor whose [SEP] has an id of its own, beyond every embedding."""
    fields = json.loads(template)
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")],
        "pair": [],
        "special_tokens": {
            "[CLS]": {"id": "[CLS]", "ids": [4], "tokens": ["[CLS]"]},
            "[SEP]": {"id": "[SEP]", "ids": [40_000], "tokens": ["[SEP]"]},
        },
    }
    fields["post_processor"]["single"].insert(1, {"Sequence": {"id": "A", "type_id": 0}})
    fields["post_processor"]["pair"] = [
        *fields["post_processor"]["single"],
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    return json.dumps(fields)


def far_bert_processing(template):
    fields = json.loads(template)
    fields["post_processor"] = {
        "type": "BertProcessing",
        "sep": ["[SEP]", 40_000],
        "cls": ["[CLS]", 4],
    }
    return json.dumps(fields)


def far_added(template):
    tokenizer = Tokenizer.from_str(template)
    tokenizer.add_tokens(["[new]"])
    return tokenizer.to_str()


@pytest.mark.parametrize(
    ("change", "token", "id"),
    [
        (far_special, "[SEP]", 40_000),
        (far_bert_processing, "[SEP]", 40_000),
        (far_added, "[new]", len(support.vocabulary())),
    ],
)
@pytest.mark.parametrize("write", [support.write_stanford, support.write_plain])
def test_ids_beyond_the_embeddings_are_refused(tmp_path, change, token, id, write):
    """NaN or a bare IndexError would come of them, at the first text."""
    folder = write(tmp_path / "copy")
    plain = BertWordPieceTokenizer(str(folder / "vocab.txt")).to_str()
    (folder / "tokenizer.json").write_text(change(plain))
    last = len(support.vocabulary()) - 1
    message = (
        rf"{folder}/tokenizer\.json: its token '\{token[:-1]}\]' has the id {id}, but the word "
        rf"embeddings in {folder}/model\.safetensors are of the ids 0 to {last}: "
    )
    with pytest.raises(ValueError, match=message):
        ColBERT.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, tmp_path / "out", "native")
    if write is support.write_plain:
        with pytest.raises(ValueError, match=message):
            load_teacher(folder)


def test_a_vocabulary_without_its_unknown_token(stanford_folder, tmp_path):
    folder = shutil.copytree(stanford_folder, tmp_path / "copy")
    fields = json.loads(BertWordPieceTokenizer(str(folder / "vocab.txt")).to_str())
    fields["model"]["unk_token"] = "[GONE]"
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: the tokenizer cannot encode every text"
    ):
        ColBERT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "artifact.metadata").write_text("{}"), "holds no setting of its kind"),
        (
            lambda f: (f / "vocab.txt").write_text("\n".join(support.vocabulary()[:50])),
            r"vocab\.txt: has 50 tokens, .*model\.safetensors embeddings of \d+: if the file",
        ),
        (
            lambda f: (f / "tokenizer_config.json").unlink(),
            r"tokenizer_config\.json: is missing: texts become lower case",
        ),
    ],
)
def test_what_may_make_another_model_is_warned_of(folder, change, message):
    change(folder)
    with pytest.warns(UserWarning, match=message):
        read_checkpoint(folder).text_tokenizer()


def test_settings_without_their_list_of_modules(plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "copy")
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    message = r"modules\.json: is missing beside config_sentence_transformers\.json"
    with pytest.warns(UserWarning, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "tokenizer_config.json",
            {"truncation_side": 0.5},
            r"tokenizer_config\.json: truncation_s",
        ),
        ("tokenizer_config.json", {"mask_token": 3}, r"tokenizer_config\.json: mask_token must be"),
        ("artifact.metadata", {"dim": "16"}, r"artifact\.metadata: dim must be int, got '16'"),
    ],
)
def test_errors_name_the_file_of_a_setting(folder, name, changes, message):
    edit_json(folder / name, **changes)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)


def test_a_post_processor_of_another_vocabulary(plain_folder, tmp_path):
    """Its [SEP] has the id of another token, which is within the embeddings."""
    folder = shutil.copytree(plain_folder, tmp_path / "copy")
    tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"))
    fields = json.loads(tokenizer.to_str())
    fields["post_processor"] = {
        "type": "BertProcessing",
        "sep": ["[SEP]", 9],
        "cls": ["[CLS]", tokenizer.token_to_id("[CLS]")],
    }
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    said = r"its post-processor gives '\[SEP\]' the id 9, its vocabulary 5: they are not of one"
    with pytest.raises(ValueError, match=said):
        read_checkpoint(folder).text_tokenizer()
