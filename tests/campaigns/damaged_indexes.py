"""Damage small indexes, open and search them, and let `verify` look.

    python tests/campaigns/damaged_indexes.py --count 2000 --seed 0

Each trial damages a file (or exchanges two) of one index; some give it the checksums of what is
there now. Right is an error that names a file of the folder, or the answers of the undamaged index.
Where answers differ or opening fails, `verify` must fail too, unless checksums were made right:
then answers may differ, but they must be rankings. Another library's index has no checksums: only
changed bytes inside a value may give other answers. Everything else is a fault: a crash, a hang, an
error of another kind, another answer that `verify` does not see. A trial depends on the seed and
its number alone. Files are not cut while they are mapped: the system ends a process for that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from functools import partial
from pathlib import Path
from typing import Any

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
MODEL = "model"  # the checkpoint beside the indexes
QUERY = "which river runs to the mountain"
N = 60
BY_XLA = ("ids", "ready")  # are searched by both backends
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
    for name in ("built", "updated"):
        shutil.copytree(GOLDEN / "stanford_index" / name, root / f"stanford-{name}")
    for name in ("compressed", "merged", "sharded"):
        shutil.copytree(GOLDEN / "fastplaid_index" / name, root / f"fast-plaid-{name}")


# --- Damage that has the right checksums ----------------------------------------------------


def _make_right(folder: Path) -> None:
    """Give an index the checksums of the files that are there."""
    from colbert_jax.index.format import METADATA, own_checksum

    file = folder / METADATA
    fields = json.loads(file.read_text("utf-8"))
    for name in fields["checksums"]:
        if name != METADATA:
            fields["checksums"][name] = zlib.crc32((folder / name).read_bytes())
    fields["checksums"][METADATA] = own_checksum(fields)
    file.write_text(json.dumps(fields), "utf-8")


def values(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """Some numbers of an array become others."""
    file = pick([f for f in files if f.suffix == ".npy"], rng)
    array = np.load(file)
    flat = array.reshape(-1)
    if np.issubdtype(array.dtype, np.floating):
        other: list = [np.nan, np.inf, -np.inf, 1e38, -1e38, 1e5, 1e-30, 0.0, -0.5]
    else:
        limits, size = np.iinfo(array.dtype), len(array)
        other = [limits.min, limits.max, limits.min + 1, limits.max // 2, -1, 0, 1, size, size - 1]
    other = [o for o in other if array.dtype.kind == "f" or limits.min <= o <= limits.max]
    value = other[int(rng.integers(len(other)))]
    places = rng.integers(len(flat), size=int(rng.choice([1, 3, len(flat)])))
    flat[places] = value
    np.save(file, array)
    _make_right(folder)
    return f"{file.name}: {value!r} at {places[:3].tolist()} and so on, checksum made right"


def shuffled(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """The rows of an array are in another order."""
    file = pick([f for f in files if f.suffix == ".npy"], rng)
    np.save(file, rng.permutation(np.load(file)))
    _make_right(folder)
    return f"{file.name}: rows shuffled, checksum made right"


def reshaped(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """An array has another type or shape."""
    file = pick([f for f in files if f.suffix == ".npy"], rng)
    array = np.load(file)
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
        lambda: np.array(array.flat[0]),
    )
    at = int(rng.integers(len(others)))
    np.save(file, others[at]())
    _make_right(folder)
    return f"{file.name}: form {at}, checksum made right"


def number(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """A number of the metadata becomes another."""
    file = folder / "metadata.json"
    fields = json.loads(file.read_text("utf-8"))
    names = [n for n, v in fields.items() if isinstance(v, int)]
    name = names[int(rng.integers(len(names)))]
    old = fields[name]
    others = [old + 1, old - 1, 0, -1, old * 8, old // 2, 2**31, 2**63, 10**30]
    fields[name] = others[int(rng.integers(len(others)))]
    file.write_text(json.dumps(fields))
    _make_right(folder)
    return f"metadata.json: {name} {old} became {fields[name]}, checksum made right"


def setting(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """What the metadata says of the model becomes something else."""
    changed = wrong_type(folder, [folder / "metadata.json"], rng)
    fields = json.loads((folder / "metadata.json").read_text("utf-8"))
    sums = fields.get("checksums") if isinstance(fields, dict) else None
    if isinstance(sums, dict) and all((folder / name).is_file() for name in sums):
        _make_right(folder)
    return f"{changed}, checksum made right"


UNSEEN: tuple[Damage, ...] = (flip, zeros)
RIGHT: tuple[Damage, ...] = (values, values, values, shuffled, reshaped, number, setting)
KINDS: tuple[Damage, ...] = (
    truncate, flip, flip, zeros, junk, replace, delete, unreadable, swap, wrong_type, wrong_type,
)  # fmt: skip


# --- A trial --------------------------------------------------------------------------------


def answers(folder: Path) -> Answers:
    """All that users ask of an index. Raises AssertionError for what is no ranking."""
    from colbert_jax import Index, Retriever

    found: Answers = {}
    if folder.name.startswith(("ids", "texts")):
        retriever = Retriever.open(folder)
        found["hits"] = retriever.search([QUERY], k=5)
        index = retriever.index
    else:
        index = Index.open(folder)
    queries = support.unit_rows(np.random.default_rng(1), 2, 8, index.dim)
    for mode in ("accurate", "fast", "exact"):
        for k in (3, 1000):
            positions, scores = index.search(queries, k, mode=mode)
            assert np.isfinite(scores).all(), f"{mode}: scores {scores}"
            assert (np.diff(scores, axis=1) <= 0).all(), f"{mode}: scores do not fall"
            assert all(len(set(row)) == len(row) for row in positions.tolist()), f"{mode}: twice"
            assert positions.size == 0 or 0 <= positions.min() <= positions.max() < len(index)
            assert index.lengths[positions].all(), f"{mode}: a document without a token"
            found[f"{mode}, {k}"] = positions.tolist(), scores.tolist()
    found["ids"] = ids = list(index.ids)
    assert all(ids[index.position(i)] == i for i in ids[:5])
    assert index.ids.find(re.compile("é")) == next((n for n, i in enumerate(ids) if "é" in i), None)
    found["texts"] = None if index.texts is None else list(index.texts)
    found["document"] = index.document_embeddings(0).tolist()
    found["described"] = index.metadata.settings
    return found


def converted(folder: Path) -> Answers:
    """Answers of another library's index, written as one of ours."""
    from colbert_jax.index.layouts.convert import convert_index

    with tempfile.TemporaryDirectory() as place:
        convert_index(folder, Path(place) / "ours", progress=False)
        return answers(Path(place) / "ours")


def is_ours(name: str) -> bool:
    return not name.startswith(("stanford", "fast-plaid"))


def load(sources: Path) -> dict[str, dict[str, Answers]]:
    """The answers of every index, by the way it is searched."""
    names = sorted(f.name for f in sources.iterdir() if f.name != MODEL)
    expected: dict[str, dict[str, Answers]] = {name: {} for name in names}
    for name in names:
        for way in ("1", "0") if name in BY_XLA else "1":
            os.environ["COLBERT_JAX_CPU_KERNELS"] = way
            expected[name][way] = (answers if is_ours(name) else converted)(sources / name)
    return expected


def trial(
    sources: Path, seed: int, number_: int, expected: dict[str, dict[str, Answers]]
) -> dict[str, str]:
    """Damage a copy and use it: what was done, and the verdict."""
    rng = np.random.default_rng([seed, number_])
    # Two trials of three are of our own layout.
    names = sorted(name for name in expected if is_ours(name) == (rng.random() < 2 / 3))
    name = names[int(rng.integers(len(names)))] if names else "ids"
    kinds = KINDS + RIGHT if is_ours(name) else KINDS
    damage = kinds[int(rng.integers(len(kinds)))]
    way = "0" if rng.random() < 0.5 and name in BY_XLA else "1"
    os.environ["COLBERT_JAX_CPU_KERNELS"] = way
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = shutil.copytree(sources / name, Path(place) / name)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        known = {file.name for file in files}
        done = f"{name}, {'numba' if way == '1' else 'XLA'}: {damage(folder, files, rng)}"
        use = answers if is_ours(name) else converted
        verdict = _verdict(partial(use, folder), folder, known)
        if not isinstance(verdict, str):
            same = repr(verdict) == repr(expected[name][way])
            verdict = "the same answers" if same else "other answers"
        if not verdict.startswith("fault"):
            verdict = _with_verify(verdict, name, damage, folder, known)
    return {"done": done, "verdict": verdict}


def _verdict(use: Any, folder: Path, known: set[str]) -> Any:
    """What an action returns, or what is to be said of its error."""
    try:
        return use()
    except (ValueError, OSError) as error:
        message = str(error)
        named = any(name in message.replace(str(folder), "") for name in known)
        if str(folder) in message and named and len(message) < 2000:
            return "an error"
        return f"fault: names no file: {type(error).__name__}: {message[:300]!r}"
    except BaseException as error:
        return f"fault: {type(error).__name__}: {str(error)[:300]!r}"


def _with_verify(verdict: str, name: str, damage: Damage, folder: Path, known: set[str]) -> str:
    """The verdict, with what `verify` makes of the damage."""
    from colbert_jax.index import format as fmt

    if not is_ours(name):
        if verdict == "other answers" and damage not in UNSEEN:
            return "fault: other answers in silence"
        return f"{verdict} (no checksums)"
    seen = _verdict(partial(fmt.verify, folder), folder, known)
    if seen is not None and seen != "an error":
        return f"verify, {seen}".replace("verify, fault:", "fault: verify:")
    if seen is None and verdict != "the same answers" and damage not in RIGHT:
        return f"fault: {verdict}, and verify finds nothing"
    return f"{verdict}, verify {'passes' if seen is None else 'fails'}"


CAMPAIGN = Campaign(__file__, write_sources, load, trial)

if __name__ == "__main__":
    sys.exit(CAMPAIGN.main(__doc__.split("\n")[0], 2000))
