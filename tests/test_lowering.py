"""Every jitted program lowers for CUDA and TPU, without the hardware."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax.sharding import AxisType

from colbert_jax.checkpoints.common import set_path
from colbert_jax.compression import codec, kmeans
from colbert_jax.config import SearchConfig, TrainingConfig
from colbert_jax.models.backbones import config_from_huggingface
from colbert_jax.models.bert import BertConfig
from colbert_jax.models.colbert import EncoderConfig, param_shapes
from colbert_jax.models.flmr import ImageEncoderConfig, image_shapes, make_image_encoder
from colbert_jax.models.vision import vision_config
from colbert_jax.scoring import maxsim_all_pairs, maxsim_nway, maxsim_ragged
from colbert_jax.search import exact, plaid, sharded
from colbert_jax.search.arrays import IndexArrays
from colbert_jax.search.backend import DeviceBackend
from colbert_jax.training.batch import ExampleBatch, TokenBatch
from colbert_jax.training.step import make_gradients

pytestmark = pytest.mark.slow

F32, I32 = jnp.float32, jnp.int32


def shaped(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def training_step(mesh=None):
    """Gradients of a batch: distillation with in-batch negatives, dropout, layers recomputed."""
    backbone = config_from_huggingface(support.TINY | {"vocab_size": 100})
    encoder = EncoderConfig.projecting(backbone, 16)
    config = TrainingConfig(nway=4, bsize=8, remat=True)
    params: dict = {}
    for path, shape in param_shapes(encoder).items():
        set_path(params, path, shaped(*shape))

    def rows(n, length):
        return TokenBatch(
            shaped(n, length, dtype=I32), shaped(n, dtype=I32), shaped(n, length, dtype=bool)
        )

    batch = ExampleBatch(
        rows(8, 16), (rows(16, 48), rows(16, 32)), shaped(32, dtype=I32), shaped(8, 4)
    )
    gradients = make_gradients(encoder, config, "bfloat16", mesh)
    function = partial(gradients, trained=("backbone", "head"))
    return function, params, batch, shaped(dtype=I32), shaped(dtype=I32)


def image_query():
    """From pixels and states of text to rows of queries, with two regions an image, in bfloat16."""
    vision = vision_config(support.VISION | {"initializer_range": 0.02})
    mapping = BertConfig(**{**support.SIZES, "hidden_size": 24}).with_layers(1)
    config = ImageEncoderConfig(vision=vision, dim=16, mapping=mapping)
    params: dict = {}
    for path, shape in image_shapes(config).items():
        set_path(params, path, shaped(*shape))

    def rows(params, pixels, text):
        encoder = make_image_encoder(config, params, jnp.bfloat16)
        seen = encoder.see(pixels)
        class_tokens = seen.class_token.reshape(4, 2, -1)
        patches = seen.patches.reshape(4, 2, *seen.patches.shape[1:])
        return encoder.project(class_tokens), encoder.map_patches(patches, text)

    return rows, params, shaped(8, *vision.image_shape), shaped(4, 32, 24)


def programs(index):
    placed = DeviceBackend(index.arrays).arrays
    arrays = jax.tree.map(lambda a: shaped(*a.shape, dtype=a.dtype), placed)
    queries = shaped(4, 16, 16)
    settings = SearchConfig().resolve(10)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=jax.devices()[:8])
    shards = IndexArrays(
        *(
            array
            if array is None or name in sharded._REPLICATED
            else shaped(8 * array.shape[0], *array.shape[1:], dtype=array.dtype)
            for name, array in arrays._asdict().items()
        )
    )
    sharded_plaid = partial(
        sharded._plaid,
        mesh=mesh,
        ncells=2,
        ndocs=64,
        k=10,
        capacity=1024,
        memory=plaid._ACCELERATOR,
    )
    codec_shapes = jax.tree.map(lambda a: shaped(*a.shape, dtype=a.dtype), index.codec)
    return {
        "all pairs": (maxsim_all_pairs, queries, shaped(9, 20, 16), shaped(9, 20, dtype=bool)),
        "n-way": (maxsim_nway, queries, shaped(4, 3, 20, 16), shaped(4, 3, 20, dtype=bool)),
        "ragged": (
            partial(maxsim_ragged, length=32),
            *(queries, shaped(99, 16), shaped(8, dtype=I32), shaped(4, 5, dtype=I32)),
        ),
        "plaid": (
            lambda a, q: plaid._search_batch(
                a, q, 0.5, settings.ncells, settings.ndocs, 10, 1024, plaid._ACCELERATOR
            ),
            *(arrays, queries),
        ),
        "plaid in some documents": (
            lambda a, q, ok: plaid._search_batch(
                a, q, 0.5, 2, settings.ndocs, 10, 1024, plaid._ACCELERATOR, None, ok
            ),
            *(arrays, queries, shaped(len(arrays.offsets) - 1, dtype=bool)),
        ),
        "plaid of a few documents": (
            lambda a, q, given: plaid._search_batch(
                a, q, 0.5, 1, 1, 16, 64, plaid._ACCELERATOR, None, None, given
            ),
            *(arrays, queries, shaped(64, dtype=I32)),
        ),
        "exact": (
            partial(exact._merge, length=48),
            *(arrays, queries, shaped(64, dtype=I32), shaped(4, 16), shaped(4, 16, dtype=I32)),
        ),
        "sharded plaid": (
            sharded_plaid,
            *(shards, shaped(8, dtype=I32), queries, shaped()),
        ),
        "sharded plaid in some documents": (
            sharded_plaid,
            *(shards, shaped(8, dtype=I32), queries, shaped(), None),
            shaped(8 * (len(arrays.offsets) - 1), dtype=bool),
        ),
        "sharded exact": (
            partial(sharded._merge, length=48, mesh=mesh),
            *(shards, shaped(8, dtype=I32), queries, shaped(512, dtype=I32)),
            *(shaped(32, 16), shaped(32, 16, dtype=I32)),
        ),
        "merged shards": (
            partial(sharded._gather, mesh=mesh),
            *(shaped(32, 16), shaped(32, 16, dtype=I32)),
        ),
        "k-means": (
            kmeans._accumulate,
            *(shaped(64, 16), shaped(64), shaped(64, 16), shaped(64), shaped(512, 16)),
            shaped(dtype=I32),
        ),
        "compress": (codec._compress_block, codec_shapes, shaped(512, 16)),
        "decompress": (
            codec.decompress,
            *(codec_shapes, shaped(512, dtype=I32), shaped(512, 4, dtype=jnp.uint8)),
        ),
        "image query": image_query(),
        "training step": training_step(),
        "sharded training step": training_step(mesh),
    }


NAMES = [
    "all pairs",
    "n-way",
    "ragged",
    "plaid",
    "plaid in some documents",
    "plaid of a few documents",
    "exact",
    "sharded plaid",
    "sharded plaid in some documents",
    "sharded exact",
    "merged shards",
    "k-means",
    "compress",
    "decompress",
    "image query",
    "training step",
    "sharded training step",
]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", NAMES)
def test_lowers(index, name, platform):
    function, *arguments = programs(index)[name]
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert "func.func" in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("devices", [1, 8])
def test_encoder_lowers(stanford_folder, platform, devices):
    from colbert_jax import ColBERT

    model = ColBERT.from_pretrained(
        stanford_folder, dtype="bfloat16", devices=jax.devices()[:devices]
    )
    batch = (np.zeros((8, 32), np.int32), np.ones(8, np.int32), np.ones((8, 32), bool))
    text = model.encode_ids.trace(model.params, *batch).lower(lowering_platforms=(platform,))
    assert "bf16" in text.as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_image_encoder_lowers(platform, tmp_path):
    """Queries and documents with images, each device with its share of them."""
    from colbert_jax import ColBERT

    one = {"num_hidden_layers": 1}
    model = ColBERT.from_pretrained(
        support.write_preflmr(tmp_path / "c", config=one, vision=one), dtype="bfloat16"
    )
    ids = (np.zeros((8, 16), np.int32), np.ones(8, np.int32), np.ones((8, 16), bool))
    pixels, images = np.zeros((8, 3, 32, 32), np.float32), model.images
    both = {"text": model.query_params, "images": images.params}
    for program, *arguments in (
        (images._query, both, *ids, pixels),
        (images._document, images.context_params, pixels),
    ):
        text = program.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        assert "bf16" in text


def test_names_are_all_programs(index):
    assert list(programs(index)) == NAMES
