"""Every jitted program lowers for CUDA and TPU, without the hardware."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from colbert_jax.checkpoints.common import set_path
from colbert_jax.compression import codec, kmeans, learned
from colbert_jax.config import SearchConfig, TrainingConfig
from colbert_jax.models.backbones import config_from_huggingface
from colbert_jax.models.colbert import EncoderConfig, make_encoder, param_shapes
from colbert_jax.models.flmr import ImageEncoderConfig, image_shapes, make_image_encoder
from colbert_jax.models.vision import vision_config
from colbert_jax.scoring import maxsim_all_pairs, maxsim_nway, maxsim_ragged
from colbert_jax.search import exact, plaid, sharded
from colbert_jax.search.arrays import IndexArrays, token_inverse_norms
from colbert_jax.search.backend import DeviceBackend
from colbert_jax.search.learned import LearnedArrays
from colbert_jax.training.batch import ExampleBatch, Images, Passages, TokenBatch
from colbert_jax.training.flmr import _Loss
from colbert_jax.training.step import gradients_of, make_gradients

pytestmark = pytest.mark.slow

F32, I32 = jnp.float32, jnp.int32


def shaped(*shape, dtype=F32, place=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def rows_over(mesh):
    """The sharding of rows over the devices of a mesh; None without one."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))


def token_batch(n, length, place=None):
    kept = shaped(n, length, dtype=bool, place=place)
    ids, attended = shaped(n, length, dtype=I32, place=place), shaped(n, dtype=I32, place=place)
    return TokenBatch(ids, attended, kept)


def params_of(shapes):
    params: dict = {}
    for path, shape in shapes.items():
        set_path(params, path, shaped(*shape))
    return params


TINY = EncoderConfig.projecting(config_from_huggingface(support.TINY | {"vocab_size": 100}), 16)


def encoder(config, batch, length, mesh=None):
    """Token embeddings of texts, in bfloat16; over a mesh each device has `batch` of them."""

    def encode(params, *texts):
        return make_encoder(config, params, jnp.bfloat16)(*texts)

    params, rows = params_of(param_shapes(config)), rows_over(mesh)
    if mesh is None:
        return encode, params, *token_batch(batch, length)
    spread = PartitionSpec("data")
    over = jax.shard_map(
        encode, mesh=mesh, in_specs=(PartitionSpec(), *[spread] * 3), out_specs=spread
    )
    return over, params, *token_batch(batch * mesh.size, length, rows)


def training_step(mesh=None, encoder=TINY, bsize=8, nway=4, lengths=(16, 48)):
    """Gradients of a batch: distillation with in-batch negatives, dropout, layers recomputed."""
    config = TrainingConfig(nway=nway, bsize=bsize, remat=True)
    half, place = bsize * nway // 2, rows_over(mesh)
    batch = ExampleBatch(
        token_batch(bsize, lengths[0], place),
        tuple(token_batch(half, length, place) for length in (lengths[1], lengths[1] * 2 // 3)),
        shaped(2 * half, dtype=I32, place=place),
        shaped(bsize, nway, place=place),
    )
    gradients = make_gradients(encoder, config, "bfloat16", mesh)
    function = partial(gradients, trained=("backbone", "head"))
    return function, params_of(param_shapes(encoder)), batch, shaped(dtype=I32), shaped(dtype=I32)


IMAGES = ImageEncoderConfig(
    vision=vision_config(support.VISION | {"initializer_range": 0.02}),
    dim=16,
    mapping=TINY.backbone.with_layers(1),
)


def image_training_step(mesh, encoder=TINY, images=IMAGES, bsize=8, nway=2, lengths=(32, 48)):
    """Gradients of a batch of questions about images, the vision encoder frozen."""
    config = TrainingConfig(loss="contrastive", nway=nway, bsize=bsize)
    params, text = params_of(image_shapes(images)), params_of(param_shapes(encoder))
    fixed = {"images": {"vision": params.pop("vision")}}

    place = rows_over(mesh)

    def keys(*shape):
        return shaped(*shape, 2, dtype=I32, place=place)

    batch = ExampleBatch(
        token_batch(bsize, lengths[0], place),
        (token_batch(bsize * nway, lengths[1], place),),
        shaped(bsize * nway, dtype=I32, place=place),
        None,
        Passages(keys(bsize), keys(bsize * nway), keys(bsize, 1)),
        Images(
            shaped(bsize, *images.vision.image_shape, place=place),
            shaped(bsize, dtype=bool, place=place),
        ),
    )
    gradients = gradients_of(_Loss(encoder, images, True).make(config, mesh), config)
    function = partial(gradients, trained=("context", "images"))
    numbers = shaped(dtype=I32), shaped(dtype=I32)
    trained = {"context": text, "images": params}
    return (
        lambda params, batch, step, number, fixed: function(
            params, batch, step, number, fixed=fixed
        ),
        *(trained, batch, *numbers, fixed),
    )


def image_query(config=IMAGES, batch=4):
    """From pixels and states of text to rows of queries, with two regions an image, in bfloat16."""

    def rows(params, pixels, text):
        encoder = make_image_encoder(config, params, jnp.bfloat16)
        seen = encoder.see(pixels)
        class_tokens = seen.class_token.reshape(batch, 2, -1)
        patches = seen.patches.reshape(batch, 2, *seen.patches.shape[1:])
        return encoder.project(class_tokens), encoder.map_patches(patches, text)

    pixels = shaped(2 * batch, *config.vision.image_shape)
    text = shaped(batch, 32, config.mapping.hidden_size)
    return rows, params_of(image_shapes(config)), pixels, text


def shapes(tree):
    return jax.tree.map(lambda a: shaped(*a.shape, dtype=a.dtype), tree)


def learned_shapes(documents, dim, landmarks=64, width=32, place=None):
    """Learned vectors, those of a mesh where `place` says how rows are spread over it."""
    return LearnedArrays(
        shaped(landmarks, dim),
        shaped(landmarks, width),
        shaped(documents, width, dtype=jnp.int8, place=place),
        shaped(documents, place=place),
    )


def learned_solver(dim, tokens, landmarks=64, samples=128, width=32, documents=64):
    """The vectors of a block of documents."""
    predictor = learned.Predictor(
        shaped(landmarks, dim),
        shaped(landmarks, width),
        shaped(samples, dim),
        shaped(samples),
        shaped(width, samples),
    )
    block = shaped(tokens, dim), shaped(tokens, dtype=I32), shaped(documents, dtype=jnp.int8)
    return learned._vectors, predictor, *block


def programs(
    arrays, codec_shapes, *, batch=(4, 16), capacity=1024, ndocs=None, block=512, width=32
):
    """Functions and their arguments, by name.

    Args:
      arrays, codec_shapes: of an index, as `shapes` gives them.
      batch: queries and their rows.
      capacity: room for candidates.
      ndocs: of PLAID.
      block: tokens that k-means and compression take at a time, on each device.
      width: of learned vectors.
    """
    dim = arrays.centroids.shape[1]
    count, rows = batch
    queries = shaped(count, rows, dim)
    settings = SearchConfig(ndocs=ndocs).resolve(10)
    packed, clusters = arrays.residuals.shape[1], arrays.centroids.shape[0]
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=jax.devices()[:8])
    over = partial(shaped, place=rows_over(mesh))
    shards = IndexArrays(
        *(
            array
            if array is None or name in sharded._REPLICATED
            else over(8 * array.shape[0], *array.shape[1:], dtype=array.dtype)
            for name, array in arrays._asdict().items()
        )
    )
    sharded_plaid = partial(
        sharded._plaid,
        mesh=mesh,
        ncells=2,
        ndocs=ndocs or 64,
        k=10,
        capacity=capacity,
        memory=plaid._ACCELERATOR,
    )
    num_documents = len(arrays.offsets) - 1
    vectors = learned_shapes(num_documents, dim, 2 * width, width)
    spread = learned_shapes(8 * num_documents, dim, 2 * width, width, rows_over(mesh))

    def search_learned(arrays, queries, vectors, allowed=None):
        return plaid._search_batch(
            arrays, queries, 0.0, 1, 64, 10, 64, plaid._ACCELERATOR, None, allowed, None, vectors
        )

    return {
        "all pairs": (maxsim_all_pairs, queries, shaped(9, 20, dim), shaped(9, 20, dtype=bool)),
        "n-way": (
            maxsim_nway,
            queries,
            shaped(count, 3, 20, dim),
            shaped(count, 3, 20, dtype=bool),
        ),
        "ragged": (
            partial(maxsim_ragged, length=32),
            *(queries, shaped(99, dim), shaped(8, dtype=I32), shaped(count, 5, dtype=I32)),
        ),
        "plaid": (
            lambda a, q: plaid._search_batch(
                a, q, 0.5, settings.ncells, settings.ndocs, 10, capacity, plaid._ACCELERATOR
            ),
            *(arrays, queries),
        ),
        "plaid in some documents": (
            lambda a, q, ok: plaid._search_batch(
                a, q, 0.5, 2, settings.ndocs, 10, capacity, plaid._ACCELERATOR, None, ok
            ),
            *(arrays, queries, shaped(len(arrays.offsets) - 1, dtype=bool)),
        ),
        "plaid of a few documents": (
            lambda a, q, given: plaid._search_batch(
                a, q, 0.5, 1, 1, 16, 64, plaid._ACCELERATOR, None, None, given
            ),
            *(arrays, queries, shaped(64, dtype=I32)),
        ),
        "learned": (search_learned, arrays, queries, vectors),
        "learned in some documents": (
            search_learned,
            *(arrays, queries, vectors, shaped(num_documents, dtype=bool)),
        ),
        "sharded learned": (
            lambda a, first, q, v: sharded._plaid(
                *(a, first, q, 0.0, None, None, None, v),
                mesh=mesh,
                ncells=1,
                ndocs=64,
                k=10,
                capacity=64,
                memory=plaid._ACCELERATOR,
            ),
            *(shards, over(8, dtype=I32), queries, spread),
        ),
        "learned vectors": learned_solver(dim, 512),
        "exact": (
            partial(exact._merge, length=48),
            *(arrays, queries, shaped(64, dtype=I32)),
            *(shaped(count, 16), shaped(count, 16, dtype=I32)),
        ),
        "sharded plaid": (
            sharded_plaid,
            *(shards, over(8, dtype=I32), queries, shaped()),
        ),
        "sharded plaid in some documents": (
            sharded_plaid,
            *(shards, over(8, dtype=I32), queries, shaped(), None),
            over(8 * (len(arrays.offsets) - 1), dtype=bool),
        ),
        "sharded exact": (
            partial(sharded._merge, length=48, mesh=mesh),
            *(shards, over(8, dtype=I32), queries, over(512, dtype=I32)),
            *(over(8 * count, 16), over(8 * count, 16, dtype=I32)),
        ),
        "merged shards": (
            partial(sharded._gather, mesh=mesh),
            *(over(8 * count, 16), over(8 * count, 16, dtype=I32)),
        ),
        "k-means": (
            kmeans._accumulate,
            *(arrays.centroids, shaped(clusters), arrays.centroids, shaped(clusters)),
            shaped(block, dim, dtype=jnp.float16),
            shaped(dtype=I32),
        ),
        "sharded k-means": (
            partial(kmeans._accumulate_sharded, mesh),
            *(arrays.centroids, shaped(clusters), over(8, clusters, dim), over(8, clusters)),
            over(8 * block, dim, dtype=jnp.float16),
            shaped(dtype=I32),
        ),
        "sharded means": (
            partial(kmeans._means, mesh),
            *(over(8, clusters, dim), over(8, clusters)),
        ),
        "compress": (
            partial(codec._compress_block, codec.SCALES),
            *(codec_shapes, shaped(block, dim, dtype=jnp.float16)),
        ),
        "sharded compress": (
            partial(codec._compress_sharded, mesh, codec.SCALES),
            *(codec_shapes, over(8 * block, dim, dtype=jnp.float16)),
        ),
        "decompress": (
            codec.decompress,
            *(codec_shapes, shaped(block, dtype=I32), shaped(block, packed, dtype=jnp.uint8)),
        ),
        "norms": (token_inverse_norms, arrays._replace(inverse_norms=None)),
        "sharded norms": (partial(sharded._norms, mesh=mesh), shards._replace(inverse_norms=None)),
        "image query": image_query(),
        "encoder": encoder(TINY, 8, 48),
        "sharded encoder": encoder(TINY, 8, 48, mesh),
        "training step": training_step(),
        "sharded training step": training_step(mesh),
        "sharded training step of images": image_training_step(mesh),
    }


NAMES = [
    "all pairs",
    "n-way",
    "ragged",
    "plaid",
    "plaid in some documents",
    "plaid of a few documents",
    "learned",
    "learned in some documents",
    "sharded learned",
    "learned vectors",
    "exact",
    "sharded plaid",
    "sharded plaid in some documents",
    "sharded exact",
    "merged shards",
    "k-means",
    "sharded k-means",
    "sharded means",
    "compress",
    "sharded compress",
    "decompress",
    "norms",
    "sharded norms",
    "image query",
    "encoder",
    "sharded encoder",
    "training step",
    "sharded training step",
    "sharded training step of images",
]


def of_index(index):
    """The programs at the sizes of an index."""
    return programs(shapes(DeviceBackend(index.arrays).arrays), shapes(index.codec))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", NAMES)
def test_lowers(index, name, platform):
    function, *arguments = of_index(index)[name]
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
    assert list(of_index(index)) == NAMES


def traced(devices, lowering, mesh):
    """The programs `lowering` for devices of a topology, which need not be there.

    Args:
      devices: at least 8.
      lowering: a function that gives the programs; it sees these as `jax.devices()`.
      mesh: of 8 of them.
    """
    one, everywhere = SingleDeviceSharding(devices[0]), NamedSharding(mesh, PartitionSpec())
    with mock.patch.object(jax, "devices", lambda: list(devices)):
        found = lowering()
    programs = {}
    for name, (function, *arguments) in found.items():
        place = everywhere if "shard" in name else one

        def there(x, place=place):
            return shaped(*x.shape, dtype=x.dtype, place=x.sharding or place)

        programs[name] = jax.jit(function).trace(*jax.tree.map(there, arguments))
    return programs
