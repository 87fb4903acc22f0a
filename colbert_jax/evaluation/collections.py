"""Systems measured on test collections: the tables of the papers, from one call."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from colbert_jax.colbert import ColBERT
from colbert_jax.data.published import TestCollection
from colbert_jax.evaluation.metrics import measure_queries, parse_measures
from colbert_jax.evaluation.presets import preset_of, queries_are_documents
from colbert_jax.evaluation.report import CollectionResult, Report, SystemResult
from colbert_jax.evaluation.significance import compare
from colbert_jax.evaluation.systems import SYSTEMS, Outcome, Ranking, Workbench, check_systems
from colbert_jax.progress import LOGGER


def evaluate_collections(
    collections: Iterable[TestCollection],
    model: ColBERT | None = None,
    systems: Sequence[str] = SYSTEMS,
    *,
    runs: Mapping[str, Ranking] | None = None,
    measures: Sequence[str] | None = None,
    preset: str | None = None,
    query_maxlen: int | None = None,
    doc_maxlen: int | None = None,
    mode: str = "accurate",
    ignore_self: bool | None = None,
    baseline: str | None = None,
    folder: str | Path | None = None,
) -> Report:
    """Measure systems on collections, and compare them by paired tests.

    The token embeddings of a collection are held in memory; for larger ones build an index, and
    measure it with `colbert-jax evaluate INDEX --queries FILE --qrels FILE`.

    Args:
      collections: see `read_test_collection`.
      model: the encoder; None if only BM25 or runs are measured.
      systems: of `bm25`; `single`, the mean of the token embeddings, as one vector; `exact` MaxSim
        of raw token embeddings; `plaid-1`, `-2`, `-4`, `-8`, an index at so many bits.
      runs: further systems by name: qid -> pid -> score, best first, as `read_run` gives.
      measures: any of ir-measures; if None, those of the preset. The first is compared.
      preset: a name in `PRESETS`; if None, by the collection's form.
      query_maxlen, doc_maxlen: tokens; if None, those of the preset, as far as the encoder has
        positions.
      mode: of PLAID, see `Retriever.search`.
      ignore_self: leave out the document whose id is the query's; if None, for ArguAna and Quora.
      baseline: what others are compared with; if None, `exact`, or the first.
      folder: keeps indexes; if None, they are removed.

    Raises:
      ImportError: what measures, or a system, is not installed.
      ValueError: an unknown name, a run without a judged query.
    """
    check_systems(systems)
    names = [*systems, *(runs or {})]
    if not names:
        raise ValueError("nothing to measure: give systems or runs")
    if len(set(names)) < len(names):
        raise ValueError(f"two systems have one name: {', '.join(names)}")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline {baseline!r:.60}: expected one of {', '.join(names)}")
    if model is None and set(systems) - {"bm25"}:
        raise ValueError("systems other than bm25 need a model")
    parse_measures(measures or ())
    results = []
    for one in collections:
        chosen = preset_of(one, preset)
        lengths = {
            "query_maxlen": query_maxlen or chosen.query_maxlen,
            "doc_maxlen": doc_maxlen or chosen.doc_maxlen,
        }
        notes = list(one.notes)
        encoder = None if model is None else _with_lengths(model, lengths, notes)
        own = queries_are_documents(one) if ignore_self is None else ignore_self
        if own:
            notes.append("the document whose id is the query's is left out")
        asked = tuple(measures or chosen.measures)
        rows = []
        given = ((name, Outcome(ranking, None, None)) for name, ranking in (runs or {}).items())
        found = _outcomes(one, encoder, systems, chosen.depth + own, mode, folder)
        for name, outcome in chain(found, given):
            rows.append(_measured(name, outcome, one, asked, own))
            LOGGER.info("%s: %s", one.name, rows[-1].line(asked))
        against = baseline or ("exact" if "exact" in names else names[0])
        tests = compare({row.name: row.values[asked[0]] for row in rows}, against)
        settings: dict[str, Any] = {"depth": chosen.depth, "mode": mode, "ignore_self": own}
        if encoder is not None:
            text = encoder.config.text
            settings |= {"query_maxlen": text.query_maxlen, "doc_maxlen": text.doc_maxlen}
            settings["checkpoint"] = encoder.load["name_or_path"]
        results.append(
            CollectionResult(one.name, one.describe(), notes, settings, asked, rows, tests)
        )
    return Report(results)


def _with_lengths(model: ColBERT, lengths: Mapping[str, int | None], notes: list[str]) -> ColBERT:
    """The model with other lengths, as far as it has positions."""
    most = model.positions
    wanted: dict[str, int] = {}
    for name, length in lengths.items():
        if length is not None and length > most:
            notes.append(f"{name} is {most}, not {length}: the encoder has no more positions")
        if length is not None and min(length, most) != getattr(model.config.text, name):
            wanted[name] = min(length, most)
    return ColBERT.from_pretrained(**(dict(model.load) | wanted)) if wanted else model


def _outcomes(
    one: TestCollection,
    model: ColBERT | None,
    systems: Sequence[str],
    depth: int,
    mode: str,
    folder: str | Path | None,
) -> Iterator[tuple[str, Outcome]]:
    """Names of systems and what they found, each as soon as it is done."""
    if not systems:
        return
    ids, texts = zip(*((pid, text) for pid, text, _ in one.documents()), strict=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary if folder is None else folder)
        if folder is not None and model is not None:
            place = place / f"{one.name}-{model.fingerprint()}"
            place.mkdir(parents=True, exist_ok=True)
        bench = Workbench(ids, texts, one.queries, model, place, mode=mode)
        for name in systems:
            LOGGER.info("%s: %s", one.name, name)
            yield name, bench.run(name, depth)


def _measured(
    name: str, outcome: Outcome, one: TestCollection, measures: Sequence[str], own: bool
) -> SystemResult:
    missing = one.queries.keys() - outcome.ranking.keys()
    if missing:
        warnings.warn(
            f"{name}: {len(missing)} of {len(one.queries)} judged queries of {one.name} have no "
            f"results, {min(missing)!r:.60} for example: they count as 0",
            stacklevel=3,
        )
    ranking = {qid: list(found) for qid, found in outcome.ranking.items()}
    values = measure_queries(ranking, one.qrels, measures, ignore_self=own)
    kept = {
        qid: {pid: score for pid, score in found.items() if not (own and pid == qid)}
        for qid, found in outcome.ranking.items()
    }
    return SystemResult(name, values, kept, outcome.bytes_per_document, outcome.queries_per_second)
