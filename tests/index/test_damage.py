"""Values out of range in files of the right size: every way to search names the file."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from support import unit_rows

from colbert_jax import Index
from colbert_jax.index.format import IndexFormatError, verify
from colbert_jax.search.backend import CpuBackend

N, K, DIM = 200, 32, 16
WAYS = ["numba", "xla", "mesh"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, N)
    lengths[7] = 300  # longer than a kernel's block
    data = dict(embeddings=unit_rows(rng, lengths.sum(), DIM), lengths=lengths)
    documents = [f"text {i} ä" for i in range(N)]
    path = tmp_path_factory.mktemp("damage") / "i"
    index = Index.build(path, **data, ids=documents, num_centroids=K, kmeans_niters=2)
    return index.path


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "bad")


def queries():
    return unit_rows(np.random.default_rng(1), 2, 8, DIM)


def opened(folder, way, monkeypatch):
    monkeypatch.setenv("COLBERT_JAX_CPU_KERNELS", "0" if way == "xla" else "1")
    mesh = None
    if way == "mesh":
        if len(jax.devices()) < 2:
            pytest.skip("needs 2 devices")
        mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    index = Index.open(folder, mesh)
    if way == "numba" and not isinstance(index.backend, CpuBackend):
        pytest.skip("needs numba, on a CPU")
    return index


def change(folder, name, value, places=slice(None)):
    array = np.load(folder / f"{name}.npy")
    array[places] = value
    np.save(folder / f"{name}.npy", array)


OUT_OF_RANGE = [
    *(("codes", value) for value in (-1, K, 2**31 - 1, -(2**31))),
    *(("lists", value) for value in (-1, N, N + 100, 10**6, 2**31 - 1, -(2**31))),
    ("centroids", np.nan),
    ("centroids", -np.inf),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_values_out_of_range(copy, way, name, value, monkeypatch):
    change(copy, name, value)
    with pytest.raises(IndexFormatError, match=rf"bad/{name}\.npy: damaged: holds .*again"):
        opened(copy, way, monkeypatch).search(queries(), k=5)


@pytest.mark.parametrize("way", WAYS)
def test_one_code_in_a_long_document(copy, way, monkeypatch):
    place = int(np.load(copy / "offsets.npy")[7]) + 270
    change(copy, "codes", K, place)
    with pytest.raises(IndexFormatError, match=r"codes\.npy: damaged: holds a code outside 0..31"):
        opened(copy, way, monkeypatch).search(queries(), k=5, mode="exact")


def test_damage_that_a_search_does_not_meet(whole, copy, monkeypatch):
    """Mapped arrays are not read for it: other queries are answered, and right."""
    query = queries()[:1]
    hits = opened(whole, "numba", monkeypatch).search(query, k=5, ncells=1)
    offsets = np.load(copy / "offsets.npy")
    lists, starts = np.load(copy / "lists.npy"), np.load(copy / "list_offsets.npy")
    probed = (query[0] @ np.load(copy / "centroids.npy").T).argmax(axis=1)
    met = np.concatenate([lists[starts[c] : starts[c + 1]] for c in probed])
    far = next(d for d in np.flatnonzero(np.diff(offsets)) if d not in met)
    change(copy, "codes", -5, offsets[far])
    index = opened(copy, "numba", monkeypatch)
    for _ in range(2):
        again = index.search(query, k=5, ncells=1)
        np.testing.assert_array_equal(again.positions, hits.positions)
        np.testing.assert_array_equal(again.scores, hits.scores)
        with pytest.raises(IndexFormatError, match=r"codes\.npy"):
            index.search(query, k=5, mode="exact")


def test_nothing_of_a_failed_search_stays(whole, copy, monkeypatch):
    """The marks of documents are shared by all searches of a thread."""
    hits = opened(whole, "numba", monkeypatch).search(queries()[:1], k=5)
    change(copy, "lists", -1, slice(None, None, 5))
    for _ in range(2):
        with pytest.raises(IndexFormatError, match=r"lists\.npy"):
            opened(copy, "numba", monkeypatch).search(queries()[:1], k=5)
    again = opened(whole, "numba", monkeypatch).search(queries()[:1], k=5)
    np.testing.assert_array_equal(again.positions, hits.positions)


def test_a_document_of_damaged_codes(copy):
    change(copy, "codes", K)
    with pytest.raises(IndexFormatError, match=r"codes\.npy: damaged: holds a code"):
        Index.open(copy).document_embeddings(7)


@pytest.mark.parametrize("name", ["offsets", "list_offsets"])
@pytest.mark.parametrize(
    "values", [[2**63 - 1, -2], [-1, 0], [10**12, 0]], ids=["overflow", "negative", "large"]
)
def test_offsets_out_of_range(copy, name, values):
    """Wrapped differences would all be positive in the first case."""
    change(copy, name, values, slice(1, 3))
    with pytest.raises(IndexFormatError, match=rf"{name}\.npy: damaged: not ascending"):
        Index.open(copy)


@pytest.mark.parametrize("value", [-1, 10**12, 2**63 - 1, 0])
def test_offsets_of_ids(copy, value):
    change(copy, "pid_offsets", value, 5)
    index = Index.open(copy)
    for use in (lambda: list(index.ids), lambda: index.position("text 5 ä")):
        with pytest.raises(IndexFormatError, match=r"pid_offsets\.npy: damaged: its offsets do"):
            use()


def test_ids_that_are_not_utf8(copy):
    change(copy, "pids", 0xFF, 3)
    with pytest.raises(IndexFormatError, match=r"pids\.npy: damaged: string 0 is not UTF-8"):
        Index.open(copy).ids[0]


@pytest.mark.parametrize("name", ["bucket_cutoffs", "bucket_weights"])
def test_buckets_that_are_no_numbers(copy, name):
    change(copy, name, np.nan, 1)
    with pytest.raises(IndexFormatError, match=rf"{name}\.npy: damaged: holds NaN"):
        Index.open(copy)


def test_search_in_damaged_ids(copy):
    """As for white space before a run file is written."""
    change(copy, "pids", 0xFF, 3)
    with pytest.raises(IndexFormatError, match=r"pids\.npy: damaged: string 0 is not UTF-8"):
        Index.open(copy).ids.find(re.compile("x"))
    change(copy, "pid_offsets", 10**12, 5)
    with pytest.raises(IndexFormatError, match=r"pid_offsets\.npy: damaged: its offsets do"):
        Index.open(copy).ids.find(re.compile("x"))


@pytest.mark.parametrize("value", [1e38, -1e30])
def test_weights_whose_squares_overflow(copy, value):
    """All scores would be minus infinity, or NaN."""
    change(copy, "bucket_weights", value, 1)
    with pytest.raises(IndexFormatError, match=r"bucket_weights\.npy: damaged: holds .* too large"):
        Index.open(copy)


def test_a_circle_of_links_is_named_with_its_folder(copy):
    (copy / "codes.npy").unlink()
    (copy / "codes.npy").symlink_to("codes.npy")
    for use in (Index.open, verify):
        with pytest.raises(OSError, match=re.escape(str(copy / "codes.npy"))):
            use(copy)


@pytest.mark.parametrize(
    "change_it", [{"settings": {}}, {"build": "x"}, {"num_empty_documents": 1}]
)
def test_verify_finds_changed_metadata(copy, change_it):
    """What opening cannot tell: other settings of search would give other answers."""
    verify(copy)
    file = copy / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    verify(copy)  # the same in another form
    file.write_text(json.dumps(json.loads(file.read_text()) | change_it))
    with pytest.raises(IndexFormatError, match=r"metadata\.json: damaged: its checksum differs"):
        verify(copy)
