"""Mining: from queries and a collection to scored n-way examples, ColBERTv2's supervision.

The model of one round retrieves passages for the training queries, a teacher scores them, and of
each query one positive and a sample of the others becomes an example of the next round (Santhanam
et al., 2022, section 3.2). The files are Stanford ColBERT's:

    ranking.tsv     qid, pid, rank from 1, score, separated by tabs
    scores.jsonl    [qid, [pid, score], ...], best first
    examples.jsonl  [qid, [pid, score] x nway], the positive first

Ids that are whole numbers are written as numbers in JSON.

Each stage goes on from its last whole block when it is started again with the same inputs after a
kill, and on the same kind of device writes the same bytes as an uninterrupted run. What a file was
made from stays in `<file>.meta`; a finished file is kept. Under `jax.distributed` every process
makes the same call with the files in a folder that they share: the first process does the work of a
stage on its own devices, the others wait for it. Only the index of `mine` is built by all of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from colbert_jax import processes
from colbert_jax.colbert import ColBERT
from colbert_jax.data.collections import json_value
from colbert_jax.data.lines import Lines
from colbert_jax.data.texts import Texts, whole_number
from colbert_jax.files import present, read_object, write_json
from colbert_jax.index.format import IndexFormatError, read_build
from colbert_jax.mining.ranking import (
    MappedTexts,
    RankedPairs,
    TextsById,
    check_labels,
    hash_texts,
)
from colbert_jax.mining.resumable import Block, BlockFile, check_settings, remove_finished
from colbert_jax.mining.teacher import BiEncoder
from colbert_jax.retriever import Retriever
from colbert_jax.search.arrays import check_k

Positives = Mapping[str, Collection[str]]


class Teacher(Protocol):
    """A model that scores pairs of texts, such as `load_teacher` gives.

    fingerprint: equal for teachers that score equally.
    """

    fingerprint: str

    def score(
        self, queries: Sequence[str], documents: Sequence[str], *, progress: bool | None = None
    ) -> np.ndarray:
        """float32[N], the scores of queries[i] with documents[i]."""
        ...


class Mined(NamedTuple):
    """What a stage wrote.

    path: the file.
    queries: how many it has.
    left_out: queries with fewer than nway passages, of `make_examples`.
    """

    path: Path
    queries: int
    left_out: int = 0


def retrieve(
    retriever: Retriever,
    queries: Mapping[str, str],
    output: str | Path,
    *,
    k: int = 500,
    batch: int = 32,
    mode: str = "accurate",
    overwrite: bool = False,
    progress: bool | None = None,
) -> Mined:
    """Write the k best passages of each query as a ranking.

    Args:
      retriever: model and index of the collection; not sharded over several processes.
      queries: qid -> text.
      k: passages a query; the paper has 500.
      batch: queries searched in one call, and lost by a kill.
      mode: as of `Index.search`.
      overwrite: make the file anew where it is there.

    Raises:
      ValueError: an empty query, an id with a tab in it.
      FileExistsError: `output` was made with other settings.
    """
    k = check_k(k)
    _check_batch(batch)
    _check_queries(queries)
    qids = list(queries)

    def settings() -> dict[str, Any]:
        return {
            "stage": "retrieve",
            "index": retriever.index.metadata.build,
            "model": retriever.model.fingerprint(),
            "query settings": repr(retriever.model.config.text),
            "queries": hash_texts(queries),
            "k": k,
            "mode": mode,
        }

    def block(first: int) -> Block:
        part = qids[first : first + batch]
        found = retriever.search([queries[qid] for qid in part], k, mode=mode, texts=False)
        lines = [
            f"{qid}\t{_tabless(hit.id, 'passage')}\t{rank}\t{hit.score:.6f}\n"
            for qid, hits in zip(part, found, strict=True)
            for rank, hit in enumerate(hits, 1)
        ]
        return _block(lines, len(part))

    work = _Work(settings, lambda: (len(qids), block), count=lambda _: len(qids))
    return _run("retrieving", output, work, overwrite, progress)


def score_ranking(
    ranking: str | Path,
    queries: Mapping[str, str] | TextsById | str | Path,
    collection: Mapping[str, str] | TextsById | str | Path,
    teacher: Teacher,
    output: str | Path,
    *,
    positives: Positives | None = None,
    batch: int = 8192,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Mined:
    """Score every passage of a ranking with a teacher.

    A bi-encoder embeds each distinct passage once, into `<output>.vectors`, which is deleted in the
    end: 4 H bytes a passage.

    Args:
      ranking: TSV of `qid, pid, rank, ...`; the lines of a query together, by rank.
      queries: texts by id, or a file that `data.Texts.queries` reads.
      collection: texts by id, or a file that `data.read_collection` reads.
      positives: qid -> pids of labelled passages, which are scored too where they were not
        retrieved. Queries that are not in the ranking are passed over.
      batch: pairs scored, or passages embedded, between two commits, at least: what a kill loses.
      overwrite: make the file anew where it is there.

    Memory: 12 bytes a line of the ranking.

    Raises:
      ValueError: naming file and line: a line of another form, an unknown query or passage, one
        that is there twice; a score that is not finite.
      FileExistsError: `output` was made with other settings.
    """
    _check_batch(batch)
    labels = _as_text(positives)
    vectors = Path(f"{output}.vectors")

    @functools.cache
    def texts() -> tuple[TextsById, TextsById]:
        return _texts(queries, Texts.queries), _texts(collection, Texts.passages)

    @functools.cache
    def settings() -> dict[str, Any]:
        return {
            "stage": "score",
            "ranking": _hash_file(Path(ranking)),
            "queries": texts()[0].fingerprint,
            "collection": texts()[1].fingerprint,
            "positives": _hash(labels),
            "teacher": teacher.fingerprint,
        }

    def start() -> tuple[int, Callable[[int], Block]]:
        pairs = RankedPairs(Path(ranking), *texts(), labels, progress)
        if isinstance(teacher, BiEncoder):
            scores = _score_by_vectors(pairs, teacher, vectors, settings(), batch, progress)
        else:
            scores = _score_pairs(pairs, teacher)

        def block(first: int) -> Block:
            last = pairs.end_of(first, batch)
            return _block(_scored_lines(pairs, first, last, scores(first, last)), last - first)

        return len(pairs), block

    work = _Work(settings, start, finish=lambda: remove_finished(vectors))
    return _run("scoring", output, work, overwrite, progress)


def make_examples(
    scored: str | Path,
    output: str | Path,
    *,
    nway: int = 64,
    positives: Positives | None = None,
    seed: int = 0,
    depth: int | None = None,
    batch: int = 1024,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Mined:
    """Write n-way examples from a teacher's scores.

    The positive is the best-scored of the query's labelled passages, without any the best-scored
    passage. The negatives are drawn without replacement from the others, in random order; other
    labelled passages are never drawn. What is drawn depends on the seed and the ids of query and
    passages only. Queries with fewer than nway passages are left out and counted.

    Args:
      scored: what `score_ranking` wrote.
      nway: passages of an example.
      positives: qid -> pids of labelled passages, if there are any.
      depth: draw from this many best-scored passages of each query. If None, from all.
      batch: examples made between two commits: what a kill loses.
      overwrite: make the file anew where it is there.

    Raises:
      ValueError: naming file and line: a line of another form, a score that is not finite, a
        passage twice, a query none of whose labelled passages was scored; no example at all.
      FileExistsError: `output` was made with other settings.
    """
    _check_batch(batch)
    if nway < 2:
        raise ValueError(f"nway must be >= 2, got {nway}")
    if depth is not None and depth < nway:
        raise ValueError(f"depth must be at least nway, {nway}, got {depth}")
    labels = _as_text(positives)

    def settings() -> dict[str, Any]:
        return {
            "stage": "examples",
            "scores": _hash_file(Path(scored)),
            "nway": nway,
            "positives": _hash(labels),
            "seed": seed,
            "depth": depth,
        }

    def start() -> tuple[int, Callable[[int], Block]]:
        lines = Lines(scored)

        def block(first: int) -> Block:
            rows = range(first, min(first + batch, len(lines)))
            made = [
                lines.read(row, lambda line: _example(line, nway, labels, seed, depth))
                for row in rows
            ]
            return _block(filter(None, made), len(rows), made.count(None))

        return len(lines), block

    nothing = (
        f"{scored}: no query has {nway} passages to make an example of; retrieve more, or take a "
        "smaller nway"
    )
    work = _Work(settings, start, nothing=nothing)
    return _run("making examples", output, work, overwrite, progress)


def mine(
    model: ColBERT,
    collection: str | Path | Texts,
    queries: str | Path | Texts,
    folder: str | Path,
    teacher: Teacher,
    *,
    nway: int = 64,
    k: int = 500,
    nbits: int | None = None,
    positives: Positives | None = None,
    seed: int = 0,
    depth: int | None = None,
    mode: str = "accurate",
    overwrite: bool = False,
    progress: bool | None = None,
) -> Mined:
    """All stages into one folder: `index`, `ranking.tsv`, `scores.jsonl`, `examples.jsonl`.

    Args:
      model: the checkpoint of the round before.
      collection: a file that `data.read_collection` reads, or `data.Texts.passages` of one.
      queries: a file that `data.Texts.queries` reads, or these.
      nbits: of the index. If None, what the checkpoint asks for, else 2.
      nway, k, positives, seed, depth, mode: as of the stages.
      overwrite: make everything anew. If False, keep what is finished and go on with the rest.

    Returns:
      what `make_examples` wrote.

    Raises as the stages do.
    """
    folder = Path(folder)
    if k < nway:
        raise ValueError(f"k must be at least nway, {nway}, got {k}")
    passages = collection if isinstance(collection, Texts) else Texts.passages(collection)
    if not isinstance(queries, Texts):
        queries = Texts.queries(queries)
    texts = dict(queries.items(checked=True))
    check_labels(_as_text(positives), passages)
    retriever = _retriever(model, passages, folder, nbits, overwrite, progress)
    common: Any = {"overwrite": overwrite, "progress": progress}
    ranking = retrieve(retriever, texts, folder / "ranking.tsv", k=k, mode=mode, **common)
    del retriever
    scored = score_ranking(
        ranking.path,
        texts,
        passages,
        teacher,
        folder / "scores.jsonl",
        positives=positives,
        **common,
    )
    return make_examples(
        scored.path,
        folder / "examples.jsonl",
        nway=nway,
        positives=positives,
        seed=seed,
        depth=depth,
        **common,
    )


def _retriever(
    model: ColBERT,
    collection: Texts,
    folder: Path,
    nbits: int | None,
    overwrite: bool,
    progress: bool | None,
) -> Retriever:
    """Open the index in a folder; build it where it is not there, with all processes together."""
    path, meta = folder / "index", folder / "index.meta"
    settings = {
        "stage": "index",
        "collection": collection.fingerprint,
        "model": model.fingerprint(),
        "nbits": nbits,
    }
    with processes.group("the index") as group:
        built = None
        if group.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            there = _build_of(path, overwrite)
            built = there is not None and not overwrite
            if built:
                _check_index(path, there, meta, settings)
            else:  # before the build: it may be killed as soon as the index is there
                write_json(meta, {"settings": settings, "replaces": there})
        built = group.exchange("the index", built)[0]
    if built:
        return Retriever.open(path, model)
    return Retriever.build(
        path,
        model,
        collection.items(),
        nbits=nbits,
        store_texts=False,
        overwrite=overwrite,
        progress=progress,
    )


def _build_of(path: Path, overwrite: bool) -> str | None:
    try:
        return read_build(path)
    except IndexFormatError:
        if overwrite:  # damaged, and to be replaced
            return None
        raise


def _check_index(path: Path, build: str | None, meta: Path, settings: Mapping[str, Any]) -> None:
    """Raises FileExistsError for an index that is of another collection or model, or may be: it
    keeps no texts to be compared."""
    if not present(meta):
        raise FileExistsError(
            f"{path}: {meta.name} is missing, so nobody knows whether the index is of this "
            "collection; name another folder, or pass overwrite=True to make it anew"
        )
    made = read_object(meta)
    if made.get("replaces") == build:
        raise FileExistsError(
            f"{path}: the index that was to be replaced is still there; pass overwrite=True to "
            "make the new one"
        )
    check_settings(made.get("settings"), settings, path, "was made")


# --- The frame of a stage -------------------------------------------------------------------


class _Work(NamedTuple):
    """What a stage does; the first process of the job calls it.

    settings: gives what the file is made from, JSON.
    start: where work is left, gives the number of queries, and a function that makes the block
      whose first query has a number.
    nothing: the error where every query was left out.
    count: the number of queries in a finished file that came without `.meta`.
    finish: called when the file is finished.
    """

    settings: Callable[[], dict[str, Any]]
    start: Callable[[], tuple[int, Callable[[int], Block]]]
    nothing: str = ""
    count: Callable[[Path], int] = lambda file: len(Lines(file))
    finish: Callable[[], None] = lambda: None


def _run(
    name: str, output: str | Path, work: _Work, overwrite: bool, progress: bool | None
) -> Mined:
    """Write a stage's file in the first process, from its last whole block on, and let the other
    processes know."""
    with processes.group(name) as group:
        written = None
        if group.is_first:
            with BlockFile(output, work.settings(), overwrite=overwrite) as file:
                if not file.finished:
                    total, make = work.start()
                    file.fill(make, total, "queries", name, progress)
                    if file.counts["left_out"] == total:
                        raise ValueError(work.nothing)
                    file.publish()
            work.finish()
            written = [str(file.output), *_counts(file, work)]
        path, *counts = group.exchange(name, written)[0]
        return Mined(Path(path), *counts)


def _block(lines: Iterable[str], queries: int, left_out: int = 0) -> Block:
    return Block("".join(lines).encode(), {"queries": queries, "left_out": left_out})


def _counts(file: BlockFile, work: _Work) -> tuple[int, int]:
    """How many queries a finished file has, and how many were left out."""
    if "queries" not in file.counts:
        return work.count(file.output), 0
    left_out = file.counts.get("left_out", 0)
    return file.counts["queries"] - left_out, left_out


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")


def _texts(
    source: Mapping[str, str] | TextsById | str | Path, read: Callable[[str | Path], Texts]
) -> TextsById:
    if isinstance(source, str | Path):
        return read(source)
    return MappedTexts(source) if isinstance(source, Mapping) else source


# --- Retrieval ------------------------------------------------------------------------------


# --- Scores ---------------------------------------------------------------------------------

_Scores = Callable[[int, int], np.ndarray]  # (first, last): of all pairs of queries first..last-1


def _score_pairs(pairs: RankedPairs, teacher: Teacher) -> _Scores:
    def scores(first: int, last: int) -> np.ndarray:
        counts = pairs.counts(first, last)
        queries = [
            text
            for i, count in zip(range(first, last), counts, strict=True)
            for text in [pairs.query(i)] * count
        ]
        return teacher.score(queries, pairs.documents(first, last), progress=False)

    return scores


def _score_by_vectors(
    pairs: RankedPairs,
    teacher: BiEncoder,
    path: Path,
    settings: dict[str, Any],
    batch: int,
    progress: bool | None,
) -> _Scores:
    """Scores of a bi-encoder, whose vectors of the distinct passages it first writes to a file."""
    distinct = np.unique(pairs.rows)
    settings = settings | {"stage": "vectors"}
    try:
        vectors = BlockFile(path, settings)
    except FileExistsError:  # left by another run, of no use
        vectors = BlockFile(path, settings, overwrite=True)

    def block(first: int) -> Block:
        rows = distinct[first : first + batch].tolist()
        texts = [pairs.passages.text(row) for row in rows]
        embedded = teacher.encode_documents(texts, progress=False)
        return Block(np.asarray(embedded, np.float32).tobytes(), {"passages": len(rows)})

    with vectors as file:
        if not file.finished:
            file.fill(block, len(distinct), "passages", "embedding", progress)
            file.publish()
        elif not file.counts:
            raise FileExistsError(f"{path}: exists, and is not of this stage; move it away")
    mapped = np.memmap(path, np.float32, "r", shape=(len(distinct), teacher.dim))

    def scores(first: int, last: int) -> np.ndarray:
        queries = teacher.encode_queries([pairs.query(i) for i in range(first, last)])
        rows = np.repeat(np.arange(last - first), pairs.counts(first, last))
        columns = np.searchsorted(distinct, pairs.rows_of(first, last))
        return teacher.similarity(queries, mapped, rows, columns)

    return scores


def _scored_lines(pairs: RankedPairs, first: int, last: int, scores: np.ndarray) -> list[str]:
    """A line of `scores.jsonl` for each of these queries. Raises ValueError for NaN."""
    scores = np.asarray(scores, np.float32)
    expected = int(pairs.counts(first, last).sum())
    if scores.shape != (expected,):
        raise ValueError(f"the teacher gave scores of shape {scores.shape} for {expected} pairs")
    lines, start = [], 0
    for i in range(first, last):
        pids = pairs.pids(i)
        own = scores[start : start + len(pids)]
        start += len(pids)
        bad = np.flatnonzero(~np.isfinite(own))
        if len(bad):
            raise ValueError(
                f"the teacher gave query {pairs.qids[i]!r:.80} and passage {pids[bad[0]]!r:.80} "
                f"the score {own[bad[0]]}"
            )
        best_first = np.argsort(-own, kind="stable").tolist()
        lines.append(_line(pairs.qids[i], [(pids[n], _shortest(own[n])) for n in best_first]))
    return lines


def _shortest(score: np.float32) -> float:
    """The number with the fewest digits that is the same in float32."""
    return float(str(score))


def _line(qid: str, scored: Iterable[tuple[str, float]]) -> str:
    row = [_json_id(qid), *([_json_id(pid), score] for pid, score in scored)]
    return json.dumps(row, ensure_ascii=False) + "\n"


def _json_id(key: str) -> int | str:
    """An id as a number, where it is a whole number written as numbers are."""
    number = whole_number(key)
    return key if number is None else number


# --- Examples -------------------------------------------------------------------------------


def _example(
    line: str, nway: int, positives: Mapping[str, list[str]] | None, seed: int, depth: int | None
) -> str | None:
    """A line of `examples.jsonl`; None where there are too few passages."""
    qid, scored = _parse_scored(line)
    labelled = set((positives or {}).get(qid, ()))
    best_first = sorted(scored.items(), key=lambda item: -item[1])
    hits = [pid for pid, _ in best_first if pid in labelled]
    if labelled and not hits:
        raise ValueError(
            f"query {qid!r:.80}: none of its labelled passages has a score; pass positives to "
            "score_ranking too"
        )
    positive = hits[0] if labelled else best_first[0][0]
    others = [pid for pid, _ in best_first[:depth] if pid != positive and pid not in labelled]
    if len(others) < nway - 1:
        return None
    # The order of hashes is a random order that any machine and version finds again.
    drawn = sorted(others, key=lambda pid: _draw(seed, qid, pid))[: nway - 1]
    return _line(qid, [(pid, scored[pid]) for pid in (positive, *drawn)])


def _draw(seed: int, qid: str, pid: str) -> bytes:
    return hashlib.blake2b(json.dumps([seed, qid, pid]).encode(), digest_size=16).digest()


def _parse_scored(line: str) -> tuple[str, dict[str, float]]:
    """The query's id, and pid -> score. Raises ValueError, without the place."""
    row = json_value(line)
    if not isinstance(row, list) or len(row) < 2 or not _is_id(row[0]):
        raise ValueError(f"expected '[qid, [pid, score], ...]', got {line[:80]!r}")
    scored: dict[str, float] = {}
    for pair in row[1:]:
        if not isinstance(pair, list) or len(pair) != 2 or not _is_id(pair[0]):
            raise ValueError(f"expected pairs of a passage's id and a score, got {pair!r:.80}")
        pid, score = str(pair[0]), pair[1]
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not math.isfinite(score)
        ):
            raise ValueError(
                f"the score of passage {pid!r:.80} must be a finite number, got {score!r:.80}"
            )
        if pid in scored:
            raise ValueError(f"passage {pid!r:.80} appears twice")
        scored[pid] = float(score)
    return str(row[0]), scored


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


# --- What a file was made from --------------------------------------------------------------


def _as_text(positives: Positives | None) -> dict[str, list[str]] | None:
    """Labels with their ids as strings, in order."""
    if positives is None:
        return None
    for qid, pids in positives.items():
        if isinstance(pids, str):
            raise TypeError(
                f"positives of query {qid!r:.80} must be a collection of ids, got a string"
            )
    return {str(qid): sorted(map(str, pids)) for qid, pids in positives.items()}


def _hash(value: Any) -> str | None:
    if value is None:
        return None
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_queries(queries: Mapping[str, str]) -> None:
    if not queries:
        raise ValueError("there are no queries")
    for qid, text in queries.items():
        _tabless(qid, "query")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"query {qid!r:.80} is empty, or not a string")


def _tabless(key: str, kind: str) -> str:
    if any(mark in key for mark in "\t\r\n"):
        raise ValueError(
            f"the {kind} id {key!r:.80} has a tab or a line end in it, which a ranking cannot hold"
        )
    return key
