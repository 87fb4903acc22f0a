"""Indexes of Stanford ColBERT and fast-plaid, against what those libraries wrote and answered."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import support

from colbert_jax import ColBERT, Index, Retriever
from colbert_jax.cli import main
from colbert_jax.index.layouts import convert, stored
from colbert_jax.index.layouts.convert import convert_index, detect_index
from colbert_jax.tensors.stored import Stored
from colbert_jax.tensors.torch_file import Streamed, read_torch_file, write_torch_file

GOLDEN = Path(__file__).parents[2] / "golden"
STANFORD = GOLDEN / "stanford_index"
FASTPLAID = GOLDEN / "fastplaid_index"
BUILT = STANFORD / "built"


@pytest.fixture
def copy(tmp_path):
    """A copy of the index that colbert-ai built, to be changed."""
    return shutil.copytree(BUILT, tmp_path / "source")


def opened(source: Path, folder: Path, **arguments) -> Index:
    convert_index(source, folder, "native", **arguments)
    index = Index.open(folder)
    index.verify()
    return index


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {file.stem: np.load(file) for file in sorted(folder.glob("*.npy"))}


def tensors(folder: Path) -> dict[str, list[np.ndarray]]:
    """Every torch file's tensors."""
    found = {}
    for file in sorted(folder.glob("*.pt")):
        value = read_torch_file(file)
        found[file.name] = [t.read() for t in (value if isinstance(value, tuple) else (value,))]
    return found


def tensor(file: Path, place: int = 0) -> np.ndarray:
    return tensors(file.parent)[file.name][place]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        pair = (found[name], expected[name])
        for a, b in zip(*pair, strict=True) if isinstance(pair[1], list) else [pair]:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            np.testing.assert_array_equal(a, b, err_msg=name)


def edit(file: Path, change) -> None:
    """Change a JSON object in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def documents(index: Index) -> list[np.ndarray]:
    """Every document decompressed: b bits a dimension, the lowest first, from each byte's top."""
    codes, residuals = np.asarray(index.arrays.codes), np.asarray(index.arrays.residuals)
    bits = np.unpackbits(residuals, axis=1).reshape(len(codes), index.dim, index.nbits)
    buckets = (bits.astype(int) << np.arange(index.nbits)).sum(axis=2)
    weights, centroids = (
        np.asarray(getattr(index.arrays, n)) for n in ("bucket_weights", "centroids")
    )
    values = centroids[codes] + weights[buckets]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return np.split(values, np.cumsum(index.lengths)[:-1])


def maxsim(index: Index, query: np.ndarray) -> np.ndarray:
    """float32[N]; minus infinity without a token."""
    scores = ((d @ query.T).max(axis=0).sum() if len(d) else -np.inf for d in documents(index))
    return np.array(list(scores))


def inverted(index: Index) -> list[np.ndarray]:
    return np.split(np.asarray(index.arrays.lists), np.asarray(index.arrays.list_offsets)[1:-1])


# --- Stanford ColBERT's into ours -----------------------------------------------------------


@pytest.mark.parametrize("name", ["built", "updated"])
def test_stanford_candidates_and_scores(tmp_path, name):
    """`updated` has two removed documents, five added ones, and tensors saved as views."""
    answers = np.load(STANFORD / name / "answers.npz")
    index = opened(STANFORD / name, tmp_path / "ours")
    removed = [3, 40] if name == "updated" else []
    assert np.flatnonzero(index.lengths == 0).tolist() == removed
    lists, centroids = inverted(index), np.asarray(index.arrays.centroids)
    scores = [maxsim(index, query) for query in answers["queries"]]
    for s, setting in enumerate(answers["settings"]):
        counts = (answers[f"s{s}_pids"] >= 0).sum(axis=1)
        for b, query in enumerate(answers["queries"]):
            probes = np.argsort(-(centroids @ query.T), axis=0)[: int(setting[0])]
            candidates = np.unique(np.concatenate([lists[c] for c in np.unique(probes)]))
            assert candidates.tolist() == np.flatnonzero(answers[f"s{s}_candidates"][b]).tolist()
            pids = answers[f"s{s}_pids"][b, : counts[b]]
            expected = answers[f"s{s}_scores"][b, : counts[b]]
            np.testing.assert_allclose(scores[b][pids], expected, rtol=1e-4)
    k, (ncells, threshold, ndocs) = 12, answers["settings"][1]
    hits = index.search(
        answers["queries"],
        k,
        ncells=int(ncells),
        centroid_score_threshold=float(threshold),
        ndocs=int(ndocs),
    )
    np.testing.assert_array_equal(hits.positions, answers["s1_pids"][:, :k])
    np.testing.assert_allclose(hits.scores, answers["s1_scores"][:, :k], rtol=1e-4)


def test_stanford_arrays_are_copied(tmp_path):
    index = opened(BUILT, tmp_path / "ours")
    ours, theirs = arrays(index.path), tensors(BUILT)
    np.testing.assert_array_equal(
        ours["codes"], np.concatenate([theirs["0.codes.pt"][0], theirs["1.codes.pt"][0]])
    )
    np.testing.assert_array_equal(
        ours["residuals"],
        np.concatenate([theirs["0.residuals.pt"][0], theirs["1.residuals.pt"][0]]),
    )
    np.testing.assert_array_equal(ours["centroids"], theirs["centroids.pt"][0])
    lists, lengths = theirs["ivf.pid.pt"]
    assert len(lists) > lengths.sum()  # there is padding to be left out
    np.testing.assert_array_equal(ours["lists"], lists[: lengths.sum()])
    np.testing.assert_array_equal(np.diff(ours["list_offsets"]), lengths)
    assert index.metadata.model is None
    assert index.metadata.origin["config"]["doc_maxlen"] == 48


def with_cuda_tags(folder):
    """Location "cuda:0" in place of "cpu" in every pickle, as indexes made on a GPU have it."""
    for file in folder.glob("*.pt"):
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                if name.endswith("data.pkl"):
                    assert b"X\x03\x00\x00\x00cpu" in data
                    data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
                archive.writestr(name, data)


def with_half_weights(folder):
    cutoffs, weights = tensors(folder)["buckets.pt"]
    write_torch_file(folder / "buckets.pt", (cutoffs, weights.astype(np.float16)))


def with_legacy_lists(folder):
    """Of embeddings instead of documents, as before `ivf.pid.pt`."""
    codes = np.concatenate([tensor(folder / f"{i}.codes.pt") for i in range(2)])
    order, sizes = np.argsort(codes, kind="stable"), np.bincount(codes, minlength=512)
    write_torch_file(folder / "ivf.pt", (order, sizes))
    (folder / "ivf.pid.pt").unlink()


def with_tight_lists(folder):
    lists, lengths = tensors(folder)["ivf.pid.pt"]
    value = (lists[: lengths.sum()].astype(np.int64), lengths.astype(np.int32))
    write_torch_file(folder / "ivf.pid.pt", value)


def with_spare_rows(folder):
    for name in ("1.codes.pt", "1.residuals.pt"):
        value = tensor(folder / name)
        spare = np.full((512, *value.shape[1:]), 255, value.dtype)
        write_torch_file(folder / name, np.concatenate([value, spare]))


def with_vector_average(folder):
    write_torch_file(folder / "avg_residual.pt", tensor(folder / "avg_residual.pt").reshape(1))


def without_offsets(folder):
    for i in range(2):
        edit(folder / f"{i}.metadata.json", lambda fields: fields.pop("embedding_offset"))


def without_extras(folder):
    for name in ("avg_residual.pt", "plan.json", "answers.npz"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    "change",
    [
        with_cuda_tags,
        with_half_weights,
        with_legacy_lists,
        with_tight_lists,
        with_spare_rows,
        with_vector_average,
        without_offsets,
        without_extras,
    ],
)
def test_stanford_variants(tmp_path, copy, change):
    convert_index(BUILT, tmp_path / "plain")
    change(copy)
    convert_index(copy, tmp_path / "other")
    expected = arrays(tmp_path / "plain")
    if change is with_half_weights:
        expected["bucket_weights"] = expected["bucket_weights"].astype(np.float16).astype("f4")
    assert_equal(arrays(tmp_path / "other"), expected)


@pytest.mark.parametrize("source", [BUILT, FASTPLAID / "merged", FASTPLAID / "compressed"])
@pytest.mark.parametrize("to", ["native", "stanford"])
def test_blocks_change_nothing(tmp_path, monkeypatch, source, to):
    """The size of a block in memory shows nowhere in the files; 7 cuts documents and lists."""
    if source == BUILT and to == "stanford":
        convert_index(source, tmp_path / "ours")
        source = tmp_path / "ours"
    convert_index(source, tmp_path / "whole", to, chunk_documents=11)
    monkeypatch.setattr(stored, "BLOCK", 7)
    convert_index(source, tmp_path / "blocks", to, chunk_documents=11)
    read = arrays if to == "native" else tensors
    assert_equal(read(tmp_path / "blocks"), read(tmp_path / "whole"))


# --- Damage ---------------------------------------------------------------------------------


def rewrite(name, change, place=0):
    """A change to one tensor of a torch file."""

    def apply(folder):
        values = tensors(folder)[name]
        values[place] = change(values[place].copy())
        write_torch_file(folder / name, values[0] if len(values) == 1 else tuple(values))

    return apply


def put(at, value):
    def change(array):
        array[at] = value
        return array

    return change


def settings(**values):
    return lambda folder: edit(folder / "metadata.json", lambda m: m.update(values))


def config(**values):
    return lambda folder: edit(folder / "metadata.json", lambda m: m["config"].update(values))


def chunk(**values):
    return lambda folder: edit(folder / "1.metadata.json", lambda m: m.update(values))


def lengths(change):
    return lambda folder: edit(folder / "doclens.0.json", change)


def truncated(name):
    def apply(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])

    return apply


STANFORD_DAMAGE = {
    **{
        f"{name} missing": (lambda folder, name=name: (folder / name).unlink(), name)
        for name in (
            "metadata.json",
            "centroids.pt",
            "buckets.pt",
            "0.codes.pt",
            "1.residuals.pt",
            "doclens.1.json",
            "0.metadata.json",
            "ivf.pid.pt",
        )
    },
    **{
        f"{name} truncated": (truncated(name), name)
        for name in (
            "metadata.json",
            "centroids.pt",
            "buckets.pt",
            "avg_residual.pt",
            "0.codes.pt",
            "1.residuals.pt",
            "doclens.1.json",
            "0.metadata.json",
            "ivf.pid.pt",
        )
    },
    "more chunks": (settings(num_chunks=3), "doclens.2.json"),
    "fewer chunks": (settings(num_chunks=1), "ivf.pid.pt"),
    "chunks in words": (settings(num_chunks="2"), "metadata.json.*num_chunks"),
    "no config": (settings(config=None), "metadata.json.*config"),
    "other partitions": (settings(num_partitions=256), "centroids.pt.*num_partitions 256"),
    "other dim": (config(dim=32), "centroids.pt.*dim 32"),
    "other nbits": (config(nbits=4), "buckets.pt.*nbits 4"),
    "odd nbits": (config(nbits=3), "metadata.json.*nbits"),
    "huge nbits": (config(nbits=10**10), "metadata.json.*nbits must be one of"),
    "huge dim": (config(dim=10**30), "centroids.pt.*dim 10000"),
    "huge num_chunks": (settings(num_chunks=10**15), "doclens.2.json"),
    "huge length": (lengths(lambda values: values.__setitem__(0, 10**30)), "doclens.0.json"),
    "huge lengths of lists": (
        rewrite("ivf.pid.pt", lambda a: np.full(len(a), 2**62, np.int64), 1),
        "ivf.pid.pt.*512 lists",
    ),
    "a centroid beyond float16": (
        rewrite("centroids.pt", lambda a: put((3, 4), 1e30)(a.astype("f4"))),
        "centroids.pt.*infinite",
    ),
    "no dim": (config(dim=None), r"metadata.json.*config\.dim"),
    "nan centroid": (rewrite("centroids.pt", put((3, 4), np.nan)), "centroids.pt.*NaN"),
    "whole centroids": (rewrite("centroids.pt", lambda a: a.astype("i4")), "centroids.pt.*int32"),
    "nan weight": (rewrite("buckets.pt", put(0, np.nan), 1), "buckets.pt.*weights.*NaN"),
    "fewer cutoffs": (rewrite("buckets.pt", lambda a: a[1:]), "buckets.pt.*cutoffs.*shape"),
    "cutoffs fall": (rewrite("buckets.pt", lambda a: a[::-1].copy()), "buckets.pt.*ascend"),
    "one bucket tensor": (
        lambda folder: write_torch_file(folder / "buckets.pt", np.zeros(3, "f4")),
        "buckets.pt: expected a tuple of 2",
    ),
    "no tensor": (
        lambda folder: write_torch_file(folder / "0.codes.pt", {"codes": 1}),
        "0.codes.pt: expected one tensor",
    ),
    "code too large": (rewrite("1.codes.pt", put(5, 512)), "1.codes.pt.*token 5 has code 512"),
    "code negative": (rewrite("0.codes.pt", put(9, -1)), "0.codes.pt.*token 9 has code -1"),
    "codes in floats": (rewrite("0.codes.pt", lambda a: a.astype("f4")), "0.codes.pt.*float32"),
    "fewer codes": (rewrite("0.codes.pt", lambda a: a[:-1]), "0.codes.pt.*593.*add up to 594"),
    "narrow residuals": (rewrite("0.residuals.pt", lambda a: a[:, 1:]), r"0.residuals.pt.*594, 4"),
    "spare rows inside": (
        rewrite("0.residuals.pt", lambda a: np.concatenate([a, a[:5]])),
        "0.residuals.pt.*599.*add up to 594",
    ),
    "length negative": (lengths(lambda values: values.__setitem__(0, -1)), "doclens.0.json"),
    "length in words": (lengths(lambda values: values.__setitem__(0, "9")), "doclens.0.json"),
    "one length more": (lengths(lambda values: values.append(2)), "0.metadata.json.*30 passages"),
    "a longer document": (
        lengths(lambda values: values.__setitem__(0, values[0] + 1)),
        "0.codes.pt.*594.*add up to 595",
    ),
    "other offset": (chunk(passage_offset=31), "1.metadata.json.*from 31"),
    "other passages": (chunk(num_passages=31), "1.metadata.json.*31 passages"),
    "lists too short": (rewrite("ivf.pid.pt", lambda a: a[:1000]), "ivf.pid.pt.*1000"),
    "document too large": (rewrite("ivf.pid.pt", put(0, 60)), "ivf.pid.pt.*list of centroid 0"),
    "document twice": (
        lambda folder: rewrite("ivf.pid.pt", double_entry(tensors(folder)["ivf.pid.pt"][1]))(
            folder
        ),
        "ivf.pid.pt.*ascending",
    ),
    "lengths of other K": (rewrite("ivf.pid.pt", lambda a: a[1:], 1), "ivf.pid.pt.*512 lists"),
    "lengths negative": (rewrite("ivf.pid.pt", put(0, -1), 1), "ivf.pid.pt.*512 lists"),
}


def in_place_of(name, kind):
    """Not a file but a folder, or a pipe that nobody writes into."""

    def change(folder):
        (folder / name).unlink()
        (os.mkfifo if kind == "pipe" else os.mkdir)(folder / name)

    return change


NO_FILES = [(n, k) for n in ("0.codes.pt", "doclens.1.json") for k in ("pipe", "folder")]
STANFORD_DAMAGE |= {
    f"{name} a {kind}": (in_place_of(name, kind), f"{name}: a {kind} .*in place of a file")
    for name, kind in NO_FILES
}


def double_entry(sizes):
    """The same document twice in the first list that has two."""
    first = int(np.flatnonzero(sizes > 1)[0])
    at = int(sizes[:first].sum())
    return lambda lists: put(at + 1, lists[at])(lists)


@pytest.mark.parametrize("name", STANFORD_DAMAGE)
def test_stanford_damage_is_named(tmp_path, copy, name):
    change, message = STANFORD_DAMAGE[name]
    change(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_index(copy, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_no_pickle_is_run(tmp_path, copy):
    """A file that would call something is refused by the name of what it calls."""
    file, evil = copy / "avg_residual.pt", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", evil)
    with pytest.raises(ValueError, match=r"avg_residual.pt.*os\.system"):
        convert_index(copy, tmp_path / "ours")


def test_a_failure_leaves_the_old_index(tmp_path, copy):
    place = tmp_path / "ours"
    build = opened(BUILT, place).metadata.build
    rewrite("1.codes.pt", put(500, 9999))(copy)  # seen in the middle of copying
    with pytest.raises(FileExistsError, match="an index is there"):
        convert_index(copy, place)
    with pytest.raises(ValueError, match="9999"):
        convert_index(copy, place, overwrite=True)
    assert Index.open(place).metadata.build == build
    convert_index(STANFORD / "updated", place, overwrite=True)
    assert len(Index.open(place)) == 65
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


def test_refusals(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match="no index there"):
        convert_index(tmp_path, tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match="no index there"):
        convert_index(tmp_path / "nothing", tmp_path / "ours")
    with pytest.raises(ValueError, match="already in the stanford layout"):
        convert_index(copy, tmp_path / "ours", "stanford")
    with pytest.raises(ValueError, match="native, stanford"):
        convert_index(copy, tmp_path / "ours", "fast-plaid")
    for folder in (copy, tmp_path):
        with pytest.raises(ValueError, match="holds the source"):
            convert_index(copy, folder, overwrite=True)
    with pytest.raises(FileExistsError, match="not an index"):
        convert_index(BUILT, copy / "..", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not an index"):
        convert_index(copy, tmp_path / "file")
    for i in range(2):
        for name, row in (("codes", (0,)), ("residuals", (0, 4))):
            old = tensor(copy / f"{i}.{name}.pt")
            write_torch_file(copy / f"{i}.{name}.pt", np.zeros(row, old.dtype))
        (copy / f"doclens.{i}.json").write_text(json.dumps([0] * 30))
    with pytest.raises(ValueError, match="no document has a token"):
        convert_index(copy, tmp_path / "ours")


# --- Ours into Stanford ColBERT's -----------------------------------------------------------


@pytest.mark.parametrize("name", ["built", "updated"])
def test_there_and_back(tmp_path, name):
    source, back = STANFORD / name, tmp_path / "back"
    convert_index(source, tmp_path / "ours")
    read = convert_index(tmp_path / "ours", back, "stanford", chunk_documents=30)
    assert (read.layout, detect_index(back)) == ("native", "stanford")
    expected, found = tensors(source), tensors(back)
    if name == "updated":  # the padding was taken out by make_indexes.py, for the updater's sake
        lists = found["ivf.pid.pt"]
        assert not lists[0][lists[1].sum() :].any()
        lists[0] = lists[0][: lists[1].sum()]
    assert_equal(found, expected)
    for file in source.glob("*.json"):
        ours, theirs = json.loads((back / file.name).read_text()), json.loads(file.read_text())
        if name == "built" and file.name != "plan.json":
            assert ours == theirs, file.name
        if file.name == "plan.json":
            assert ours.keys() == theirs.keys()
    again = tmp_path / "again"
    convert_index(back, again)
    assert_equal(arrays(again), arrays(tmp_path / "ours"))


def test_torch_reads_what_is_written(tmp_path, index):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "stanford"
    convert_index(index.path, folder, "stanford", chunk_documents=50)
    lengths = [json.loads((folder / f"doclens.{i}.json").read_text()) for i in range(3)]
    assert [len(chunk) for chunk in lengths] == [50, 50, 20]
    assert np.concatenate(lengths).tolist() == index.lengths.tolist()

    def load(name):
        return torch.load(folder / name, weights_only=True)

    assert load("avg_residual.pt").shape == ()
    assert load("centroids.pt").dtype == torch.float16
    assert_array = np.testing.assert_array_equal
    assert_array(load("centroids.pt").float().numpy(), index.arrays.centroids)
    for name, dtype in (("codes", torch.int32), ("residuals", torch.uint8)):
        parts = [load(f"{i}.{name}.pt") for i in range(3)]
        assert {part.dtype for part in parts} == {dtype}
        assert_array(torch.cat(parts).numpy(), getattr(index.arrays, name))
    lists, sizes = load("ivf.pid.pt")
    assert (lists.dtype, sizes.dtype) == (torch.int32, torch.int64)
    assert_array(lists[: sizes.sum()].numpy(), index.arrays.lists)
    # The library reads every list with the length of a longer one.
    starts = torch.cumsum(sizes, 0) - sizes
    assert starts[-1] + sizes.max() <= len(lists)
    fields = json.loads((folder / "metadata.json").read_text())
    assert fields["num_embeddings"] == len(index.arrays.codes)
    assert fields["config"]["checkpoint"] == index.metadata.model["load"]["name_or_path"]


def test_texts_and_ids_go_along(tmp_path, model):
    texts = ["one passage", "a\ttab and\na line", "", "the last"]
    ids = ["a", "b", "c", "d"]
    Index.build(tmp_path / "ours", model, texts, ids=ids, progress=False)
    convert_index(tmp_path / "ours", tmp_path / "theirs", "stanford")
    file = tmp_path / "theirs" / "collection.tsv"
    assert file.read_text().split("\n") == [
        "0\tone passage",
        "1\ta tab and a line",
        "2\t",
        "3\tthe last",
        "",
    ]
    fields = json.loads((tmp_path / "theirs" / "metadata.json").read_text())
    assert fields["config"]["collection"] == str(file)
    lines = (tmp_path / "theirs" / "pids.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ids


def test_fields_go_along(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_FIELDS", 2)
    fields = [{"day": datetime.date(2026, 1, 31), "tags": ["é", "b"]}, None, {"year": 7}]
    rows = support.unit_rows(np.random.default_rng(0), 6, 8)
    Index.build(
        tmp_path / "ours", embeddings=rows, lengths=[2, 2, 2], fields=fields, num_centroids=2
    ).delete(["1"]).compact()
    convert_index(tmp_path / "ours", tmp_path / "theirs", "stanford")
    lines = (tmp_path / "theirs" / "fields.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"day": "2026-01-31", "tags": ["é", "b"]},
        {"year": 7},
    ]


def test_dimensions_that_stanford_cannot_say(tmp_path):
    rng = np.random.default_rng(0)
    Index.build(
        tmp_path / "ours", embeddings=support.unit_rows(rng, 40, 12), lengths=[20, 20], nbits=2
    )
    with pytest.raises(ValueError, match=r"12 dimensions.*multiples of 8"):
        convert_index(tmp_path / "ours", tmp_path / "theirs", "stanford")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_streamed_tensor_of_another_size(tmp_path):
    blocks = [np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)]
    file = tmp_path / "value.pt"
    write_torch_file(file, Streamed(np.dtype(np.int32), (5, 1), lambda: iter(blocks)))
    stored = read_torch_file(file)
    assert isinstance(stored, Stored)
    assert stored.read().ravel().tolist() == [0, 1, 2, 0, 1]
    assert stored.rows(1, 4).read().ravel().tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="got 5 elements"):
        write_torch_file(file, Streamed(np.dtype(np.int32), (6,), lambda: iter(blocks)))
    assert read_torch_file(file).shape == (5, 1)


# --- fast-plaid's into ours -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["merged", "sharded", "compressed"])
def test_fastplaid(tmp_path, name):
    """Documents were added and deleted; `compressed` was made without inverted lists."""
    answers = np.load(FASTPLAID / name / "answers.npz")
    index = opened(FASTPLAID / name, tmp_path / "ours")
    assert index.lengths.tolist() == answers["lengths"].tolist()
    values = np.concatenate(documents(index))
    np.testing.assert_allclose(values, answers["values"], atol=1e-3)  # theirs are float16
    codes, lengths = np.asarray(index.arrays.codes), index.lengths
    owners = np.repeat(np.arange(len(index)), lengths)
    for centroid, listed in enumerate(inverted(index)):
        assert listed.tolist() == np.unique(owners[codes == centroid]).tolist()
    if name == "compressed":
        return
    for query, pids, scores in zip(
        *(answers[n] for n in ("queries", "pids", "scores")), strict=True
    ):
        ours = maxsim(index, query)
        np.testing.assert_allclose(ours[pids], scores, atol=4e-3)
        # No document that they left out is better than their last by more than they round.
        assert np.delete(ours, pids).max() <= scores[-1] + 4e-3


def without_merged(folder):
    for file in folder.glob("merged_*"):
        file.unlink()


def without_shards(folder):
    """And the mark of an index that its owner has frozen."""
    for name in ("codes", "residuals"):
        for i in range(3):
            (folder / f"{i}.{name}.npy").unlink()
    edit(folder / "metadata.json", lambda m: m.update(frozen=True, mutable=False))


def with_one_shard_folded(folder):
    """As in an update that was cut off: one shard is in the merged file only."""
    (folder / "0.codes.npy").unlink()
    (folder / "2.residuals.npy").unlink()


@pytest.mark.parametrize("change", [without_merged, without_shards, with_one_shard_folded])
def test_fastplaid_variants(tmp_path, change):
    source = shutil.copytree(FASTPLAID / "sharded", tmp_path / "source")
    change(source)
    convert_index(source, tmp_path / "ours")
    convert_index(FASTPLAID / "merged", tmp_path / "plain")
    assert_equal(arrays(tmp_path / "ours"), arrays(tmp_path / "plain"))


@pytest.mark.parametrize("name", ["merged", "compressed"])
def test_fastplaid_to_stanford(tmp_path, name):
    read = convert_index(FASTPLAID / name, tmp_path / "stanford", "stanford")
    assert read.layout == "fast-plaid"
    assert not list((tmp_path / "stanford").glob("*.npy"))
    convert_index(tmp_path / "stanford", tmp_path / "twice")
    convert_index(FASTPLAID / name, tmp_path / "once")
    assert_equal(arrays(tmp_path / "twice"), arrays(tmp_path / "once"))


def npy(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


FASTPLAID_DAMAGE = {
    **{
        f"{name} missing": (lambda folder, name=name: (folder / name).unlink(), name)
        for name in (
            "metadata.json",
            "bucket_weights.npy",
            "doclens.1.json",
            "ivf.npy",
            "ivf_lengths.npy",
        )
    },
    **{
        f"{name} truncated": (truncated(name), name)
        for name in ("centroids.npy", "merged_codes.npy", "ivf.npy", "metadata.json")
    },
    "codes missing": (lambda folder: (folder / "merged_codes.npy").unlink(), "0.codes.npy"),
    "objects": (
        lambda folder: np.save(folder / "ivf.npy", np.array([{}]), allow_pickle=True),
        "ivf.npy.*object",
    ),
    "other nbits": (settings(nbits=4), "bucket_cutoffs.npy.*nbits 4"),
    "huge nbits": (settings(nbits=10**10), "metadata.json.*nbits must be one of"),
    "words": (npy("bucket_cutoffs.npy", lambda a: a.astype(str)), "bucket_cutoffs.npy.*<U"),
    "a weight beyond float16": (npy("bucket_weights.npy", put(0, 1e30)), "bucket_weights.npy.*inf"),
    "huge lengths of lists": (
        npy("ivf_lengths.npy", lambda a: np.full(len(a), 2**62, np.int64)),
        "ivf_lengths.npy.*256",
    ),
    "a pipe": (in_place_of("ivf.npy", "pipe"), "ivf.npy: a pipe or a device in place of a file"),
    "more chunks": (settings(num_chunks=4), "doclens.3.json"),
    "other manifest": (
        lambda folder: edit(
            folder / "merged_codes.manifest.json", lambda m: m["1.codes.npy"].update(rows=7)
        ),
        "merged_codes.manifest.json.*1.codes.npy has 7 rows",
    ),
    "too few rows": (npy("merged_residuals.npy", lambda a: a[:300]), "merged_residuals.npy"),
    "narrow residuals": (npy("merged_residuals.npy", lambda a: a[:, 1:]), "merged_residuals.npy"),
    "code too large": (npy("merged_codes.npy", put(3, 256)), "merged_codes.npy.*code 256"),
    "lists too long": (npy("ivf.npy", lambda a: np.append(a, 1)), "ivf.npy.*adds up"),
    "document too large": (npy("ivf.npy", put(0, 63)), "ivf.npy.*list of centroid"),
    "lengths of other K": (npy("ivf_lengths.npy", lambda a: a[1:]), "ivf_lengths.npy.*256"),
}


@pytest.mark.parametrize("name", FASTPLAID_DAMAGE)
def test_fastplaid_damage_is_named(tmp_path, name):
    source = shutil.copytree(FASTPLAID / "merged", tmp_path / "source")
    change, message = FASTPLAID_DAMAGE[name]
    change(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_index(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- The model and the passages; the command line -------------------------------------------


def test_the_model_is_remembered(tmp_path, stanford_folder, capsys):
    """The checkpoint of tests/support.py is the one that the index was made with."""
    collection = tmp_path / "collection.tsv"
    passages = support.passages(60)
    collection.write_text("".join(f"p{i}\t{text}\n" for i, text in enumerate(passages)))
    arguments = [str(BUILT), str(tmp_path / "ours"), "--to", "native"]
    remembered = ["--checkpoint", str(stanford_folder), "--collection", str(collection)]
    assert main(["convert-index", *arguments, *remembered]) == 0
    assert "stanford, 60 documents, 1141 tokens, 16 dimensions at 2 bits" in capsys.readouterr().out
    index = Index.open(tmp_path / "ours")
    assert list(index.texts) == passages and index.ids[7] == "p7"
    loaded = Retriever.open(index, dtype="float32", devices=jax.devices()[:1]).model
    encoded = loaded.encode_documents(passages)
    assert encoded.lengths.tolist() == index.lengths.tolist()
    values = np.concatenate(documents(index))
    assert (values * encoded.values).sum(axis=1).mean() > 0.98  # two bits of residual

    assert main(["convert-index", *arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert-index", *arguments, "--overwrite"]) == 0
    assert "made with checkpoint" in capsys.readouterr().out
    assert main(["search", str(tmp_path / "ours"), "a cat"]) == 2
    assert "name a checkpoint" in capsys.readouterr().err


def test_a_collection_or_a_model_that_does_not_fit(tmp_path):
    pairs = [(str(i), "text") for i in range(59)]
    with pytest.raises(ValueError, match="59 ids were given for 60 documents"):
        convert_index(BUILT, tmp_path / "ours", collection=pairs)
    other = ColBERT.from_pretrained(support.write_stanford(tmp_path / "checkpoint", dim=8))
    with pytest.raises(ValueError, match=r"have 8 dimensions.* has 16"):
        convert_index(BUILT, tmp_path / "ours", model=other)
    with pytest.raises(ValueError, match="keeps no texts"):
        convert_index(FASTPLAID / "merged", tmp_path / "ours", "stanford", collection=pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# --- colbert-ai itself ----------------------------------------------------------------------


@pytest.mark.parametrize("dim, nbits", [(16, 2), (24, 2), (32, 1), (8, 8), (64, 4)])
def test_colbert_ai_searches_what_we_write(tmp_path, dim, nbits):
    """Its own search of our index, converted, finds what ours does."""
    python = os.environ.get("COLBERT_JAX_STANFORD_PYTHON")
    if not python:
        pytest.skip("COLBERT_JAX_STANFORD_PYTHON names no interpreter with colbert-ai 0.2.22")
    rng = np.random.default_rng(dim + nbits)
    topics = support.unit_rows(rng, 30, dim) + 1.5 * support.unit_rows(rng, dim)
    lengths = rng.integers(0, 20, 90)
    values = topics[rng.integers(0, 30, lengths.sum())] + 0.5 * support.unit_rows(
        rng, int(lengths.sum()), dim
    )
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    index = Index.build(
        tmp_path / "ours", embeddings=values, lengths=lengths, nbits=nbits, num_centroids=32
    )
    convert_index(index.path, tmp_path / "theirs", "stanford", chunk_documents=40)
    queries = values[rng.integers(0, len(values), (8, 6))]
    asked, out = tmp_path / "queries.npz", tmp_path / "out.npz"
    np.savez(asked, queries=queries, settings=np.array([[4, 0.4, 400]]))
    script = GOLDEN / "make_indexes.py"
    command = [python, script, "search", tmp_path / "theirs", asked, out]
    tools = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])  # it compiles by ninja
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": tools})
    assert ran.returncode == 0, ran.stderr[-3000:]
    answers = np.load(out)
    lists, centroids = inverted(index), np.asarray(index.arrays.centroids)
    for b, query in enumerate(queries):
        probes = np.argsort(-(centroids @ query.T), axis=0)[:4]
        candidates = np.unique(np.concatenate([lists[c] for c in np.unique(probes)]))
        assert candidates.tolist() == np.flatnonzero(answers["s0_candidates"][b]).tolist()
        count = len(candidates)
        pids, scores = answers["s0_pids"][b, :count], answers["s0_scores"][b, :count]
        np.testing.assert_allclose(maxsim(index, query)[pids], scores, rtol=1e-4)
    k = int((answers["s0_pids"] >= 0).sum(axis=1).min())
    hits = index.search(queries, k, ncells=4, centroid_score_threshold=0.4, ndocs=400)
    np.testing.assert_allclose(hits.scores, answers["s0_scores"][:, :k], rtol=1e-4)
