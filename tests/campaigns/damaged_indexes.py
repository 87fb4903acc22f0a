"""Damage small indexes, open, search and change them, and let `verify` look.

    python tests/campaigns/damaged_indexes.py --count 2000 --seed 0

Each trial damages a file (or exchanges two) of one index; some give it the checksums of what is
there now. Right is an error that names a file of the folder, or the answers of the undamaged index.
Where answers differ or opening fails, `verify` must fail too, unless checksums were made right:
then answers may differ, but they must be rankings. Another library's index has no checksums: only
changed bytes inside a value may give other answers. Everything else is a fault: a crash, a hang, an
error of another kind, another answer that `verify` does not see.

Half of the trials of our own indexes change the damaged one. Right is an error that names a file,
which leaves all other files as they were, so that the same change succeeds once the damage is
mended; or what the undamaged index becomes, but for arrays that `verify` still complains of.

A trial depends on the seed and its number alone. Files are not cut while they are mapped: the
system ends a process for that.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # programs run for milliseconds

import support  # noqa: E402
from campaigns.common import (  # noqa: E402
    Campaign,
    Damage,
    delete,
    flip,
    junk,
    pick,
    replace,
    swap,
    truncate,
    unreadable,
    wrong_type,
    zeros,
)

GOLDEN = ROOT / "tests" / "golden"
MODEL, EARLIER = "model", "earlier"  # beside the indexes: the checkpoint, and former states
QUERY = "which river runs to the mountain"
N = 60
BY_XLA = ("ids", "ready", "changed")  # are searched by both backends
Answers = dict[str, Any]


def write_sources(root: Path) -> None:
    """Indexes of ours, built from texts and from ready embeddings, and of other libraries."""
    from colbert_jax import Index, Retriever

    checkpoint = support.write_stanford(root / MODEL, {"num_hidden_layers": 1})
    texts = support.passages(N)
    pairs = [(f"é{i}/{i * i}", text) for i, text in enumerate(texts)]
    build = partial(Retriever.build, kmeans_niters=2, num_centroids=16, progress=False)
    build(root / "ids", checkpoint, pairs, nbits=2)
    build(root / "texts", checkpoint, texts, nbits=1)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, N)
    values = support.unit_rows(rng, int(lengths.sum()), 16)
    ready = dict(embeddings=values, lengths=lengths, kmeans_niters=2, num_centroids=16)
    Index.build(root / "ready", **ready, nbits=8)
    Index.build(root / "ready-ids", **ready, nbits=4, ids=[f"d{i}" for i in range(N)])
    _write_changed(root, ready)
    for name in ("built", "updated"):
        shutil.copytree(GOLDEN / "stanford_index" / name, root / f"stanford-{name}")
    for name in ("compressed", "merged", "sharded"):
        shutil.copytree(GOLDEN / "fastplaid_index" / name, root / f"fast-plaid-{name}")


def _write_changed(root: Path, ready: dict[str, Any]) -> None:
    """Indexes that were changed, each beside a state that it had before."""
    from colbert_jax import Index, Retriever

    retriever = Retriever.open(shutil.copytree(root / "ids", root / "texts-changed"))
    retriever.delete([f"é{i}/{i * i}" for i in range(5)])
    _keep(retriever.index.path)
    retriever.upsert([("é7/49", "a bird on a river", {"n": 1}), ("é0/0", "a mountain", {"n": 2})])

    years = [{"year": 2000 + i % 9, "tags": ["a", f"t{i % 3}"]} for i in range(N)]
    ids = [f"d{i}" for i in range(N)]
    index = Index.build(root / "changed", **ready, nbits=4, ids=ids, fields=years)
    index = index.add(**_more(1, "e", 20), fields=years[:20]).delete(["d3", "e4"])
    _keep(index.path)
    index.add(**_more(2, "f", 10), fields=years[:10]).delete("f2")

    index = Index.build(root / "aside", **ready, nbits=8, ids=ids, fields=years)
    held = index._fields  # a reader at work: what is added stays in SQLite's log
    held._connection.execute("BEGIN")
    held._connection.execute("SELECT count(*) FROM documents").fetchall()
    _keep(index.path, root / "changed-log")
    index.add(**_more(3, "e", 20), fields=years[:20])
    shutil.copytree(index.path, root / "changed-log")
    held._connection.execute("COMMIT")
    del index, held
    shutil.rmtree(root / "aside")

    with _lists_at_once():
        index = Index.build(root / "changed-listed", **ready, nbits=2, ids=ids)
        index = index.add(**_more(4, "e", 20)).delete(ids[:6])
        _keep(index.path)
        index = index.compact(False).delete("d9").add(**_more(5, "é", 40, apart=True))
    assert index.metadata.num_centroids > 16

    index = Index.build(root / "changed-numbers", **ready, nbits=1)
    index = index.delete(["2", "59"]).compact(False)
    _keep(index.path)
    index = index.add(**_more(6, None, 9)).delete("60")
    assert index.metadata.change.next_id == N + 9

    index = Index.build(root / "changed-emptied", **ready, nbits=4, ids=ids)
    _keep(index.path)
    index.delete(ids)
    index = Index.build(root / "changed-compacted", **ready, nbits=4, ids=ids, fields=years)
    _keep(index.path)
    index.delete(ids).compact(False)
    Retriever.build(root / "texts-nothing", root / MODEL, [], progress=False)


def _more(seed: int, prefix: str | None, n: int, apart: bool = False) -> dict[str, Any]:
    """Documents; `apart`: near one direction, which the others avoid."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, n)
    values = support.unit_rows(rng, int(lengths.sum()), 16)
    if apart:
        values = 0.2 * values + np.eye(16, dtype=np.float32)[3] * 3
        values /= np.linalg.norm(values, axis=1, keepdims=True)
    ids = None if prefix is None else [f"{prefix}{i}" for i in range(n)]
    return dict(embeddings=values, lengths=lengths, ids=ids, progress=False)


def _keep(path: Path, other: Path | None = None) -> None:
    path.parent.joinpath(EARLIER).mkdir(exist_ok=True)
    shutil.copytree(path, path.parent / EARLIER / (other or path).name)


@contextlib.contextmanager
def _lists_at_once() -> Iterator[None]:
    """Every change writes all inverted lists."""
    from colbert_jax.index import changes

    with mock.patch.multiple(changes, _UNLISTED=0, _UNLISTED_SHARE=1 << 30):
        yield


# --- Damage that has the right checksums ----------------------------------------------------


def _make_right(folder: Path) -> None:
    """Give an index the checksums of the files that are there."""
    from colbert_jax.index.format import METADATA, own_checksum

    file = folder / METADATA
    fields = json.loads(file.read_text("utf-8"))
    for name in fields["checksums"]:
        if name.endswith(".npy"):
            data = (folder / name).read_bytes()
            fields["checksums"][name] = zlib.crc32(data[: _size(folder, name)])
    fields["checksums"][METADATA] = own_checksum(fields)
    file.write_text(json.dumps(fields), "utf-8")


def _committed(folder: Path) -> dict[str, tuple[str, Any, tuple[int, ...]]]:
    """File -> array, dtype and shape, of what counts in it."""
    from colbert_jax.index import format as fmt

    metadata = fmt.read_metadata(folder)
    return {
        metadata.file(name): (name, dtype, shape)
        for name, (dtype, shape) in fmt.array_specs(metadata).items()
    }


def _size(folder: Path, name: str) -> int | None:
    """Bytes of a file that count, by the metadata; None where these cannot be read."""
    try:
        _, dtype, shape = _committed(folder)[name]
    except (ValueError, KeyError):
        return None
    return 128 + math.prod(shape) * np.dtype(dtype).itemsize


def _array(folder: Path, file: Path) -> np.ndarray:
    """The committed rows of a file, to be written to."""
    _, dtype, shape = _committed(folder)[file.name]
    return np.memmap(file, dtype, "r+", 128, shape) if 0 not in shape else np.zeros(shape, dtype)


def _pick_array(folder: Path, files: list[Path], rng: np.random.Generator) -> Path:
    names = [f for f in files if f.suffix == ".npy"]
    full = [f for f in names if _array(folder, f).size]
    return pick(full or names, rng)


def values(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """Some numbers of an array become others."""
    file = _pick_array(folder, files, rng)
    array = _array(folder, file)
    flat = array.reshape(-1)
    if np.issubdtype(array.dtype, np.floating):
        other: list = [np.nan, np.inf, -np.inf, 1e38, -1e38, 1e5, 1e-30, 0.0, -0.5]
    else:
        limits, size = np.iinfo(array.dtype), len(array)
        other = [limits.min, limits.max, limits.min + 1, limits.max // 2, -1, 0, 1, size, size - 1]
    other = [o for o in other if array.dtype.kind == "f" or limits.min <= o <= limits.max]
    value = other[int(rng.integers(len(other)))]
    places = rng.integers(len(flat) or 1, size=int(rng.choice([1, 3, len(flat)])))
    if len(flat):
        flat[places] = value
    del flat, array
    _make_right(folder)
    return f"{file.name}: {value!r} at {places[:3].tolist()} and so on, checksum made right"


def shuffled(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """The rows of an array are in another order."""
    file = _pick_array(folder, files, rng)
    array = _array(folder, file)
    array[:] = rng.permutation(np.array(array))
    del array
    _make_right(folder)
    return f"{file.name}: rows shuffled, checksum made right"


def reshaped(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """An array has another type or shape."""
    file = _pick_array(folder, files, rng)
    array = np.array(_array(folder, file))
    others = (
        lambda: array[:-1],
        lambda: array[:0],
        lambda: np.concatenate([array, array[:1]]),
        lambda: array[..., None],
        lambda: array.astype(np.float64),
        lambda: array.astype(array.dtype.newbyteorder()),
        lambda: np.asfortranarray(array),
        lambda: array.astype(object),
        lambda: array.astype(str),
        lambda: np.array(array.flat[0] if array.size else 0),
    )
    at = int(rng.integers(len(others)))
    np.save(file, others[at]())
    _make_right(folder)
    return f"{file.name}: form {at}, checksum made right"


def number(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """A number of the metadata becomes another."""
    file = folder / "metadata.json"
    fields = json.loads(file.read_text("utf-8"))
    change = fields.get("change", {})
    places = [(fields, n) for n in fields if isinstance(fields[n], int)]
    places += 2 * [(change, n) for n in change if isinstance(change[n], int) or n == "next_id"]
    of, name = places[int(rng.integers(len(places)))]
    old = of[name] or 0
    others = [old + 1, old - 1, 0, -1, old * 8, old // 2, 2**31, 2**63, 10**30, None]
    of[name] = others[int(rng.integers(len(others)))]
    file.write_text(json.dumps(fields))
    _make_right(folder)
    return f"metadata.json: {name} {old} became {of[name]}, checksum made right"


def named_file(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """The metadata name another file."""
    file = folder / "metadata.json"
    fields = json.loads(file.read_text("utf-8"))
    named = fields.get("change", {}).get("files")
    if not named:
        return number(folder, files, rng)
    name = sorted(named)[int(rng.integers(len(named)))]
    old = named[name]
    others = ["../x.npy", "/etc/passwd", "metadata.json", f"{name}-0.npy", f"{name}-77.npy", ""]
    others += [named[other] for other in sorted(named)] + [f"{name}-7\n.npy", f"./{old}"]
    named[name] = new = others[int(rng.integers(len(others)))]
    if rng.random() < 0.5 and old in fields["checksums"]:
        fields["checksums"].setdefault(new, fields["checksums"].pop(old))
    if rng.random() < 0.5 and is_plain(new) and not (folder / new).exists():
        shutil.copyfile(folder / old, folder / new)  # then it may be right
    file.write_text(json.dumps(fields))
    with contextlib.suppress(OSError):
        _make_right(folder)
    return f"metadata.json: {name} is in {new!r}, not {old!r}, checksum made right"


def is_plain(name: str) -> bool:
    return bool(name) and "/" not in name


def past(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """A file becomes what its array was in an earlier state of the index."""
    earlier = SOURCES / EARLIER / folder.name
    if not earlier.is_dir():
        return junk(folder, files, rng)
    then = {name: file for file, (name, _, _) in _committed(earlier).items()}
    now = {file: name for file, (name, _, _) in _committed(folder).items()}
    both = [(f, earlier / then[now[f.name]]) for f in files if now.get(f.name) in then]
    both += [(f, earlier / f.name) for f in files if "sqlite" in f.name]
    both = [(f, g) for f, g in both if not g.exists() or f.read_bytes() != g.read_bytes()]
    if not both:
        return junk(folder, files, rng)
    file, other = both[int(rng.integers(len(both)))]
    if other.exists():
        shutil.copyfile(other, file)
    else:
        file.unlink()
    return f"{file.name} became the earlier {other.name}"


def linked(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """Files become links to what they were, which is as good."""
    aside = folder.parent / "elsewhere"
    aside.mkdir()
    chosen = [f for f in files if rng.random() < 0.5] or files
    for file in chosen:
        shutil.move(file, aside / file.name)
        file.symlink_to(aside / file.name)
    return f"links to {', '.join(file.name for file in chosen)}"


def setting(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """What the metadata says of the model becomes something else."""
    changed = wrong_type(folder, [folder / "metadata.json"], rng)
    fields = json.loads((folder / "metadata.json").read_text("utf-8"))
    sums = fields.get("checksums") if isinstance(fields, dict) else None
    if isinstance(sums, dict) and all((folder / name).is_file() for name in sums):
        _make_right(folder)
    return f"{changed}, checksum made right"


UNSEEN: tuple[Damage, ...] = (flip, zeros)
RIGHT: tuple[Damage, ...] = (
    values, values, values, shuffled, reshaped, number, number, setting, named_file,
)  # fmt: skip
OURS: tuple[Damage, ...] = (past, past, linked)
KINDS: tuple[Damage, ...] = (
    truncate, flip, flip, zeros, junk, replace, delete, unreadable, swap, wrong_type, wrong_type,
)  # fmt: skip
CHANGES = ("add", "add, all lists", "upsert", "delete", "compact")
SOURCES = Path()  # the folder of the indexes, once it is known


# --- A trial --------------------------------------------------------------------------------


def has_model(folder: Path) -> bool:
    return folder.name.startswith(("ids", "texts"))


def answers(folder: Path) -> Answers:
    """All that users ask of an index. Raises AssertionError for what is no ranking."""
    from colbert_jax import Index, Retriever

    found: Answers = {}
    if has_model(folder):
        retriever = Retriever.open(folder)
        found["hits"] = retriever.search([QUERY], k=5)
        index = retriever.index
    else:
        index = Index.open(folder)
    found["advice"] = index.advice()
    alive = (index.lengths > 0) & ~index.deleted
    queries = support.unit_rows(np.random.default_rng(1), 2, 8, index.dim)
    some = list(index.ids)[::3] if len(index) else []
    some = [i for at, i in enumerate(some) if not index.deleted[3 * at]]
    wanted: list[Any] = [None, index.select(ids=some)]
    if "year" in index.field_names():
        wanted.append(index.select({"year": {"gte": 2003}, "tags": {"contains": "t1"}}))
    for mode in ("accurate", "fast", "exact"):
        for k in (3, 1000):
            for at, where in enumerate(wanted):
                positions, scores = index.search(queries, k, mode=mode, where=where)
                right = alive if where is None else alive & where.allowed
                assert positions.shape == (2, min(k, right.sum())), f"{mode}: {positions.shape}"
                assert right[positions].all(), f"{mode}: a document that is not to be found"
                assert np.isfinite(scores).all(), f"{mode}: scores {scores}"
                assert (np.diff(scores, axis=1) <= 0).all(), f"{mode}: scores do not fall"
                assert all(len(set(row)) == len(row) for row in positions.tolist()), mode
                found[f"{mode}, {k}, {at}"] = positions.tolist(), scores.tolist()
    found["ids"] = ids = list(index.ids)
    living = np.flatnonzero(~index.deleted).tolist()
    assert all(index.position(ids[i]) == i for i in living[:5])
    found["fields"] = [index.fields(ids[i]) for i in living]
    assert index.ids.find(re.compile("é")) == next((n for n, i in enumerate(ids) if "é" in i), None)
    found["texts"] = None if index.texts is None else list(index.texts)
    if len(ids):
        found["document"] = index.document_embeddings(0).tolist()
    found["described"] = index.metadata.settings
    return found


def change(folder: Path, kind: str, ids: list[str], index: Any = None) -> None:
    """Change an index.

    Args:
      ids: that are there.
      index: opened before, or None.
    """
    from colbert_jax import Index, Retriever

    if has_model(folder):
        index = Retriever.open(folder)
    elif index is None:
        index = Index.open(folder)
    numbers = folder.name in ("ready", "changed-numbers", "texts")
    upsert = kind == "upsert"
    with contextlib.ExitStack() as stack:
        if kind == "add, all lists":
            stack.enter_context(_lists_at_once())
        if kind == "delete":
            index.delete(ids[:3])
        elif kind == "compact":
            index.compact(progress=False)
        elif has_model(folder):
            pairs: Any = [(f"new{i}", f"{text} again") for i, text in enumerate(_TEXTS)]
            pairs = [(id, text, {"n": 7}) for id, text in pairs]
            if upsert:
                pairs[0] = (ids[0], *pairs[0][1:]) if ids else pairs[0]
            elif numbers:
                pairs = [text for _, text, _ in pairs]
            getattr(index, "upsert" if upsert else "add")(pairs, progress=False)
        else:
            more = _more(9, None if numbers and not upsert else "new", 12)
            if upsert and ids:
                more["ids"][:2] = ids[:2] if len(ids) > 1 else [ids[0], "x"]
            fields = [{"year": 2020 + i, "tags": []} for i in range(12)]
            getattr(index, "upsert" if upsert else "add")(**more, fields=fields)


_TEXTS = ("the river is long", "the bird is small", "warm water")


def converted(folder: Path) -> Answers:
    """Answers of another library's index, written as one of ours."""
    from colbert_jax.index.layouts.convert import convert_index

    with tempfile.TemporaryDirectory() as place:
        convert_index(folder, Path(place) / "ours", progress=False)
        return answers(Path(place) / "ours")


def is_ours(name: str) -> bool:
    return not name.startswith(("stanford", "fast-plaid"))


def verify(folder: Path) -> None:
    """As `colbert-jax info --verify` does."""
    from colbert_jax import Index

    Index.open(folder).verify()


def _bytes_of(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def arrays_of(folder: Path) -> dict[str, bytes]:
    """The committed bytes of the arrays of an index, of those that have the right checksum."""
    from colbert_jax.index import format as fmt

    sums = fmt.read_metadata(folder).checksums
    found = {}
    for file, (name, _, _) in _committed(folder).items():
        try:
            data = (folder / file).read_bytes()[: _size(folder, file)]
        except OSError:
            continue
        if zlib.crc32(data) == sums[file]:
            found[name] = data[128:]
    return found


def load(sources: Path) -> dict[str, dict[str, Any]]:
    """What is known of every index, by its name."""
    global SOURCES
    SOURCES = sources
    os.fsync = lambda descriptor: None  # most of the time of a change
    names = sorted(f.name for f in sources.iterdir() if f.name not in (MODEL, EARLIER))
    return {name: Expected(sources / name) for name in names}


class Expected(dict[str, Any]):
    """Of an undamaged index, found when a trial first asks: "1" and "0", what it answers by numba
    and by XLA; by the name of a change, what it becomes; "living", the ids that are there."""

    def __init__(self, source: Path):
        self._source = source

    def __missing__(self, what: str) -> Any:
        with mock.patch.dict(os.environ, COLBERT_JAX_CPU_KERNELS="0" if what == "0" else "1"):
            self[what] = self._find(what)
        return self[what]

    def _find(self, what: str) -> Any:
        if what == "living":
            return living(self._source)
        if what in ("0", "1"):
            return (answers if is_ours(self._source.name) else converted)(self._source)
        with tempfile.TemporaryDirectory() as place:
            copy = shutil.copytree(self._source, Path(place) / self._source.name)
            change(copy, what, self["living"])
            verify(copy)
            return answers(copy), arrays_of(copy)


def living(folder: Path) -> list[str]:
    from colbert_jax import Index

    index = Index.open(folder)
    return [index.ids[i] for i in np.flatnonzero(~index.deleted).tolist()]


def trial(
    sources: Path, seed: int, number_: int, expected: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """Damage a copy and use it: what was done, and the verdict."""
    rng = np.random.default_rng([seed, number_])
    # Four trials of five are of our own layout.
    names = sorted(name for name in expected if is_ours(name) == (rng.random() < 4 / 5))
    name = names[int(rng.integers(len(names)))] if names else "ids"
    kinds = KINDS + RIGHT + OURS if is_ours(name) else KINDS
    damage = kinds[int(rng.integers(len(kinds)))]
    way = "0" if rng.random() < 0.5 and name in BY_XLA else "1"
    kind = CHANGES[int(rng.integers(len(CHANGES)))] if rng.random() < 0.5 else ""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = shutil.copytree(sources / name, Path(place) / name)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        known = {file.name for file in files}
        if is_ours(name) and kind:
            os.environ["COLBERT_JAX_CPU_KERNELS"] = "1"
            index = _opened(folder, files) if rng.random() < 0.3 and not has_model(folder) else None
            done = f"{name}, {kind}{' by who has it open' if index is not None else ''}: "
            done += damage(folder, files, rng)
            verdict = _changed(folder, kind, index, damage, known, expected[name])
            return {"done": done, "verdict": f"{verdict} ({kind.split(',')[0]})"}
        os.environ["COLBERT_JAX_CPU_KERNELS"] = way
        done = f"{name}, {'numba' if way == '1' else 'XLA'}: {damage(folder, files, rng)}"
        use = answers if is_ours(name) else converted
        verdict = _verdict(partial(use, folder), folder, known)
        if not isinstance(verdict, str):
            same = repr(verdict) == repr(expected[name][way])
            verdict = "the same answers" if same else "other answers"
        if not verdict.startswith("fault"):
            verdict = _with_verify(verdict, name, damage, folder, known)
    return {"done": done, "verdict": verdict}


def _opened(folder: Path, files: list[Path]) -> Any:
    """The index, opened, with files of its own."""
    from colbert_jax import Index

    index = Index.open(folder)
    for file in files:  # what is mapped is not damaged: the system ends a process for that
        shutil.copyfile(file, folder / "copy")
        os.replace(folder / "copy", file)
    return index


def _changed(
    folder: Path, kind: str, index: Any, damage: Damage, known: set[str], expected: dict[str, Any]
) -> str:
    """The verdict on changing a damaged index."""
    source = SOURCES / folder.name
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    elsewhere = folder.parent / "elsewhere"
    aside = {f: f.read_bytes() for f in elsewhere.iterdir()} if elsewhere.is_dir() else {}
    work = partial(change, folder, kind, expected["living"], index)
    verdict = _verdict(work, folder, known, KeyError if damage in RIGHT else ())
    if isinstance(verdict, str) and verdict.startswith("fault"):
        return verdict
    if any(f.read_bytes() != data for f, data in aside.items() if "sqlite" not in f.name):
        return "fault: what a link leads to was changed"
    wanted, arrays = expected[kind]
    metadata = folder / "metadata.json"
    if verdict == "an error" and before.get(metadata.name, b"") != _bytes_of(metadata):
        spread = {n: data for n, data in arrays_of(folder).items() if data != arrays.get(n)}
        return f"fault: error, and spread to {list(spread)}" if spread else "changed, an error"
    if verdict == "an error":
        for name, data in before.items():
            file = folder / name
            if "sqlite" in name:
                continue
            if not file.exists():
                return f"fault: a change that failed has deleted {name}"
            now = file.read_bytes()
            at = min(_size(source, name) or len(data), len(data))
            if now[:at] != data[:at]:
                return f"fault: a change that failed has changed {name}"
        for file in source.iterdir():  # mended
            target = folder / file.name
            if target.is_dir() and not target.is_symlink():
                target.rmdir()
            target.unlink(missing_ok=True)
            shutil.copyfile(file, target)
        for file in folder.iterdir():
            if "sqlite" in file.name and not (source / file.name).exists():
                file.unlink()
        change(folder, kind, expected["living"])
        verify(folder)
        if repr(answers(folder)) != repr(wanted):
            return "fault: mended and changed, other answers"
        return "an error, mended and changed"
    seen = _verdict(partial(verify, folder), folder, set(os.listdir(folder)) | known)
    if seen is not None and seen != "an error":
        return f"verify, {seen}".replace("verify, fault:", "fault: verify:")
    if damage in RIGHT:
        return "changed, checksums were right"
    now_is = arrays_of(folder)
    spread = [name for name in now_is if now_is[name] != arrays.get(name)]
    if spread:
        return f"fault: spread to {spread}"
    if seen is None:
        same = repr(answers(folder)) == repr(wanted)
        return "changed, rightly" if same else "fault: changed to other answers, verify passes"
    return "changed, verify fails"


def _verdict(use: Any, folder: Path, known: set[str], also: Any = ()) -> Any:
    """What an action returns, or what is to be said of its error."""
    try:
        return use()
    except (ValueError, OSError) as error:
        message = str(error)
        rest = message.replace(str(folder), "")
        named = any(name in rest for name in (*known, "was built with it"))  # the checkpoint
        if str(folder) in message and named and len(message) < 2000:
            return "an error"
        return f"fault: names no file: {type(error).__name__}: {message[:300]!r}"
    except also:
        return "an error"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"fault: {type(error).__name__}: {str(error)[:300]!r} {where.name}:{where.lineno}"


def _with_verify(verdict: str, name: str, damage: Damage, folder: Path, known: set[str]) -> str:
    """The verdict, with what `verify` makes of the damage."""
    if not is_ours(name):
        if verdict == "other answers" and damage not in UNSEEN:
            return "fault: other answers in silence"
        return f"{verdict} (no checksums)"
    seen = _verdict(partial(verify, folder), folder, known)
    if seen is not None and seen != "an error":
        return f"verify, {seen}".replace("verify, fault:", "fault: verify:")
    if seen is None and verdict != "the same answers" and damage not in RIGHT:
        return f"fault: {verdict}, and verify finds nothing"
    return f"{verdict}, verify {'passes' if seen is None else 'fails'}"


CAMPAIGN = Campaign(__file__, write_sources, load, trial)

if __name__ == "__main__":
    sys.exit(CAMPAIGN.main(__doc__.split("\n")[0], 2000))
