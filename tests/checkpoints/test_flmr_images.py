"""FLMR's and PreFLMR's checkpoints with their image encoders: read, written, refused."""

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import support
from safetensors.numpy import load_file, save_file

from colbert_jax.checkpoints import convert_checkpoint, read_checkpoint, write_checkpoint
from colbert_jax.checkpoints.common import get_path
from colbert_jax.checkpoints.flmr import _side_names, read_image_config, text_backbone
from colbert_jax.models.colbert import EncoderConfig, param_shapes
from colbert_jax.models.flmr import image_names, image_shapes

CLIP = "query_vision_encoder.vision_model.vision_model."
PREFLMR = dict(
    separate_query_and_context_text_encoder=True,
    use_transformer_mapping_network=True,
    transformer_mapping_config_base="bert-base-uncased",
    transformer_mapping_num_hidden_layers=1,
    text_config={"model_type": "flmr_text_model"},
)
# Section 4.2 of the specification: overrides of the sparse config.json, tensors, parameters, rows.
PUBLISHED = {
    "ViT-B": (PREFLMR, {}, 633, 326_725_504, 113),
    "ViT-L": (
        PREFLMR,
        dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
        | dict(num_hidden_layers=24, patch_size=14, projection_dim=768),
        *(825, 543_170_176, 320),
    ),
    "ViT-G": (
        PREFLMR,
        dict(hidden_size=1664, intermediate_size=8192, num_attention_heads=16, hidden_act="gelu")
        | dict(num_hidden_layers=48, patch_size=14, projection_dim=1280),
        *(1209, 2_084_569_984, 320),
    ),
    "FLMR": ({"text_config": {"vocab_size": 30531}}, {}, 403, 207_011_072, 64),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tensors_from_shapes_alone(name):
    fields, vision, tensors, parameters, rows = PUBLISHED[name]
    fields = fields | {"vision_config": vision}
    file = Path("config.json")
    encoder = EncoderConfig.projecting(text_backbone(fields, file), 128)
    config = read_image_config(fields, file, encoder)
    shapes = {
        name: image_shapes(config)[path] for path, name in image_names(config, "query").items()
    }
    width = encoder.backbone.hidden_size
    for side in (
        ("query", "context") if "separate_query_and_context_text_encoder" in fields else ("query",)
    ):
        names = _side_names(encoder, side)
        shapes |= {name: param_shapes(encoder)[path] for path, name in names.items()}
        shapes[f"{side} pooler weight"], shapes[f"{side} pooler bias"] = (width, width), (width,)
    assert len(shapes) == tensors and sum(map(math.prod, shapes.values())) == parameters
    assert 32 + config.rows() == rows
    assert config.vision.head_dim == (104 if name == "ViT-G" else 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return support.write_preflmr(tmp_path_factory.mktemp("preflmr") / "checkpoint")


def copy(folder, target, change=None, **fields):
    """The folder again, with other tensors and fields of config.json."""
    import shutil

    shutil.copytree(folder, target)
    settings = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(settings))
    if change is not None:
        save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    return target


def same(images, tensors):
    for path, name in image_names(images.config, "query").items():
        array = get_path(images.params, path)
        array = array.T if path[-1] == "kernel" else array
        np.testing.assert_array_equal(array, tensors[name])


def test_a_checkpoint_is_read_whole(folder):
    checkpoint = read_checkpoint(folder, images=True)
    config = checkpoint.images.config
    assert checkpoint.query_params is not None and checkpoint.images.context_params is None
    assert (config.prefix_length, config.vision.patches, config.mapping.num_hidden_layers) == (
        4,
        16,
        1,
    )
    assert config.mapping.num_attention_heads == 2 and config.cross_length == 32
    same(checkpoint.images, load_file(folder / "model.safetensors"))


def test_the_text_part_alone_says_so(folder):
    with pytest.warns(
        UserWarning, match="only its text part is read, without 89 tensors .*; colbert_jax"
    ):
        checkpoint = read_checkpoint(folder)
    assert checkpoint.images is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_and_shards(folder, tmp_path, dtype):
    target = copy(folder, tmp_path / "half")
    tensors = load_file(target / "model.safetensors")
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, target / shard)
        places |= dict.fromkeys(part, shard)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    images = read_checkpoint(target, images=True).images
    same(images, {name: array.astype(np.float32) for name, array in tensors.items()})


def test_a_checkpoint_from_before_the_switch_has_images(folder, tmp_path):
    target = copy(folder, tmp_path / "old", use_vision_encoder=None)
    assert read_checkpoint(target, images=True).images is not None


def test_either_side_is_the_shared_tower(folder, tmp_path):
    def context(tensors):
        return {k.replace("query_vision", "context_vision"): v for k, v in tensors.items()}

    def both(tensors):
        return tensors | context(tensors)

    original = load_file(folder / "model.safetensors")
    for name, change in (("context", context), ("both", both)):
        images = read_checkpoint(copy(folder, tmp_path / name, change), images=True).images
        assert images.context_params is None
        same(images, original)


def test_two_towers(folder, tmp_path):
    settings = {"separate_query_and_context_vision_encoder": True}
    with pytest.raises(
        ValueError, match=r"'context_vision_projection\.model\.0\.weight' is missing"
    ):
        read_checkpoint(copy(folder, tmp_path / "one", **settings), images=True)

    def second(tensors):
        context = {
            k.replace("query_", "context_"): v + 1 for k, v in tensors.items() if "vision" in k
        }
        return tensors | context

    checkpoint = read_checkpoint(copy(folder, tmp_path / "two", second, **settings), images=True)
    images = checkpoint.images
    assert "mapping" in images.params and "mapping" not in images.context_params
    token = images.params["vision"]["class_token"]
    np.testing.assert_array_equal(images.context_params["vision"]["class_token"], token + 1)
    write_checkpoint(checkpoint, tmp_path / "again", "flmr")
    again = read_checkpoint(tmp_path / "again", images=True).images
    np.testing.assert_array_equal(again.context_params["vision"]["class_token"], token + 1)


def test_written_and_read_again(folder, tmp_path):
    checkpoint = read_checkpoint(folder, images=True)
    write_checkpoint(checkpoint, tmp_path / "out", "flmr")
    original, written = (
        load_file(place / "model.safetensors") for place in (folder, tmp_path / "out")
    )
    assert set(original) == set(written)
    for name in original:
        if ".pooler." not in name:
            np.testing.assert_array_equal(original[name], written[name])
    again = read_checkpoint(tmp_path / "out", images=True)
    assert again.images.config == checkpoint.images.config
    convert_checkpoint(folder, tmp_path / "converted", "flmr")
    assert set(load_file(tmp_path / "converted" / "model.safetensors")) == set(written)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["vision_config"]["patch_size"] == 8 and fields["use_vision_encoder"]
    with pytest.raises(ValueError, match="the native layout has no image encoder"):
        write_checkpoint(checkpoint, tmp_path / "native")
    write_checkpoint(dataclasses.replace(checkpoint, images=None), tmp_path / "text", "flmr")
    assert read_checkpoint(tmp_path / "text", images=True).images is None


def test_flmrs_kind(tmp_path):
    """One text encoder, nine words of its own, no mapping network."""
    extra = [f"<{a}O{b}>" for a, b in zip("BSEBEBEBE", "VVVQQCCKK", strict=True)]
    words = support.vocabulary()
    folder = support.write_preflmr(
        tmp_path / "c", mapping=0, separate=False, config={"vocab_size": len(words) + 9}
    )
    for side in ("query", "context"):
        place = folder / f"{side}_tokenizer"
        (place / "vocab.txt").write_text("\n".join(words) + "\n")
        ids = {word: len(words) + i for i, word in enumerate(extra)}
        (place / "added_tokens.json").write_text(json.dumps(ids))
    checkpoint = read_checkpoint(folder, images=True)
    assert checkpoint.images.config.mapping is None and checkpoint.query_params is None
    ids = checkpoint.text_tokenizer().queries(["<BOQ> cats <EOQ>"]).ids[0]
    assert len(words) + 3 in ids and len(words) + 4 in ids


def test_what_contradicts_itself_is_refused(folder, tmp_path):
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    position = f"{CLIP}embeddings.position_embedding.weight"

    def without(part):
        return lambda tensors: {k: v for k, v in tensors.items() if part not in k}

    for i, (change, fields, message) in enumerate(
        (
            (
                None,
                {"vision_config": vision | {"image_size": 48}},
                "17 positions, but vision_config has image_size 48 and patch_size 8, which are 36 "
                "patches and a class token; image_size 32 would fit",
            ),
            (None, {"vision_config": vision | {"patch_size": 4}}, r"has shape \[24, 3, 8, 8\]"),
            (
                None,
                {"vision_config": vision | {"num_attention_heads": 5}},
                "vision_config: hidden_",
            ),
            (None, {"vision_config": "clip"}, "vision_config must be an object"),
            (None, {"mapping_network_prefix_length": 5}, r"model.0.weight' has shape \[32, 24\]"),
            (None, {"mapping_network_prefix_length": "5"}, "must be int, got '5'"),
            (
                None,
                {"transformer_mapping_config_base": "no/where"},
                "'no/where' is neither bert-ba",
            ),
            (None, {"transformer_mapping_config_base": "bert-base-uncased"}, "as wide as the text"),
            (
                None,
                {"transformer_mapping_config_base": None},
                "needs transformer_mapping_config_ba",
            ),
            (None, {"transformer_mapping_num_hidden_layers": 2}, r"layer\.1\.\S+' is missing"),
            (None, {"transformer_mapping_num_hidden_layers": 0}, "num_hidden_layers 0: "),
            (
                None,
                {"use_transformer_mapping_network": False},
                "does not have: transformer_mapping",
            ),
            (without("class_embedding"), {}, r"class_embedding' is missing"),
            (without("vision"), {"use_transformer_mapping_network": False}, "does not have: trans"),
            (
                lambda t: {k: v for k, v in t.items() if "vision" not in k and "mapping" not in k},
                {},
                "use_vision_encoder true, but the weights hold no vision encoder",
            ),
            (lambda t: t | {position: t[position] * np.nan}, {}, "holds NaN"),
        )
    ):
        target = copy(folder, tmp_path / str(i), change, **fields)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(target, images=True)


def test_a_tower_that_the_configuration_switches_off(folder, tmp_path):
    target = copy(folder, tmp_path / "off", use_vision_encoder=False)
    with pytest.warns(UserWarning, match="without 89 tensors .*; use_vision_encoder is false"):
        assert read_checkpoint(target, images=True).images is None
