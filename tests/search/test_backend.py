"""Where an index is searched, and that several threads may search it at once."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from support import unit_rows

from colbert_jax import Index
from colbert_jax.search.backend import CpuBackend, DeviceBackend, ShardedBackend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 12, 400)
    values = unit_rows(rng, lengths.sum(), 32)
    path = tmp_path_factory.mktemp("backend") / "i"
    return Index.build(path, embeddings=values, lengths=lengths, num_centroids=64).path


BACKENDS = {"numba": CpuBackend, "xla": DeviceBackend, "mesh": ShardedBackend}


def opened(folder, kind, monkeypatch, devices):
    monkeypatch.setenv("COLBERT_JAX_CPU_KERNELS", "0" if kind == "xla" else "1")
    mesh = None
    if kind == "mesh":
        mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=devices[:4])
    index = Index.open(folder, mesh)
    if kind == "numba" and not isinstance(index.backend, CpuBackend):
        pytest.skip("needs numba, on a CPU")
    assert isinstance(index.backend, BACKENDS[kind])
    return index


def searches():
    """Arguments of several kinds, few, since each is a program of its own for XLA."""
    rng = np.random.default_rng(1)
    for _ in range(3):
        queries = unit_rows(rng, 4, 8, 32)
        yield queries, dict(k=7)
        yield queries[:1], dict(k=300, ncells=1, ndocs=8)  # too few candidates, then wider
        yield queries, dict(k=7, mode="exact")


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.slow
def test_eight_threads_get_the_answers_of_one(folder, kind, monkeypatch, eight_devices):
    wanted = [
        opened(folder, kind, monkeypatch, eight_devices).search(queries, **settings)
        for queries, settings in searches()
    ]
    # Opened anew, so that the threads meet in what the first search prepares.
    index = opened(folder, kind, monkeypatch, eight_devices)
    start, wrong, answered = threading.Barrier(8), [], []

    def work(thread):
        start.wait()
        for turn in range(2):
            work = list(zip(searches(), wanted, strict=True))
            for n in np.random.default_rng([thread, turn]).permutation(len(work)):
                (queries, settings), expected = work[n]
                hits = index.search(queries, **settings)
                same = all((a == b).all() for a, b in zip(hits, expected, strict=True))
                (answered if same else wrong).append((thread, n))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(answered) == 8 * 2 * len(wanted)


def test_too_many_tokens_for_a_device(folder, monkeypatch):
    monkeypatch.setenv("COLBERT_JAX_CPU_KERNELS", "0")
    monkeypatch.setattr("colbert_jax.search.backend._INT32", 100)
    with pytest.raises(NotImplementedError, match=r"i: \d+ tokens; one device holds at most 100"):
        Index.open(folder)


def test_the_device_is_the_meshs(folder, eight_devices):
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=eight_devices[3:4])
    backend = Index.open(folder, mesh).backend
    assert isinstance(backend, DeviceBackend)
    assert backend.arrays.codes.devices() == {eight_devices[3]}
