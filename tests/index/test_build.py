"""Builds: interrupted anywhere and resumed, replaced, refused."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import unit_rows

from colbert_jax import Index
from colbert_jax.index import build, sources
from colbert_jax.index import format as fmt
from colbert_jax.index.folder import building, building_folder, publish
from colbert_jax.index.inverted import join_inverted_lists, write_inverted_lists

ARRAYS = ("centroids", "codes", "residuals", "offsets", "lists", "list_offsets")


def ready(seed: int = 0, n: int = 60, dim: int = 16):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, n)
    return dict(embeddings=unit_rows(rng, lengths.sum(), dim), lengths=lengths)


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / f"{name}.npy").read_bytes() for name in ARRAYS}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_TOKENS", 64)


def test_arrays_are_consistent(tmp_path):
    data = ready()
    index = Index.build(tmp_path / "i", **data, nbits=2)
    n, t = 60, data["lengths"].sum()
    arrays = index.arrays
    assert len(index) == n and arrays.codes.shape == (t,) and arrays.residuals.shape == (t, 4)
    assert index.lengths.tolist() == data["lengths"].tolist()
    assert arrays.centroids.shape[0] == index.metadata.num_centroids == 256
    owner = np.repeat(np.arange(n), data["lengths"])
    for c in range(index.metadata.num_centroids):
        start, stop = arrays.list_offsets[c], arrays.list_offsets[c + 1]
        expected = np.unique(owner[np.asarray(arrays.codes) == c])
        assert np.asarray(arrays.lists[start:stop]).tolist() == expected.tolist()
    # Centroids survive a conversion to float16, in which Stanford keeps them.
    centroids = np.asarray(arrays.centroids)
    assert (centroids.astype(np.float16).astype(np.float32) == centroids).all()
    near = [
        (index.document_embeddings(i) * data["embeddings"][owner == i]).sum(1) for i in range(n)
    ]
    assert np.concatenate(near).mean() > 0.95
    files = {f.name for f in (tmp_path / "i").iterdir()}
    assert files == {"metadata.json", *(f"{name}.npy" for name in fmt.array_specs(index.metadata))}
    assert not building_folder(tmp_path / "i").exists()


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_tiny_collections(tmp_path, nbits, tokens):
    data = dict(embeddings=unit_rows(np.random.default_rng(0), tokens, 8), lengths=[tokens])
    index = Index.build(tmp_path / "i", **data, nbits=nbits)
    assert index.metadata.num_centroids <= tokens
    hits = index.search(data["embeddings"][None], k=10)
    assert hits.positions.tolist() == [[0]] and hits.scores[0, 0] == pytest.approx(tokens, rel=0.3)


def test_inverted_lists_in_blocks(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 20, 50)
    codes = rng.integers(0, 13, lengths.sum()).astype(np.int32)
    offsets = np.r_[0, np.cumsum(lengths)]
    files = []
    for block in (7, 1 << 20):
        monkeypatch.setattr("colbert_jax.index.inverted._TOKENS", block)
        total = write_inverted_lists(tmp_path, codes, offsets, 15)
        files.append((tmp_path / "lists.npy").read_bytes())
        assert len(np.load(tmp_path / "lists.npy")) == total
    assert files[0] == files[1]


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_joined_inverted_lists(tmp_path, monkeypatch, block):
    """Lists of four ranges of documents, one of them empty, joined: those of all documents."""
    monkeypatch.setattr("colbert_jax.index.inverted._ENTRIES", block)
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 20, 50)
    codes = rng.integers(0, 13, lengths.sum()).astype(np.int32)
    offsets = np.r_[0, np.cumsum(lengths)]
    total = write_inverted_lists(tmp_path, codes, offsets, 15)
    names = ("lists.npy", "list_offsets.npy")
    expected = [np.load(tmp_path / name) for name in names]
    bounds = [0, 20, 20, 33, 50]
    for part in range(4):
        start, stop = bounds[part : part + 2]
        own = offsets[start : stop + 1]
        write_inverted_lists(
            *(tmp_path, codes[own[0] : own[-1]], own - own[0], 15), first=start, suffix=f".{part}"
        )
    assert join_inverted_lists(tmp_path, [f".{part}" for part in range(4)]) == total
    for name, array in zip(names, expected, strict=True):
        np.testing.assert_array_equal(np.load(tmp_path / name), array)


def test_seeded(tmp_path):
    data = ready()
    Index.build(tmp_path / "a", **data)
    Index.build(tmp_path / "b", **data)
    Index.build(tmp_path / "c", **data, seed=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("previous", [False, True], ids=["fresh", "replacing"])
@pytest.mark.slow
def test_killed_at_every_step(tmp_path, monkeypatch, small_chunks, previous):
    """Stop at the nth write, sync or rename: the old index or none, then resume.

    The fresh build is stopped at every odd n, the replacing one at every even n.
    """
    data, path = ready(), tmp_path / "i"
    expected = contents(Index.build(tmp_path / "whole", **data).path)
    old = None
    if previous:
        old = contents(Index.build(tmp_path / "old", **ready(seed=9)).path)
    countdown = [10**9]

    def counted(function):
        def wrapper(*args, **kwargs):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "rename", counted(os.rename))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(fmt.ArrayWriter, "append", counted(fmt.ArrayWriter.append))
    monkeypatch.setattr(build, "train_kmeans", counted(build.train_kmeans))
    for step in range(1 + previous, 1000, 2):
        countdown[0] = 10**9
        shutil.rmtree(path, ignore_errors=True)
        if previous:
            shutil.copytree(tmp_path / "old", path)
        countdown[0] = step
        try:
            Index.build(path, **data, overwrite=True)
        except Killed:
            countdown[0] = 10**9
        else:
            break
        try:
            found = contents(Index.open(path).path)
        except FileNotFoundError:
            found = None
        assert found in (old, expected), step
        assert contents(Index.build(path, **data, overwrite=True).path) == expected, step
        assert not building_folder(path).exists()
    assert step > 60
    assert contents(path) == expected


def test_resume_does_not_encode_again(tmp_path, model, texts, monkeypatch, small_chunks):
    whole = contents(Index.build(tmp_path / "whole", model, texts).path)
    encoded = []
    original = type(model).encode_windows

    def encode_windows(self, windows, bar=None):
        def counted():
            for window in windows:
                encoded.extend(window)
                yield window

        for n, part in enumerate(original(self, counted(), bar)):
            if n == 6:
                raise Killed
            yield part

    monkeypatch.setattr(type(model), "encode_windows", encode_windows)
    with pytest.raises(Killed):
        Index.build(tmp_path / "i", model, iter(texts))
    monkeypatch.setattr(type(model), "encode_windows", original)
    again = []

    def count(self, windows, bar=None):
        def counted():
            for window in windows:
                again.extend(window)
                yield window

        return original(self, counted(), bar)

    monkeypatch.setattr(type(model), "encode_windows", count)
    index = Index.build(tmp_path / "i", model, iter(texts))
    assert contents(index.path) == whole
    assert 0 < len(again) < len(texts) and len(encoded) > 0


def test_another_build_does_not_resume(tmp_path, small_chunks, monkeypatch):
    calls = [0]

    def fail(*args, **kwargs):
        calls[0] += 1
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(build, "train_kmeans", fail)
        Index.build(tmp_path / "i", **ready(0))
    other = ready(1)
    Index.build(tmp_path / "i", **other)
    assert contents(tmp_path / "i") == contents(Index.build(tmp_path / "j", **other).path)


SCRIPT = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
import jax
jax.config.update("jax_platforms", "cpu")
from colbert_jax import Index
from colbert_jax.index import sources
from colbert_jax.runtime import enable_compilation_cache
from support import unit_rows
enable_compilation_cache()
sources.CHUNK_TOKENS = 256
rng = np.random.default_rng(0)
lengths = rng.integers(1, 40, 800)
values = unit_rows(rng, lengths.sum(), 32)
print("ready", flush=True)
Index.build(sys.argv[1], embeddings=values, lengths=lengths, overwrite=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process with SIGKILL")
@pytest.mark.slow
def test_sigkill(tmp_path):
    """A real process killed at random moments, again and again, until it gets through."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    path, delays = tmp_path / "i", random.Random(0)
    for attempt in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if attempt < 5:
            time.sleep(delays.uniform(0, 2.5))
            process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait() == 0:
            break
        with contextlib.suppress(FileNotFoundError):
            Index.open(path).verify()
    index = Index.open(path)
    index.verify()
    assert len(index) == 800 and not building_folder(path).exists()


def test_two_builders_do_not_mix(tmp_path):
    with building(tmp_path / "i", overwrite=False) as folder:
        assert folder == building_folder(tmp_path / "i") and folder.is_dir()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="another process is building or changing"):
                Index.build(tmp_path / "i", **ready())
    Index.build(tmp_path / "i", **ready())
    assert [file.name for file in tmp_path.iterdir()] == ["i"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match=r"has no locks \(no locks available\); make sure"):
        Index.build(tmp_path / "i", **ready())
    assert [file.name for file in tmp_path.iterdir()] == ["i"]


def test_readers_meet_the_old_index_or_the_new_one(tmp_path):
    """Indexes opened over and over while they are replaced: never an error, never a mixture.

    It goes on until every reader has met both kinds often, however slow the machine is.
    """
    path = tmp_path / "i"
    kinds = [Index.build(tmp_path / f"k{n}", **ready(n, n=20 + n)).path for n in (0, 1)]
    shutil.copytree(kinds[0], path)
    done, published, errors = threading.Event(), [0], []
    seen: list[list[tuple[int, int, int]]] = [[], []]

    def read(opened):
        try:
            while not done.is_set():
                before = published[0]
                _, metadata, arrays = fmt.open_arrays(path)
                opened.append((before, metadata.num_documents, len(arrays["offsets"]) - 1))
        except Exception as error:
            errors.append(error)

    def has_seen_enough(opened):
        """Both kinds, at five different states of the index each."""
        met = {(before, claimed) for before, claimed, _ in list(opened)}
        return all(sum(kind == n for _, kind in met) >= 5 for n in (20, 21))

    readers = [threading.Thread(target=read, args=(opened,)) for opened in seen]
    for reader in readers:
        reader.start()
    try:
        while not errors and published[0] < 20_000:
            if published[0] >= 120 and all(map(has_seen_enough, seen)):
                break
            new = shutil.copytree(kinds[(published[0] + 1) % 2], building_folder(path))
            publish(new, path)
            published[0] += 1
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert errors == [] and all(map(has_seen_enough, seen))
    assert all(claimed == found for opened in seen for _, claimed, found in opened)


@pytest.mark.parametrize("damage", ["codes.npy", "metadata.json"])
def test_a_damaged_index_is_not_waited_for(tmp_path, damage):
    """What fails though nobody replaces it fails soon, and in its own words."""
    path = Index.build(tmp_path / "i", **ready()).path
    (path / damage).write_bytes(b"{")
    start = time.monotonic()
    with pytest.raises(fmt.IndexFormatError, match=f"{damage}: damaged"):
        fmt.open_arrays(path)
    assert time.monotonic() - start < 30


def test_opening_waits_as_long_as_the_index_changes(tmp_path, monkeypatch):
    """However often it is replaced in the middle; what counts is that it is another each time."""
    path = tmp_path / "i"
    whole = Index.build(tmp_path / "whole", **ready()).path
    shutil.copytree(whole, path)
    original, left = fmt.open_array, [100]

    def open_array(folder, name, *spec):
        if name == "codes.npy" and left[0]:
            left[0] -= 1
            publish(shutil.copytree(whole, building_folder(path)), path)
        return original(folder, name, *spec)

    monkeypatch.setattr(fmt, "open_array", open_array)
    assert fmt.open_arrays(path)[1].num_documents == 60 and left == [0]


def test_links_and_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    Index.build(".", **ready())
    for _ in range(2):
        Index.build("../link", **ready(1), overwrite=True)
    assert (tmp_path / "link").is_symlink() and len(Index.open(tmp_path / "link")) == 60
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link"}


def test_other_kinds_of_embeddings(tmp_path):
    import ml_dtypes

    from colbert_jax import DocumentEmbeddings

    data = ready()
    documents = DocumentEmbeddings.from_lengths(data["embeddings"], data["lengths"])
    expected = contents(Index.build(tmp_path / "a", **data).path)
    assert contents(Index.build(tmp_path / "b", embeddings=documents).path) == expected
    half = data["embeddings"].astype(ml_dtypes.bfloat16)
    assert len(Index.build(tmp_path / "c", embeddings=half, lengths=data["lengths"])) == 60


def test_a_model_that_returns_nan(tmp_path, model, monkeypatch):
    original = type(model).encode_windows

    def encode_windows(self, windows, bar=None):
        for part in original(self, windows, bar):
            part.values[0] = np.nan
            yield part

    monkeypatch.setattr(type(model), "encode_windows", encode_windows)
    with pytest.raises(ValueError, match="NaN or infinite token embeddings"):
        Index.build(tmp_path / "i", model, ["heat flow"])
    assert not (tmp_path / "i").exists()


X64 = """
import sys, numpy as np, jax
jax.config.update("jax_platforms", "cpu")
from colbert_jax import ColBERT, Index
assert jax.numpy.zeros(1).dtype == np.float64
model = ColBERT.from_pretrained(sys.argv[1])
index = Index.build(sys.argv[2], model, ["heat flow", "the dog", "a river bank"])
queries = model.encode_queries(["heat flow"])
for exact in (False, True):
    assert index.search(queries, k=3, mode="exact" if exact else "accurate").positions[0, 0] == 0
assert model.rank("heat flow", ["the dog", "heat flow"]).positions[0] == 1
"""


@pytest.mark.slow
def test_with_64_bit_types_switched_on(tmp_path, stanford_folder):
    done = subprocess.run(
        [sys.executable, "-c", X64, str(stanford_folder), str(tmp_path / "i")],
        env=os.environ | {"JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_replaced_unasked(tmp_path):
    data = ready()
    Index.build(tmp_path / "i", **data)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        Index.build(tmp_path / "i", **data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    with pytest.raises(FileExistsError, match="is not an index"):
        Index.build(tmp_path / "mine", **data, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def wrong(**changes):
    return ready() | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (wrong(lengths=[3, 4]), "lengths add up to 7 tokens, but embeddings has"),
        (wrong(lengths=[-1, 1]), "whole numbers >= 0"),
        (wrong(lengths=[1.5]), "whole numbers"),
        (wrong(embeddings=np.zeros(5)), r"must be a float array \[tokens, dim\]"),
        (wrong(embeddings=np.ones((4, 8), int)), "must be a float array"),
        (dict(embeddings=np.full((2, 8), np.nan), lengths=[2]), r"row 0 \(document 0\) has length"),
        (dict(embeddings=np.eye(3, 8) * [[1], [1], [2]], lengths=[2, 1]), r"row 2 \(document 1\)"),
        (dict(embeddings=np.zeros((0, 8)), lengths=[0, 0]), "no document has a token"),
        (wrong(nbits=3), "nbits must be one of"),
        (dict(embeddings=np.eye(3, 6), lengths=[3], nbits=1), "do not fill whole bytes"),
        (wrong(ids=["a", "b"]), "2 ids were given for 60 documents"),
        (wrong(ids=["x", *range(57), "x", "y"]), "duplicate document id 'x': documents 1 and 59"),
    ],
)
def test_bad_embeddings(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Index.build(tmp_path / "i", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_bad_documents(tmp_path, model):
    with pytest.raises(TypeError, match=r"document 1 must be a string or a pair .*, got int"):
        Index.build(tmp_path / "i", model, ["a", 1])
    with pytest.raises(ValueError, match="document 2 is not valid Unicode"):
        Index.build(tmp_path / "i", model, ["a", "b", "\ud800"])
    with pytest.raises(TypeError, match="got one string"):
        Index.build(tmp_path / "i", model, "a document")
    with pytest.raises(TypeError, match="not both"):
        Index.build(tmp_path / "i", model, ["a"], **ready())
    with pytest.raises(TypeError, match="not both"):
        Index.build(tmp_path / "i", model)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_keeps_a_build_that_was_under_way(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(build, "train_kmeans", fail)
        Index.build(tmp_path / "i", **ready())
    with pytest.raises(ValueError):
        Index.build(tmp_path / "i", **wrong(lengths=[3]))
    state = json.loads((building_folder(tmp_path / "i") / "build.json").read_text())
    assert state["sample_documents"] == 60


def test_generator_and_ids(tmp_path, model, texts):
    index = Index.build(
        tmp_path / "i", model, (t for t in texts), ids=(f"doc-{n}" for n in range(len(texts)))
    )
    assert index.ids[3] == "doc-3" and index.texts[3] == texts[3]
    assert list(index.texts) == texts
    bare = Index.build(tmp_path / "j", model, texts, ids=range(len(texts)), store_texts=False)
    assert bare.texts is None and bare.ids[7] == "7"
    assert not (tmp_path / "j" / "pids.npy").exists()


def test_float16_and_mapped_embeddings(tmp_path):
    data = ready()
    np.save(tmp_path / "values.npy", data["embeddings"].astype(np.float16))
    mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
    index = Index.build(tmp_path / "i", embeddings=mapped, lengths=data["lengths"])
    other = Index.build(tmp_path / "j", **data)
    # The build rounds to float16 itself, as Stanford's does.
    assert contents(index.path) == contents(other.path)


def test_killed_before_publishing_does_not_start_again(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise Killed

    path = tmp_path / "i"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(build, "publish", fail)
        Index.build(path, **ready())
    with monkeypatch.context() as patch:
        for name in ("encode_sample", "_train", "compress_documents", "_finish"):
            patch.setattr(build, name, fail)
        index = Index.build(path, **ready())
    index.verify()
    assert not (path / "build.json").exists()


def test_other_ids_are_another_build(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(build, "publish", fail)
        Index.build(tmp_path / "i", **ready(), ids=[f"a{n}" for n in range(60)])
    index = Index.build(tmp_path / "i", **ready(), ids=[f"doc{n}" for n in range(60)])
    index.verify()
    assert index.ids[59] == "doc59"


def test_memory_does_not_grow_with_the_collection(tmp_path, monkeypatch):
    """Four times the documents from a generator: peak memory of arrays stays within a half more.

    What grows is about 60 bytes a document and 30 a sampled token, with tiny chunks here.
    """
    import tracemalloc

    from colbert_jax.config import ColBERTConfig
    from colbert_jax.embeddings import DocumentEmbeddings

    class Encoder:
        dim, config = 64, ColBERTConfig()

        def describe(self):
            return {"load": {"name_or_path": "none"}, "fingerprint": "0", "search": {}}

        def encode_windows(self, windows, bar):
            for window in windows:
                rng = np.random.default_rng(len(window))
                yield DocumentEmbeddings.from_lengths(
                    unit_rows(rng, 20 * len(window), 64), [20] * len(window)
                )

    monkeypatch.setattr(sources, "CHUNK_TOKENS", 1 << 12)
    monkeypatch.setattr("colbert_jax.compression.kmeans._BLOCK", 1 << 12)
    monkeypatch.setattr("colbert_jax.index.inverted._TOKENS", 1 << 12)
    monkeypatch.setattr(build, "sample_size_for", lambda n: 500)
    peaks = []
    for n in (2000, 8000):
        documents = (f"document {i} " + "of some length " * 10 for i in range(n))
        tracemalloc.start()
        Index.build(tmp_path / str(n), Encoder(), documents, num_centroids=64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks
