"""Models and indexes in other processes: pickled by name, and refused after a fork."""

import multiprocessing
import os
import pickle
import signal
import sys
import warnings

import jax
import numpy as np
import pytest
import support

from colbert_jax import ColBERT, Index, Retriever
from colbert_jax.flmr import FLMRModelForRetrieval, create_searcher, index_custom_collection
from colbert_jax.search import backend

QUERIES = ["what is the capital of france?", "fish"]


def pickled(value):
    """As another process gets it, which has unpickled no model before."""
    data = pickle.dumps(value)
    assert len(data) < 5000
    return pickle.loads(data)


def test_a_model_is_pickled_by_name_with_its_settings(stanford_folder):
    one = jax.devices()[:1]
    model = ColBERT.from_pretrained(
        stanford_folder,
        dtype="float32",
        devices=one,
        doc_maxlen=20,
        query_maxlen=12,
        skiplist_words=("the",),
    )
    again = pickled(model)
    assert again is not model and again.config == model.config
    assert again.devices == one and pickle.dumps(again) == pickle.dumps(model)
    assert again.fingerprint() == model.fingerprint()
    np.testing.assert_array_equal(again.encode_queries(QUERIES), model.encode_queries(QUERIES))
    # A task of a pool that comes with the same model does not load it again.
    assert pickled(model) is pickled(model)
    encode = pickled(model.encode_queries)
    np.testing.assert_array_equal(encode(QUERIES), model.encode_queries(QUERIES))


def test_new_projections_and_quantised_weights_are_made_again(plain_folder):
    for settings in ({"dim": 8, "seed": 3}, {"quantization": "int8"}):
        model = ColBERT.from_pretrained(plain_folder, devices=jax.devices()[:1], **settings)
        again = pickled(model)
        assert again.fingerprint() == model.fingerprint()
        assert (again.quantization, again.dim) == (model.quantization, model.dim)


def test_a_model_that_was_trained_is_not_pickled(stanford_folder):
    model = ColBERT.from_pretrained(stanford_folder, devices=jax.devices()[:1])
    model.set_params(jax.tree.map(lambda x: x + 1, model.params))
    with pytest.raises(pickle.PicklingError, match=r"save_pretrained\(\) it, load and pickle that"):
        pickle.dumps(model)


def test_a_checkpoint_that_changed_is_not_taken_for_the_pickled_one(tmp_path):
    folder = support.write_stanford(tmp_path / "c")
    data = pickle.dumps(ColBERT.from_pretrained(folder, devices=jax.devices()[:1]))
    other = support.write_stanford(tmp_path / "other", seed=7)
    os.replace(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match="another checkpoint than the one that was pickled"):
        pickle.loads(data)


def test_an_index_and_a_retriever_are_pickled_by_name(model, index, tmp_path):
    queries = model.encode_queries(QUERIES)
    again = pickled(index)
    assert again is not index and again.path == index.path
    for a, b in zip(again.search(queries, 5), index.search(queries, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    retriever = Retriever(model, index)
    assert pickled(retriever).search(QUERIES, 3) == retriever.search(QUERIES, 3)

    path = tmp_path / "small.index"
    values = support.unit_rows(np.random.default_rng(0), 60, 16)
    small = Index.build(path, embeddings=values, lengths=[6] * 10, progress=False)
    data = pickle.dumps(small)
    Index.build(path, embeddings=values, lengths=[5] * 12, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="another index than the one that was pickled"):
        pickle.loads(data)


def test_a_sharded_index_is_not_pickled(index, eight_devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(pickle.PicklingError, match="spread over a mesh of devices"):
        pickle.dumps(Index.open(index.path, mesh=mesh))


def test_flmrs_searcher_is_pickled(tmp_path):
    folder = support.write_flmr(tmp_path / "c")
    flmr = FLMRModelForRetrieval.from_pretrained(folder, dtype="float32")
    index_custom_collection(support.passages(20), flmr, tmp_path, doc_maxlen=48)
    searcher = create_searcher(tmp_path)
    assert pickled(searcher).search("fish", 3) == searcher.search("fish", 3)


def test_datasets_hashes_a_function_that_encodes(model):
    hasher = pytest.importorskip("datasets.fingerprint").Hasher
    first, second = (hasher.hash(lambda batch: model.encode_documents(batch)) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_workers_that_are_spawned(model, index):
    """The model and the retriever load in the worker; results are those of this process."""
    retriever = Retriever(model, index)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        encoded = pool.apply_async(model.encode_queries, (QUERIES,)).get(timeout=300)
        hits = pool.apply_async(retriever.search, (QUERIES, 3)).get(timeout=300)
    np.testing.assert_allclose(encoded, model.encode_queries(QUERIES), atol=1e-6)
    ids = [[hit.id for hit in found] for found in hits]
    assert ids == [[hit.id for hit in found] for found in retriever.search(QUERIES, 3)]


# --- After a fork ---------------------------------------------------------------------------


def in_a_fork(work):
    """What `work` returns or raises in a forked process; it may take a minute."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX and Python, that a fork may hang
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            answer = f"returned {work()}"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return answer or "hung"


needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks a process with threads")


@needs_fork
@pytest.mark.parametrize(
    "work",
    [
        lambda model, index: model.encode_queries(QUERIES),
        lambda model, index: model.encode_documents(QUERIES, progress=False),
        lambda model, index: model.rank("fish", QUERIES),
        lambda model, index: Retriever(model, index).search("fish"),
        lambda model, index: ColBERT.from_pretrained(model.load["name_or_path"]),
        lambda model, index: index.document_embeddings(0),
        lambda model, index: backend.DeviceBackend(index.arrays).exact(np.ones((1, 4, 16)), 3),
    ],
)
def test_jax_is_refused_after_a_fork(model, index, work):
    model.encode_queries(QUERIES)
    answer = in_a_fork(lambda: work(model, index))
    assert answer.startswith("RuntimeError: this process was forked after JAX had been used"), (
        answer
    )
    assert 'get_context("spawn")' in answer


@needs_fork
def test_kernels_of_the_cpu_search_after_a_fork(model, index):
    if not isinstance(index.backend, backend.CpuBackend):
        pytest.skip("an accelerator, or no numba")
    queries = model.encode_queries(QUERIES)
    expected = index.search(queries, 3).positions.tolist()
    assert in_a_fork(lambda: index.search(queries, 3).positions.tolist()) == f"returned {expected}"
