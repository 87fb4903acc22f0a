"""FLMR's image side against a plain statement of it in torch, on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from colbert_jax.checkpoints.common import set_path
from colbert_jax.models.bert import BertConfig
from colbert_jax.models.flmr import (
    ImageEncoder,
    ImageEncoderConfig,
    image_names,
    image_shapes,
    make_image_encoder,
)
from colbert_jax.models.vision import vision_config

VISION = vision_config(support.VISION | {"initializer_range": 0.02})
MAPPING = BertConfig(
    **{k: v for k, v in (support.TINY | support.MAPPING).items() if k != "model_type"},
    vocab_size=9,
)
B32 = vision_config(
    support.VISION
    | dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    | dict(image_size=224, patch_size=32, initializer_range=0.02)
)


def config(mapping=1, **changes):
    network = None
    if mapping:
        network = MAPPING.with_layers(mapping)
    return ImageEncoderConfig(
        **dict(vision=VISION, dim=16, prefix_length=4, mapping=network) | changes
    )


def tensors(mapping=1):
    return support.image_tensors(support.VISION, 32, 16, 4, mapping=mapping)


def depth(config):
    return 0 if config.mapping is None else config.mapping.num_hidden_layers


def params(config, arrays):
    tree = {}
    for path, name in image_names(config, "query").items():
        array = arrays[name]
        array = array.T if path[-1] == "kernel" else array
        assert array.shape == image_shapes(config)[path], path
        set_path(tree, path, jnp.asarray(array))
    return tree


def stage(config, call, *arrays):
    tree = params(
        config, tensors(0 if config.mapping is None else config.mapping.num_hidden_layers)
    )
    return jax.jit(lambda tree, *a: call(make_image_encoder(config, tree), *a))(tree, *arrays)


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    return pytest.importorskip("flmr_reference")


def random(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def test_class_tokens_to_embeddings(reference):
    cls = random(2, 3, 24)
    ours = stage(config(0), ImageEncoder.project, cls)
    theirs = reference.project(reference.tensors_of(tensors()), "query", *as_torch(cls), 16)
    assert ours.shape == (2, 12, 16)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def as_torch(*arrays):
    import torch

    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("layers", [1, 2])
def test_patches_to_embeddings(reference, layers):
    patches, text = random(2, 1, 16, 24), random(2, 40, 32)
    ours = stage(config(layers, cross_length=32), ImageEncoder.map_patches, patches, text)
    weights = reference.tensors_of(tensors(layers))
    theirs = reference.map_patches(weights, *as_torch(patches[:, 0], text[:, :32]), 2, layers)
    assert ours.shape == (2, 16, 16)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_regions_are_mapped_one_by_one():
    patches, text = random(2, 3, 16, 24), random(2, 8, 32)
    whole = stage(config(), ImageEncoder.map_patches, patches, text)
    for r in range(3):
        alone = stage(config(), ImageEncoder.map_patches, patches[:, r : r + 1], text)
        np.testing.assert_allclose(whole[:, 16 * r : 16 * (r + 1)], alone, atol=1e-5)


def test_which_states_the_stages_get():
    seen = stage(config(0), ImageEncoder.see, random(2, 3, 32, 32))
    np.testing.assert_array_equal(seen.class_token, seen.states[-1][:, 0])
    np.testing.assert_array_equal(seen.patches, seen.states[-2][:, 1:])


def test_names_are_the_parameters():
    for made in (config(0), config(1), config(2)):
        names = image_names(made, "query")
        assert set(names) == set(image_shapes(made)) and len(set(names.values())) == len(names)
        assert set(names.values()) == set(tensors(depth(made)))


def rows_made(config, regions=1):
    """The number of rows that the stages really give, from shapes alone."""
    tree: dict = {}
    for path, shape in image_shapes(config).items():
        set_path(tree, path, jax.ShapeDtypeStruct(shape, jnp.float32))

    def rows(tree, pixels, text):
        encoder = make_image_encoder(config, tree)
        seen = encoder.see(pixels)
        made = encoder.project(seen.class_token[None])
        if config.mapping is not None:
            made = jnp.concatenate([made, encoder.map_patches(seen.patches[None], text)], axis=1)
        return made

    width = 1 if config.mapping is None else config.mapping.hidden_size
    shapes = ((regions, *config.vision.image_shape), (1, 32, width))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.eval_shape(rows, tree, *arrays).shape[1]


def test_rows_of_published_models():
    """PreFLMR's B and L, and FLMR with an image and nine regions, beside the text."""
    base = BertConfig(**support.SIZES)
    fourteen = vision_config(vars(B32) | dict(patch_size=14, num_hidden_layers=2))
    for text, regions, expected, made in (
        (32, 1, 113, ImageEncoderConfig(vision=B32, dim=128, mapping=base)),
        (32, 1, 320, ImageEncoderConfig(vision=fourteen, dim=128, mapping=base)),
        (512, 10, 832, ImageEncoderConfig(vision=B32, dim=128)),
    ):
        assert text + made.rows(regions) == text + rows_made(made, regions) == expected


def test_wrong_sizes():
    with pytest.raises(ValueError, match="prefix_length must be >= 1, got 0"):
        config(prefix_length=0)
