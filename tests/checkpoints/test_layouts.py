"""Every layout: told by its files, written whole or not at all, damaged in every way."""

import dataclasses
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import support
from safetensors.numpy import load_file, save_file

from colbert_jax import ColBERT
from colbert_jax.checkpoints import (
    LAYOUTS,
    convert_checkpoint,
    detect_layout,
    read_checkpoint,
    write_checkpoint,
)
from colbert_jax.cli import main
from colbert_jax.config import IndexConfig
from colbert_jax.models.colbert import DenseConfig, EncoderConfig
from colbert_jax.tensors.torch_file import write_torch_file
from colbert_jax.tensors.weights import find_tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Stanford checkpoint whose markers have the ids that FLMR wants."""
    return support.write_stanford(tmp_path_factory.mktemp("source") / "stanford")


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    """The same checkpoint in every layout."""
    root = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        convert_checkpoint(source, root / layout, layout)
    return root


@pytest.fixture
def copy(folders, tmp_path):
    """Copies a layout's folder, to be damaged."""
    return lambda layout: shutil.copytree(folders / layout, tmp_path / layout)


def leaves(checkpoint):
    return jax.tree.leaves(checkpoint.params)


def edit_json(file, **changes):
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_told_and_holds_the_same(folders, source, layout):
    assert detect_layout(folders / layout) == layout
    original, read = read_checkpoint(source), read_checkpoint(folders / layout)
    for a, b in zip(leaves(original), leaves(read), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        original.pooler["pooler.dense.weight"], read.pooler["pooler.dense.weight"]
    )
    assert read.encoder == original.encoder


def test_plain_and_single_vector_folders_are_told(plain_folder, tmp_path):
    assert detect_layout(plain_folder) == "huggingface"
    folder = single_vector(plain_folder, tmp_path)
    assert detect_layout(folder) == "single-vector"
    checkpoint = read_checkpoint(folder, dim=8, seed=3)
    assert checkpoint.encoder.dim == 8 and not checkpoint.config.text.query_expansion
    assert checkpoint.config.text.query_prompt == "query: "
    assert read_checkpoint(folder).encoder.head == ()


def single_vector(plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "single")
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    settings = {"prompts": {"query": "query: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


def test_a_stanford_projection_wins_over_modules_without_dense(copy, plain_folder, tmp_path):
    folder = copy("stanford")
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert detect_layout(folder) == "stanford"


def test_only_two_files_in_our_own_layout(folders):
    names = sorted(file.name for file in (folders / "native").iterdir())
    assert names == ["colbert_jax.json", "model.safetensors"]


@pytest.mark.parametrize("form", ["bin", "sharded", "sharded bin", "half"])
def test_weights_in_other_files(source, tmp_path, form):
    folder = shutil.copytree(source, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    expected = leaves(read_checkpoint(source))
    if form == "half":
        save_file(
            {n: t.astype(np.float16) for n, t in tensors.items()}, folder / "model.safetensors"
        )
        got = leaves(read_checkpoint(folder))
        for a, b in zip(expected, got, strict=True):
            assert b.dtype == np.float32
            np.testing.assert_array_equal(a.astype(np.float16).astype(np.float32), b)
        return
    (folder / "model.safetensors").unlink()
    if form == "bin":
        write_torch_file(folder / "pytorch_model.bin", tensors)
    else:
        stem, suffix = ("pytorch_model", "bin") if "bin" in form else ("model", "safetensors")
        places = {}
        for part, some in enumerate((names[::2], names[1::2]), 1):
            shard = f"{stem}-{part:05}-of-00002.{suffix}"
            save = write_torch_file if suffix == "bin" else (lambda file, t: save_file(t, file))
            save(folder / shard, {name: tensors[name] for name in some})
            places |= dict.fromkeys(some, shard)
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    for a, b in zip(expected, leaves(read_checkpoint(folder)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_colbertv1_of_several_devices_and_its_arguments(source, tmp_path):
    """A `.dnn` saved under DistributedDataParallel, beside no settings, with a base elsewhere."""
    tensors = load_file(source / "model.safetensors")
    state = {f"module.{name}": tensor for name, tensor in tensors.items()}
    arguments = {"model": "somebody/base", "doc_maxlen": 40, "query_maxlen": 20, "dim": 16}
    file = tmp_path / "colbert.dnn"
    write_torch_file(file, {"epoch": 1, "model_state_dict": state, "arguments": arguments})
    checkpoint = read_checkpoint(file, base=source)
    text = checkpoint.config.text
    assert (text.doc_maxlen, text.query_maxlen, text.mask_punctuation) == (40, 20, False)
    for a, b in zip(leaves(read_checkpoint(source)), leaves(checkpoint), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_checkpoint(file)


def test_heads_that_are_linear_fold_into_one_projection(source, tmp_path):
    checkpoint = read_checkpoint(source)
    rng = np.random.default_rng(0)
    head = (
        DenseConfig(32, 32, residual=True),
        DenseConfig(32, 24, residual=True),
        DenseConfig(24, 8),
    )
    kernels = [rng.normal(size=(c.in_features, c.out_features)).astype("f4") for c in head]
    across = rng.normal(size=(32, 24)).astype("f4")
    params = {i: {"linear": {"kernel": kernel}} for i, kernel in enumerate(kernels)}
    params[1]["residual"] = {"kernel": across}
    several = dataclasses.replace(
        checkpoint,
        encoder=EncoderConfig(checkpoint.encoder.backbone, head),
        params=checkpoint.params | {"head": params},
    )
    write_checkpoint(several, tmp_path / "stanford", "stanford")
    x = rng.normal(size=(5, 32))
    x1 = x @ kernels[0] + x
    expected = (x1 @ kernels[1] + x1 @ across) @ kernels[2]
    folded = load_file(tmp_path / "stanford" / "model.safetensors")["linear.weight"]
    np.testing.assert_allclose(x @ folded.T, expected, rtol=1e-4, atol=1e-4)
    write_checkpoint(several, tmp_path / "pylate", "pylate")
    assert read_checkpoint(tmp_path / "pylate").encoder == several.encoder

    biased = dataclasses.replace(head[0], bias=True)
    params[0]["linear"]["bias"] = np.zeros(32, "f4")
    encoder = EncoderConfig(checkpoint.encoder.backbone, (biased, *head[1:]))
    with pytest.raises(ValueError, match="dense layer 1 of the head has a bias"):
        write_checkpoint(dataclasses.replace(several, encoder=encoder), tmp_path / "no", "stanford")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"query_expansion": False}, "stanford", "cannot store query_expansion=False"),
        ({"doc_token_id": None}, "stanford", "needs a marker; doc_token_id is None"),
        ({"query_prompt": "query: "}, "flmr", "cannot store query_prompt='query: '"),
        ({"skiplist_words": ("the",)}, "stanford", "this checkpoint drops 1 tokens"),
        ({"query_minlen": 8}, "stanford", "cannot store query_minlen=8"),
        ({"query_minlen": 8}, "flmr", "cannot store query_minlen=8"),
        ({"attend_to_mask_tokens": True}, "colbertv1", "cannot store attend_to_mask_tokens=True"),
        ({"doc_token_id": "[unused0]"}, "colbertv1", "cannot store doc_token_id"),
        ({"query_minlen": 8}, "pylate", "cannot store query_minlen=8"),
        ({"mask_instruction_token": ":"}, "pylate", "cannot store mask_instruction_token"),
        ({"mask_instruction_token": ":"}, "sentence-transformers", "mask_instruction_token"),
        ({"query_token_id": "[unused1]"}, "flmr", r"\[unused0\] and \[unused1\] with ids 1 and 2"),
        ({}, "tensorflow", "unknown layout 'tensorflow'; choose from native, sentence-"),
    ],
)
def test_what_a_layout_cannot_say_is_refused_before_anything_is_written(
    source, tmp_path, changes, layout, message
):
    checkpoint = read_checkpoint(source).with_text(**changes)
    with pytest.raises(ValueError, match=message):
        write_checkpoint(checkpoint, tmp_path / "out", layout)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        convert_checkpoint(source, tmp_path / "out", "pylate")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_two_flmr_encoders(tmp_path):
    folder = support.write_flmr(tmp_path / "two", separate=True)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.query_params is not None
    queries = load_file(folder / "model.safetensors")["query_text_encoder_linear.weight"]
    np.testing.assert_array_equal(checkpoint.query_params["head"][0]["linear"]["kernel"], queries.T)
    for layout in ("flmr", "native"):
        write_checkpoint(checkpoint, tmp_path / layout, layout)
        again = read_checkpoint(tmp_path / layout)
        for side in ("params", "query_params"):
            trees = (jax.tree.leaves(getattr(c, side)) for c in (checkpoint, again))
            for a, b in zip(*trees, strict=True):
                np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="one encoder, this checkpoint has two"):
        write_checkpoint(checkpoint, tmp_path / "no", "pylate")


@pytest.mark.parametrize("side", ["query", "context"])
def test_flmr_stores_one_side_of_a_shared_encoder(tmp_path, side):
    folder = support.write_flmr(tmp_path / "one")
    expected = leaves(read_checkpoint(folder))

    def rename(tensors):
        for name in list(tensors):
            new = name.replace("query_", f"{side}_").replace(".bert_model.", ".text_model.")
            tensors[new] = tensors.pop(name)

    edit_tensors(folder / "model.safetensors", rename)
    for a, b in zip(expected, leaves(read_checkpoint(folder)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_tensors_of_flmrs_colbertv2():
    """The list of the published checkpoint: 200 tensors, 109,580,544 parameters."""
    from colbert_jax.checkpoints.flmr import _side_names, text_backbone
    from colbert_jax.models.colbert import param_shapes

    backbone = text_backbone({"text_config": {"model_type": "flmr_text_model"}}, None)
    encoder = EncoderConfig.projecting(backbone, 128)
    names = _side_names(encoder, "query")
    shapes = param_shapes(encoder)
    count = sum(int(np.prod(shapes[path])) for path in names)
    pooler = 768 * 768 + 768
    assert len(names) + 2 == 200 and count + pooler == 109_580_544
    assert names["head", 0, "linear", "kernel"] == "query_text_encoder_linear.weight"
    assert (
        names["backbone", "layers", 11, "output_norm", "scale"]
        == "query_text_encoder.bert_model.encoder.layer.11.output.LayerNorm.weight"
    )


def test_preflmr_gives_its_text_part(tmp_path):
    folder = support.write_flmr(
        tmp_path / "pre", separate=True, use_vision_encoder=True, mask_instruction_token=":"
    )
    vision = {
        "query_vision_encoder.vision_model.vision_model.pre_layrnorm.weight": np.ones(4, "f4"),
        "query_vision_projection.model.0.bias": np.ones(4, "f4"),
        "transformer_mapping_input_linear.bias": np.ones(4, "f4"),
    }
    edit_tensors(folder / "model.safetensors", lambda t: t.update(vision))
    said = r"config\.json: a model of texts and images: only its text part is read, without 3 "
    with pytest.warns(UserWarning, match=said) as warned:
        assert read_checkpoint(folder).config.text.mask_instruction_token == ":"
    assert [w.filename for w in warned] == [__file__]  # whose line it is
    with pytest.warns(UserWarning, match=said):
        convert_checkpoint(folder, tmp_path / "text", "native")
    read_checkpoint(tmp_path / "text")


def test_the_command_line_warns_in_one_line(copy, tmp_path, capsys):
    folder = copy("pylate")
    (folder / "head.pt").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "native"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"colbert-jax: warning: {folder}: read as pylate, without the weights in"
    )


def test_vision_tensors_that_the_configuration_does_not_mention(copy):
    folder = copy("flmr")
    vision = {"context_vision_projection.model.0.weight": np.ones((4, 4), "f4")}
    edit_tensors(folder / "model.safetensors", lambda t: t.update(vision))
    with pytest.warns(UserWarning, match="without 1 tensors of the vision encoder"):
        read_checkpoint(folder)


def test_overriding_text_settings(folders):
    """Fixed expansion has no floor of its own, and mask_punctuation replaces a skiplist."""
    st = read_checkpoint(folders / "sentence-transformers")
    assert st.config.text.query_minlen is None
    assert st.with_text(query_maxlen=12).config.text.query_maxlen == 12
    pylate = read_checkpoint(folders / "pylate")
    assert pylate.config.text.skiplist_words is not None
    assert pylate.with_text(mask_punctuation=False).config.text.skiplist_words is None


def test_left_truncation_cannot_go_to_prompts(source, tmp_path):
    """A marker that is text would be cut away from a long text."""
    checkpoint = read_checkpoint(source)
    tokenizer = dataclasses.replace(checkpoint.tokenizer, truncation_side="left")
    left = dataclasses.replace(checkpoint, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="that gives other tokens for"):
        write_checkpoint(left, tmp_path / "out", "sentence-transformers")


def test_a_dnn_file_beside_other_weights(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "copy")
    (folder / "old.dnn").write_bytes(b"")
    assert detect_layout(folder) == "stanford"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "old.dnn").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pass old\.dnn itself, and base="):
        read_checkpoint(tmp_path / "alone")


def test_metadata_without_dim_takes_the_projections(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "copy")
    edit_json(folder / "artifact.metadata", dim=...)
    assert read_checkpoint(folder).encoder.dim == 16


WRONG = [
    ("pylate", "config_sentence_transformers.json", {"prompts": "x"}, "prompts must be dict"),
    ("pylate", "config_sentence_transformers.json", {"prompts": {"query": 1}}, "prompt 'query'"),
    ("pylate", "config_sentence_transformers.json", {"default_prompt_name": []}, "must be str"),
    ("pylate", "config_sentence_transformers.json", {"query_prefix": -1}, "query_prefix must be"),
    ("pylate", "config_sentence_transformers.json", {"skiplist_words": -1}, "a list of str"),
    ("pylate", "config_sentence_transformers.json", {"skiplist_words": [1]}, "a list of str"),
    ("pylate", "config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers must be <= 1000"),
    ("sentence-transformers", "sentence_bert_config.json", {"query_expansion": "x"}, "be dict"),
    (
        "sentence-transformers",
        "sentence_bert_config.json",
        {"query_expansion": {"strategy": "fixed", "length": 16, "attend": "no"}},
        "attend must be bool",
    ),
    (
        "sentence-transformers",
        "sentence_bert_config.json",
        {"query_expansion": {"strategy": "fixed", "length": 10**9}},
        "query_maxlen is 1000000000, the encoder has 96 positions",
    ),
    ("sentence-transformers", "2_MultiVectorMask/config.json", {"skiplist_words": -1}, "list of"),
    ("sentence-transformers", "2_MultiVectorMask/config.json", {"skiplist_tasks": -1}, "tasks -1"),
    ("sentence-transformers", "2_MultiVectorMask/config.json", {"skiplist_tasks": [[]]}, "tasks"),
    ("flmr", "config.json", {"mask_instruction_token": -1}, "mask_instruction_token must be str"),
    ("flmr", "config.json", {"query_mask_input_ids_skip_list": [5]}, "is not supported"),
    ("flmr", "query_tokenizer/tokenizer_config.json", {"query_maxlen": "x"}, "must be int"),
]


@pytest.mark.parametrize(("layout", "name", "changes", "message"), WRONG)
def test_wrong_types_name_the_field(copy, layout, name, changes, message):
    folder = copy(layout)
    edit_json(folder / name, **changes)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)


def test_json_that_is_no_json(copy):
    folder = copy("pylate")
    for content in ("[" * 200_000, "1" * 5000 + "x"):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
            read_checkpoint(folder)


def prefix(folder, **changes):
    edit_json(folder / "config_sentence_transformers.json", **changes)


def write_modules(folder, *entries):
    (folder / "modules.json").write_text(json.dumps(list(entries)))


TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}


@pytest.mark.parametrize(
    ("layout", "damage", "error", "message"),
    [
        (
            "pylate",
            lambda f: write_modules(f, {"path": "../elsewhere", "type": "x.Transformer"}),
            ValueError,
            r"module path '\.\./elsewhere' leads out of the folder",
        ),
        ("pylate", lambda f: (f / "modules.json").write_text("{}"), ValueError, "expected a list"),
        (
            "pylate",
            lambda f: write_modules(f, TRANSFORMER),
            ValueError,
            "lists no Dense module, so PyLate would add a random projection",
        ),
        (
            "pylate",
            lambda f: prefix(f, query_prefix="[Q] "),
            ValueError,
            r"query_prefix '\[Q\] ' is not a token of the tokenizer",
        ),
        ("pylate", lambda f: prefix(f, query_length="32"), ValueError, "query_length must be int"),
        (
            "pylate",
            lambda f: prefix(f, similarity_fn_name="cosine"),
            ValueError,
            "similarity_fn_name 'cosine' is not MaxSim",
        ),
        (
            "pylate",
            lambda f: edit_json(f / "1_Dense" / "config.json", activation_function="os.system"),
            ValueError,
            r"1_Dense/config\.json: activation_function 'os\.system' is not supported",
        ),
        (
            "pylate",
            lambda f: edit_json(f / "1_Dense" / "config.json", in_features=31),
            ValueError,
            "dense layer 1 of the head takes 31 features, but the backbone before it gives 32",
        ),
        (
            "pylate",
            lambda f: edit_json(f / "1_Dense" / "config.json", bias=True),
            ValueError,
            r"tensor 'linear\.bias' is missing",
        ),
        (
            "pylate",
            lambda f: edit_json(f / "1_Dense" / "config.json", out_features=17),
            ValueError,
            r"'linear\.weight' has shape \[16, 32\], the configuration asks for \[17, 32\]",
        ),
        (
            "pylate",
            lambda f: (f / "1_Dense" / "model.safetensors").unlink(),
            FileNotFoundError,
            "1_Dense: missing weight file",
        ),
        (
            "sentence-transformers",
            lambda f: edit_json(
                f / "sentence_bert_config.json", query_expansion={"strategy": "some"}
            ),
            ValueError,
            "query_expansion must have strategy 'fixed' or 'min'",
        ),
        (
            "sentence-transformers",
            lambda f: prefix(f, similarity_fn_name="xtr"),
            ValueError,
            "similarity_fn_name 'xtr' is not supported; supported: 'maxsim', 'meanmaxsim'",
        ),
        (
            "sentence-transformers",
            lambda f: write_modules(
                f,
                TRANSFORMER,
                {"path": "2_MultiVectorMask", "type": "x.MultiVectorMask"},
                {"path": "3_Normalize", "type": "x.Normalize"},
                {"path": "4_LSTM", "type": "x.LSTM"},
            ),
            ValueError,
            r"module x\.LSTM is not supported",
        ),
        (
            "flmr",
            lambda f: edit_json(f / "config.json", dim=99),
            ValueError,
            r"config\.json has dim 99, but the weights project to 16",
        ),
        (
            "flmr",
            lambda f: edit_json(f / "config.json", separate_query_and_context_text_encoder=True),
            ValueError,
            "asks for two text encoders, the weights hold only the query side",
        ),
        (
            "flmr",
            lambda f: edit_json(
                f / "config.json", text_config={"text_encoder_base_model": "BAAI/bge-m3"}
            ),
            ValueError,
            "text_encoder_base_model 'BAAI/bge-m3' is not supported",
        ),
        (
            "flmr",
            lambda f: edit_json(f / "config.json", text_config={"hidden_act": "snake"}),
            ValueError,
            "text_config: hidden_act 'snake' is not supported",
        ),
        (
            "flmr",
            lambda f: shutil.rmtree(f / "context_tokenizer"),
            None,
            None,
        ),
        (
            "native",
            lambda f: edit_json(f / "colbert_jax.json", version=99),
            ValueError,
            "version 99",
        ),
        (
            "native",
            lambda f: edit_json(f / "colbert_jax.json", text=...),
            ValueError,
            "field 'text' is missing",
        ),
        (
            "native",
            lambda f: edit_json(f / "colbert_jax.json", tokenizer={"tokenizer": {}}),
            ValueError,
            r"colbert_jax\.json: ",
        ),
        (
            "native",
            lambda f: (f / "model.safetensors").unlink(),
            FileNotFoundError,
            r"model\.safetensors is missing",
        ),
        (
            "native",
            lambda f: edit_tensors(
                f / "model.safetensors", lambda t: t.update(x=np.zeros(3, "f4"))
            ),
            ValueError,
            r"tensors that colbert_jax\.json does not describe: \['x'\]",
        ),
        (
            "colbertv1",
            lambda f: (f / "colbert.dnn").write_bytes((f / "colbert.dnn").read_bytes()[:2000]),
            ValueError,
            r"colbert\.dnn",
        ),
    ],
)
def test_damaged_folders(copy, layout, damage, error, message):
    folder = copy(layout)
    damage(folder)
    if error is None:  # one tokenizer folder is enough, but the other has a length
        with pytest.warns(
            UserWarning, match=r"context_tokenizer/.*: is missing: doc_maxlen is 512"
        ):
            assert read_checkpoint(folder)
        return
    with pytest.raises(error, match=message):
        read_checkpoint(folder)


def test_flmr_tokenizers_that_differ(copy):
    folder = copy("flmr")
    file = folder / "query_tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"lowercase": true', '"lowercase": false'))
    (folder / "query_tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="query_tokenizer and context_tokenizer are different"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("places", "error", "message"),
    [
        ({"a": "../stolen.safetensors"}, ValueError, "a shard must be a file of this folder"),
        ({"a": "/etc/passwd"}, ValueError, "a shard must be a file of this folder"),
        ({"a": ".."}, ValueError, "a shard must be a file of this folder"),
        ({"a": 3}, ValueError, "a shard must be a file of this folder"),
        ({"a": "part.safetensors"}, FileNotFoundError, r"shard part\.safetensors is missing"),
        ({"b": "here.safetensors"}, ValueError, r"tensor 'b' is not in its shard"),
        ({}, ValueError, "expected an object with a 'weight_map'"),
    ],
)
def test_damaged_index_of_shards(tmp_path, places, error, message):
    save_file({"a": np.zeros(3, "f4")}, tmp_path / "here.safetensors")
    save_file({"a": np.zeros(3, "f4")}, tmp_path.parent / "stolen.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(error, match=message):
        find_tensors(tmp_path)


def header(**entry):
    text = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} | entry})
    return len(text).to_bytes(8, "little") + text.encode() + bytes(12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "shorter than its header"),
        (b"version https://git-lfs.github.com/spec/v1", "its header claims"),
        ((2**40).to_bytes(8, "little") + b"{}", "its header claims"),
        ((2).to_bytes(8, "little") + b"[]", "header is not an object"),
        ((2).to_bytes(8, "little") + b"{x", "header is not JSON"),
        (header()[:-1], r"tensor 'a' ends at byte \d+, the file at \d+"),
        (header(shape=[4]), r"tensor 'a' of shape \[4\] has 12 bytes"),
        (header(shape=[-3]), "sizes that are not whole numbers"),
        (header(shape=None), "lacks dtype, shape or data_offsets"),
        (header(dtype="F4"), "tensor 'a' is F4; supported: F64"),
        (header(data_offsets=[2**62, 2**62 + 12]), "ends at byte"),
    ],
)
def test_damaged_safetensors(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_tensors(tmp_path)


UNREADABLE = {
    "a broken link": lambda file: file.symlink_to(file.parent / "blobs" / "pruned"),
    "a circle of links": lambda file: file.symlink_to(file),
    "a folder": lambda file: file.mkdir(),
    "a pipe": lambda file: os.mkfifo(file),
}
# Files that tell a layout, or settings that may be left out; absent ones count as absent.
OPTIONAL = ["colbert_jax.json", "modules.json", "config.json", "tokenizer_config.json"]


@pytest.mark.parametrize("layout", [*LAYOUTS, "huggingface"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_not_absent(folders, plain_folder, tmp_path, layout, kind):
    source = plain_folder if layout == "huggingface" else folders / layout
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    unread = {"3_Normalize/config.json"}
    if layout != "huggingface":  # the vocabulary is in tokenizer.json too
        unread |= {str(file) for file in files if file.name == "vocab.txt"}
    for i, name in enumerate(dict.fromkeys(map(str, [*files, *OPTIONAL]))):
        if layout == "native" and name not in map(str, files):
            continue  # whose file tells it before all others are looked at
        if layout in ("flmr", "colbertv1") and name == "tokenizer_config.json":
            continue
        folder = shutil.copytree(source, tmp_path / str(i))
        (folder / name).unlink(missing_ok=True)
        UNREADABLE[kind](folder / name)
        if name in unread:
            read_checkpoint(folder)
            continue
        with pytest.raises(ValueError, match=re.escape(str(folder / name))):
            read_checkpoint(folder)


@pytest.mark.parametrize("kind", ["a broken link", "a circle of links", "a pipe"])
@pytest.mark.parametrize("name", ["checkpoint", "colbert.dnn"])
def test_a_checkpoint_that_cannot_be_read_is_not_looked_for_on_the_hub(tmp_path, kind, name):
    UNREADABLE[kind](tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        ColBERT.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("name", ["query_tokenizer", "context_tokenizer"])
def test_a_folder_of_a_tokenizer_that_cannot_be_read(copy, name):
    folder = copy("flmr")
    shutil.rmtree(folder / name)
    (folder / name).symlink_to("pruned")
    with pytest.raises(ValueError, match=f"{name}: a link to pruned, which is not there"):
        read_checkpoint(folder)


def test_files_that_may_not_be_read(copy, monkeypatch):
    folder = copy("stanford")
    opened = Path.open

    def refuse(file, *args, **kwargs):
        if file.name == "artifact.metadata":
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"artifact\.metadata: cannot be read: Permission denied"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("single-vector", ["sparse_linear.pt", "mlm_head.bin"]),
        ("huggingface", ["colbert.dnn"]),
        ("huggingface", ["adapter_model.safetensors"]),
        ("stanford", ["2_Dense/model.safetensors"]),
        ("pylate", ["2_Dense/pytorch_model.bin", "projection.pth"]),
        ("native", ["head.bin"]),
    ],
)
def test_weights_that_the_layout_does_not_read_are_named(
    folders, plain_folder, tmp_path, layout, names
):
    if layout == "single-vector":
        folder = single_vector(plain_folder, tmp_path)
    else:
        place = plain_folder if layout == "huggingface" else folders / layout
        folder = shutil.copytree(place, tmp_path / "copy")
    for name in (*names, "training_args.bin", "optimizer.pt", "model.fp16.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    with pytest.warns(UserWarning) as warned:
        read_checkpoint(folder)
    (message,) = [str(w.message) for w in warned]
    assert f"without the weights in {', '.join(sorted(names))}: " in message


HEADS = ["colbert_linear.bin", "colbert_linear.safetensors", "projection.pth", "vector_head.bin"]


@pytest.mark.parametrize("layout", ["single-vector", "huggingface"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_beside_a_plain_encoder_is_refused(plain_folder, tmp_path, layout, name):
    """Without it the token embeddings are others."""
    if layout == "single-vector":
        folder = single_vector(plain_folder, tmp_path)
    else:
        folder = shutil.copytree(plain_folder, tmp_path / "copy")
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name}: by its name a head, which this library does"):
        read_checkpoint(folder, dim=8 if layout == "huggingface" else None)


@pytest.mark.parametrize("layout", ["huggingface", "stanford", "pylate"])
def test_an_adapter_is_refused(folders, plain_folder, tmp_path, layout):
    place = plain_folder if layout == "huggingface" else folders / layout
    folder = shutil.copytree(place, tmp_path / "copy")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"adapter_config\.json: an adapter, .* merge it with peft"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_settings_survive_every_layout(tmp_path, layout):
    """Those of Stanford's metadata that other libraries' layouts have no place for."""
    given = dict(nbits=4, kmeans_niters=7, ncells=3, ndocs=512, similarity="l2")
    source = support.write_stanford(tmp_path / "source", **given)
    convert_checkpoint(source, tmp_path / layout, layout)
    assert read_checkpoint(tmp_path / layout).config.index.nbits == 4
    convert_checkpoint(tmp_path / layout, tmp_path / "back", "stanford")
    before, after = (
        json.loads((folder / "artifact.metadata").read_text())
        for folder in (source, tmp_path / "back")
    )
    assert {name: after[name] for name in before} == before
    assert after["checkpoint"] == "somewhere/else" and after["query_token"] == "[Q]"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_settings_of_ours_survive_every_layout(source, tmp_path, layout):
    read = read_checkpoint(source)
    config = dataclasses.replace(
        read.config,
        index=IndexConfig(nbits=8, buckets="quantile", seed=5, num_centroids=64),
        metadata={**read.config.metadata, "prompts": {"other": "o: "}, "training": {"steps": 3}},
    )
    write_checkpoint(dataclasses.replace(read, config=config), tmp_path / layout, layout)
    again = read_checkpoint(tmp_path / layout).config
    assert (again.index, again.search) == (config.index, config.search)
    assert again.metadata == config.metadata


def test_prompts_that_are_not_used_are_carried(copy, tmp_path):
    folder = copy("pylate")
    prompts = {"query": "", "document": "", "clustering": "cluster: "}
    edit_json(folder / "config_sentence_transformers.json", prompts=prompts)
    for layout in ("native", "sentence-transformers", "pylate"):
        convert_checkpoint(folder, tmp_path / "converted" / layout, layout)
        folder = tmp_path / "converted" / layout
    fields = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert fields["prompts"] == prompts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": {"nbits": 3}}, "nbits must be one of"),
        ({"index": {"bits": 3}}, "bits"),
        ({"search": []}, "search must be dict"),
        ({"similarity": "dot"}, "similarity must be"),
        ({"metadata": "x"}, "metadata must be dict"),
    ],
)
def test_damaged_carried_settings(copy, changes, message):
    folder = copy("pylate")
    (folder / "colbert_jax_settings.json").write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=rf"colbert_jax_settings\.json: .*{message}"):
        read_checkpoint(folder)
