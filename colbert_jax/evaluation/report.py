"""What systems reached on collections, as a table for a terminal, Markdown, JSON or a page."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from colbert_jax.evaluation.significance import Comparison

MARK, LEVEL = "*", 0.05
_BAR = 260  # pixels of a full bar


@dataclass(frozen=True)
class SystemResult:
    """One system on one collection.

    values: measure -> qid -> value. ranking: qid -> pid -> score, best first.
    bytes_per_document, queries_per_second: None where they are not known.
    """

    name: str
    values: dict[str, dict[str, float]]
    ranking: dict[str, dict[str, float]] = field(repr=False)
    bytes_per_document: float | None = None
    queries_per_second: float | None = None

    def mean(self, measure: str) -> float:
        """Over all judged queries."""
        return statistics.fmean(self.values[measure].values())

    def line(self, measures: Sequence[str]) -> str:
        """What it reached, for the log: "plaid-2: nDCG@10 0.6512, 36 bytes/doc, 812 queries/s"."""
        parts = [f"{measure} {self.mean(measure):.4f}" for measure in measures]
        size, speed = _costs(self)
        parts += [f"{size} bytes/doc"] if size else []
        parts += [f"{speed} queries/s"] if speed else []
        return f"{self.name}: {', '.join(parts)}"


def _costs(system: SystemResult) -> tuple[str, str]:
    """Bytes a document and queries a second, empty where they are not known."""
    size, speed = system.bytes_per_document, system.queries_per_second
    return (
        "" if size is None else f"{size:,.0f}",
        "" if speed is None else f"{speed:,.{int(speed < 10)}f}",
    )


@dataclass(frozen=True)
class CollectionResult:
    """All systems on one collection.

    about: what was found, one line. notes: see `TestCollection.notes`. settings: of the encoder
      and the search. comparisons: with the baseline, on the first measure; empty for one system.
    """

    name: str
    about: str
    notes: Sequence[str]
    settings: dict[str, Any]
    measures: Sequence[str]
    systems: Sequence[SystemResult]
    comparisons: Sequence[Comparison]

    def differs(self, system: str) -> bool:
        """Whether a system differs from the baseline, by the adjusted p-value."""
        return any(c.system == system and c.adjusted < LEVEL for c in self.comparisons)

    def rows(self) -> list[list[str]]:
        """The table, its head first."""
        head = ["system", *self.measures, "bytes/doc", "queries/s"]
        rows = [head]
        for system in self.systems:
            cells = [f"{system.mean(measure):.4f}" for measure in self.measures]
            cells[0] += MARK * self.differs(system.name)
            rows.append([system.name, *cells, *_costs(system)])
        return rows

    def remark(self) -> str:
        """What the mark means; empty where nothing was compared."""
        if not self.comparisons:
            return ""
        return (
            f"{MARK} differs from {self.comparisons[0].baseline} on {self.measures[0]}: paired "
            f"randomisation test, p < {LEVEL} by Holm's rule"
        )


@dataclass(frozen=True)
class Report:
    """Results on one or many collections."""

    collections: Sequence[CollectionResult]

    def keys(self) -> dict[str, float]:
        """Values under names as NanoBEIR's evaluators have: `NanoSciFact_exact_ndcg@10`.

        `mean_SYSTEM_MEASURE` is over all collections (`NanoBEIR_mean_...` where all are of it), of
        systems and measures that all have.
        """
        values = {
            f"{one.name}_{system.name}_{measure.lower()}": system.mean(measure)
            for one in self.collections
            for system in one.systems
            for measure in one.measures
        }
        if len(self.collections) > 1:
            nano = all(one.name.startswith("Nano") for one in self.collections)
            prefix = "NanoBEIR_mean" if nano else "mean"
            first = self.collections[0]
            for system in first.systems:
                for measure in first.measures:
                    names = [
                        f"{one.name}_{system.name}_{measure.lower()}" for one in self.collections
                    ]
                    if all(name in values for name in names):
                        mean = statistics.fmean(values[name] for name in names)
                        values[f"{prefix}_{system.name}_{measure.lower()}"] = mean
        return values

    def text(self) -> str:
        """Aligned columns."""
        parts = []
        for one in self.collections:
            rows = one.rows()
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            lines = [f"{one.name}: {one.about}"]
            for row in rows:
                cells = [row[0].ljust(widths[0])]
                cells += [
                    cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
                ]
                lines.append("  ".join(cells).rstrip())
            parts.append("\n".join([*lines, *filter(None, [one.remark()])]))
        return "\n\n".join(parts) + "\n"

    def markdown(self) -> str:
        """A table for each collection, with the notes."""
        parts = []
        for one in self.collections:
            head, *rows = (" | ".join(row) for row in one.rows())
            lines = [f"### {one.name}", "", one.about, "", f"| {head} |"]
            lines.append("|---" + "|---:" * (len(one.measures) + 2) + "|")
            lines += [f"| {row} |" for row in rows]
            remark = one.remark()
            lines += ["", remark.replace(MARK, "\\*")] if remark else []
            lines += ["", *(f"- {note}" for note in one.notes)] if one.notes else []
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> dict[str, Any]:
        """All but rankings and the values of single queries."""
        return {
            "keys": self.keys(),
            "collections": [
                {
                    "name": one.name,
                    "about": one.about,
                    "notes": list(one.notes),
                    "settings": one.settings,
                    "systems": [
                        {
                            "name": system.name,
                            "measures": {m: system.mean(m) for m in one.measures},
                            "bytes_per_document": system.bytes_per_document,
                            "queries_per_second": system.queries_per_second,
                        }
                        for system in one.systems
                    ],
                    "comparisons": [c._asdict() for c in one.comparisons],
                }
                for one in self.collections
            ],
        }

    def per_query(self) -> str:
        """TSV of collection, system, measure, qid, value, with a header."""
        lines = ["collection\tsystem\tmeasure\tqid\tvalue"]
        for one in self.collections:
            for system in one.systems:
                for measure in one.measures:
                    for qid, value in system.values[measure].items():
                        lines.append(f"{one.name}\t{system.name}\t{measure}\t{qid}\t{value:.6f}")
        return "\n".join(lines) + "\n"

    def page(self) -> str:
        """A page in one file: tables, bars of the first measure, quality against size."""
        parts = [_HEAD]
        for one in self.collections:
            parts.append(f"<h2>{html.escape(one.name)}</h2><p>{html.escape(one.about)}</p>")
            head, *rows = one.rows()
            parts.append("<table><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head))
            parts.append(f"<th>{html.escape(one.measures[0])}</th></tr>")
            for row, system in zip(rows, one.systems, strict=True):
                cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
                width = round(_BAR * min(system.mean(one.measures[0]), 1))
                bar = f'<div class="bar" style="width:{width}px"></div>'
                parts.append(f'<tr>{cells}<td class="wide">{bar}</td></tr>')
            parts.append(f"</table><p>{html.escape(one.remark())}</p>{_scatter(one)}")
            if one.comparisons:
                parts.append(_tests(one))
            notes = "".join(f"<li>{html.escape(note)}</li>" for note in one.notes)
            parts.append(f"<ul>{notes}</ul>" if notes else "")
        return "\n".join([*parts, "</body></html>\n"])


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child,.wide{text-align:left}
.bar{height:.8rem;background:#3a6ea5}svg text{font:12px system-ui,sans-serif;fill:#222}
</style></head><body><h1>Evaluation</h1>"""


def _scatter(one: CollectionResult) -> str:
    """Quality against bytes a document, on a scale of powers of ten, as SVG."""
    measure = one.measures[0]
    points = [
        (math.log10(size), system.mean(measure), system.name)
        for system in one.systems
        if (size := system.bytes_per_document)
    ]
    if len(points) < 2:
        return ""
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    parts = [
        '<svg width="560" height="240" role="img">'
        '<path d="M60 10V200H540" fill="none" stroke="#888"/>'
        f'<text x="300" y="232" text-anchor="middle">bytes a document, logarithmic: '
        f"{10**left:,.0f} to {10**right:,.0f}</text>"
        f'<text x="4" y="38">{high:.3f}</text><text x="4" y="182">{low:.3f}</text>'
        f'<text x="70" y="10">{html.escape(measure)}</text>'
    ]
    for number, (x, y, name) in enumerate(points):
        across = 80 + 380 * (x - left) / (right - left or 1)
        up = 178 - 144 * (y - low) / (high - low or 1)
        parts.append(
            f'<circle cx="{across:.0f}" cy="{up:.0f}" r="5" fill="#3a6ea5"/>'
            f'<text x="{across:.0f}" y="{up + (18 if number % 2 else -8):.0f}" '
            f'text-anchor="middle">{html.escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def _tests(one: CollectionResult) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(c.system)}</td><td>{c.difference:+.4f}</td><td>{c.t_test:.4f}</td>"
        f"<td>{c.randomisation:.4f}</td><td>{c.adjusted:.4f}</td></tr>"
        for c in one.comparisons
    )
    head = "<th>difference</th><th>t-test</th><th>randomisation</th><th>by Holm's rule</th>"
    against = html.escape(one.comparisons[0].baseline)
    return f"<table><tr><th>against {against}</th>{head}</tr>{rows}</table>"
