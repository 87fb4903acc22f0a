"""Meshes of Explicit axes, given or set by the caller: the same results as without."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from plaid_reference import random_index

from colbert_jax import ColBERT, Index
from colbert_jax.compression.codec import ResidualCodec, compress
from colbert_jax.compression.kmeans import train_kmeans
from colbert_jax.compression.sharding import auto_mesh
from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import pair_examples
from colbert_jax.runtime import apart
from colbert_jax.search.backend import choose_backend
from colbert_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("eight_devices")
TYPES = [AxisType.Auto, AxisType.Explicit]


def mesh_of(axis_type, count=8):
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("data",), axis_types=(axis_type,), devices=devices)


@pytest.mark.parametrize("axis_type", TYPES, ids=str)
def test_as_auto(axis_type):
    mesh = mesh_of(axis_type)
    assert auto_mesh(mesh) == mesh_of(AxisType.Auto)


@pytest.mark.parametrize("axis_type", TYPES, ids=str)
def test_apart(axis_type):
    """The caller's mesh is there again afterwards, also after an error."""
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        with apart():
            assert jax.sharding.get_mesh().empty
        with pytest.raises(KeyError), apart():
            raise KeyError
        assert jax.sharding.get_mesh() == mesh
    assert jax.sharding.get_mesh().empty


def test_kmeans_and_compression_on_an_explicit_mesh():
    points = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    one, other = (train_kmeans(points, 4, iterations=1, mesh=mesh_of(kind)) for kind in TYPES)
    np.testing.assert_array_equal(other, one)
    codec = ResidualCodec(*map(jnp.asarray, (one, np.zeros(1, np.float32), [-0.1, 0.1])))
    one, other = (compress(codec, points, mesh_of(kind)) for kind in TYPES)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_building_and_searching_on_an_explicit_mesh(tmp_path):
    values = np.random.default_rng(1).normal(size=(48, 8)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    found = []
    for kind in TYPES:
        path, mesh = tmp_path / kind.name, mesh_of(kind)
        Index.build(path, embeddings=values, lengths=[3] * 16, mesh=mesh)
        found.append(Index.open(path, mesh=mesh).search(values[None, :3], k=4, mode="exact"))
    assert found[0].positions[0, 0] == 0
    np.testing.assert_array_equal(found[1].positions, found[0].positions)
    np.testing.assert_array_equal(found[1].scores, found[0].scores)


@pytest.mark.parametrize("axis_type", TYPES, ids=str)
def test_encoding_and_search_where_a_mesh_is_set(model, index, monkeypatch, axis_type):
    """On one device, and a build with k-means on it."""
    monkeypatch.setenv("COLBERT_JAX_CPU_KERNELS", "0")
    arrays, _ = random_index(np.random.default_rng(2))
    texts = ["running cats", "the heat of the sun"]

    def results():
        queries = model.encode_queries(texts)
        backend = choose_backend(arrays)
        random = np.asarray(arrays.centroids[None, :8], np.float32)
        yield from (queries, model.encode_documents(texts).values)
        yield from backend.exact(random, 5)
        yield from model.rank(texts[0], texts, k=2)
        yield np.frombuffer(model.fingerprint().encode(), np.uint8)
        yield index.document_embeddings(0)
        yield train_kmeans(queries.reshape(-1, queries.shape[-1]), 2, iterations=1)

    expected = list(results())
    with jax.set_mesh(mesh_of(axis_type)):
        found = list(results())
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", TYPES, ids=str)
def test_training_where_a_mesh_is_set(shallow_folder, tmp_path, axis_type):
    file = tmp_path / "triples.tsv"
    file.write_text("".join(f"query {i}\tdocument {i}\tbook {i}\n" for i in range(4)))
    config = TrainingConfig(
        loss="cross-entropy", nway=2, bsize=2, lr=1e-3, warmup=0, maxsteps=1, log_every=1
    )
    model = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=jax.devices()[:1])
    with jax.set_mesh(mesh_of(axis_type)):
        train(model, pair_examples(file), tmp_path / "run", config, devices=jax.devices()[:2])
    assert (tmp_path / "run" / "last").is_dir()


def test_a_caller_keeps_its_arrays_where_they_are():
    """Encoding under a set mesh neither moves a caller's arrays nor its mesh."""
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        own = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
        with apart():
            pass
        assert (own + 1).sharding.spec == P("data")


def test_other_threads_have_no_mesh():
    """Why `apart` is entered where programs run: JAX sets a mesh for one thread."""
    seen = []
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        thread = threading.Thread(target=lambda: seen.append(jax.sharding.get_mesh().empty))
        thread.start()
        thread.join()
    assert seen == [True]
