"""Run files: what a search returned, for trec_eval and its kin, or for Stanford ColBERT's tools."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from colbert_jax.data.streams import numbered_lines
from colbert_jax.files import writing
from colbert_jax.index.columns import Column
from colbert_jax.retriever import Hit

FORMATS = ("trec", "stanford")
_TAG = "colbert_jax"
# What must not be in an id: the tools split lines there.
_SPLITS = {"trec": re.compile(r"\s|^$"), "stanford": re.compile(r"[\t\n\r]|^$")}


def write_run(
    path: str | Path,
    found: Mapping[str, Sequence[Hit]] | Iterable[tuple[str, Sequence[Hit]]],
    format: str = "trec",
) -> int:
    """Write the hits of queries, as they come.

    The order is the hits'. Tools sort by the scores again, so where these are equal in single
    precision, which is what the tools keep, the lower hit's is written a little smaller.

    Args:
      path: a file, which is there when all is written; a pipe or device is written to at once.
      found: query id -> hits, best first; or pairs of them.
      format: "trec", lines of `qid Q0 pid rank score tag`; or "stanford", of `qid, pid, rank,
        score` with tabs between. Ranks count from 1.

    Returns:
      how many hits were written.

    Raises:
      ValueError: an id that the format has no place for, see `check_run_ids`.
    """
    with writing(path) as stream:
        return write_hits(stream, found, format)


def write_hits(
    stream: IO[str],
    found: Mapping[str, Sequence[Hit]] | Iterable[tuple[str, Sequence[Hit]]],
    format: str = "trec",
) -> int:
    """`write_run` into an open stream."""
    form = check_format(format)
    total = 0
    for qid, hits in found.items() if isinstance(found, Mapping) else found:
        check_run_ids([qid], "query", form)
        check_run_ids([hit.id for hit in hits], "document", form)
        scores = map(str, falling([hit.score for hit in hits]))
        for rank, (hit, score) in enumerate(zip(hits, scores, strict=True), 1):
            if form == "trec":
                stream.write(f"{qid} Q0 {hit.id} {rank} {score} {_TAG}\n")
            else:
                stream.write(f"{qid}\t{hit.id}\t{rank}\t{score}\n")
        total += len(hits)
    return total


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a run file: qid -> pid -> score, best first.

    TREC's six columns are ordered as trec_eval orders them: by scores in single precision, equal
    ones by the larger id. Stanford's `qid, pid, rank[, score]` (MS MARCO's has three) are ordered
    by rank; without a score it is minus the rank.

    Args:
      path: a file, perhaps packed (.gz, .zst).

    Raises:
      ValueError: a line of another form, a document twice for a query, an empty file.
    """
    rows: dict[str, dict[str, tuple[float, float, int]]] = {}  # order, score, line
    form = 0
    for number, line in numbered_lines(Path(path)):
        where = f"{path}, line {number}"
        fields = list(map(str.strip, line.rstrip().split("\t")))
        if len(fields) not in (3, 4):
            fields = line.split()
        if len(fields) not in ((form,) if form else (3, 4, 6)):
            expected = {6: "qid Q0 pid rank score tag", 4: "qid pid rank score", 3: "qid pid rank"}
            either = expected[form] if form else "' or '".join(expected.values())
            raise ValueError(f"{where}: expected '{either}', got {line[:80]!r}")
        form = len(fields)
        qid, pid, rank, *more = (fields[0], *fields[2:5]) if form == 6 else fields
        try:
            place, score = int(rank), float(more[0]) if more else -float(rank)
        except ValueError:
            raise ValueError(f"{where}: expected a rank and a score, got {line[:80]!r}") from None
        if score != score:
            raise ValueError(f"{where}: the score is not a number")
        query = rows.setdefault(qid, {})
        if pid in query:
            raise ValueError(
                f"{where}: document {pid!r:.80} again for query {qid!r:.80}, first on line "
                f"{query[pid][2]}"
            )
        query[pid] = (float(-np.float32(score)) if form == 6 else float(place), score, number)
    if not rows:
        raise ValueError(f"{path}: no results")
    run = {}
    for qid, query in rows.items():
        order = sorted(query, reverse=True) if form == 6 else list(query)
        order.sort(key={pid: values[0] for pid, values in query.items()}.__getitem__)
        run[qid] = {pid: query[pid][1] for pid in order}
    return run


def check_format(format: str) -> str:
    """Give the format itself. Raises ValueError for an unknown one."""
    if format not in FORMATS:
        raise ValueError(f"a run's format must be one of {FORMATS}, got {format!r}")
    return format


def check_run_ids(ids: Iterable[str], kind: str, format: str) -> None:
    """Raises ValueError, with an example, for ids that a run file has no place for.

    Args:
      kind: what has the ids, for the message.
    """
    splits = _SPLITS[check_format(format)]
    if isinstance(ids, Column):
        place = ids.find(splits)
        bad = None if place is None else ids[place]
    else:
        bad = next((identity for identity in ids if splits.search(identity)), None)
    if bad is None:
        return
    if not bad:
        raise ValueError(f"a {kind} has an empty id, which a run file can not hold")
    remedy = "; format stanford has tabs between columns" if format == "trec" else ""
    if remedy and _SPLITS["stanford"].search(bad):
        remedy = ""
    what = "white space" if format == "trec" else "a tab or a line end"
    raise ValueError(
        f"{kind} id {bad!r:.60} has {what} in it, where the tools that read run files split a "
        f"line{remedy}"
    )


def falling(scores: Sequence[float]) -> np.ndarray:
    """float32: the scores, each below the one before it, by the least step if it was not."""
    single = np.asarray(scores, np.float32)
    if (np.diff(single) >= 0).any():
        lowest = np.float32(-np.inf)
        for i in range(1, len(single)):
            if single[i] >= single[i - 1]:
                single[i] = np.nextafter(single[i - 1], lowest)
    return single
