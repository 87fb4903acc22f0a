"""What search.py measured, as Markdown tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any


def markdown(results: dict[str, Any], ours: str) -> str:
    about = results["about"]
    machine = about["machine"]
    lines = [
        f"`{about['command']}`",
        "",
        f"{about['date']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB,"
        f" {about['threads']} threads; {about['nbits']} bits; overlap over {about['queries']} "
        f"queries; load average before: {about['load_average_before']:.2f}.",
        "",
    ]
    for name, versions in about["versions"].items():
        lines.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    lines += [f"- {name}: {why}" for name, why in about["missing"].items()]
    for run in results["runs"]:
        lines += _run(run, about["batches"], ours)
    if results.get("exponents"):
        rows = [[e["system"], e["of"], f"{e['exponent']:.2f}"] for e in results["exponents"]]
        lines += ["", "### Growth", "", "Exponent of time in the number of passages.", ""]
        lines += _table(["system", "time of", "exponent"], rows)
    return "\n".join(lines) + "\n"


def _run(run: dict[str, Any], batches: list[int], ours: str) -> list[str]:
    lines = ["", f"## {run['passages']:,} passages, {run['tokens']:,} tokens", "", "### Building"]
    rows = [
        [
            build["system"],
            _number(build["seconds"], 1),
            _number(build.get("cpu_seconds"), 1),
            _number(build["bytes"] / 1e6, 1),
            _number(build["bytes_per_token"], 1),
            _number(build.get("peak_mb"), 0),
            _number(build.get("start_mb"), 0),
            _number(build.get("other_load_cores"), 2),
        ]
        for build in run["builds"]
    ]
    head = ["system", "s", "CPU s", "MB on disk", "bytes/token", "peak MB", "MB before", "others"]
    lines += ["", *_table(head, rows), "", "### Searching", ""]
    lines += [f"Cores busy with anything else meanwhile: {run['other_load_cores']}.", ""]
    head = ["system", "settings", "k", "overlap", "ms", "p95 ms"]
    head += [f"q/s, batch {batch}" for batch in batches] + ["CPU ms/query", "timed", "peak MB"]
    rows = []
    for row in _sorted(run["searches"]):
        times = row["batches"]
        one = times["1"]
        rows.append([row["system"], _settings(row), str(row["k"]), f"{row['overlap']:.4f}"])
        rows[-1] += [_number(one["call_ms_median"], 2), _number(one["call_ms_p95"], 2)]
        rows[-1] += [_rate(times.get(str(batch))) for batch in batches]
        rows[-1] += [
            " / ".join(_number(t["cpu_ms_per_query"], 2) for t in times.values()),
            " / ".join(str(t["queries"]) for t in times.values()),
            _number(row["peak_mb"], 0),
        ]
    lines += _table(head, rows)
    lines += ["", "Rates in brackets: one query after the other, for want of batches."]
    matched = match(_sorted(run["searches"]), ours, batches)
    if matched:
        lines += ["", f"### The fastest of {ours} at no less overlap", ""]
        head = ["peer", "its settings", "k", "batch", "overlap", "q/s"]
        head += [f"settings of {ours}", "overlap", "q/s", "ratio"]
        lines += _table(head, [_matched(*found) for found in matched])
        lines += ["", f"Ratios in brackets: no setting of {ours} reaches the peer's overlap."]
    return lines


def _sorted(searches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By k and system, the defaults of each before its other settings in order of overlap."""
    names = list(dict.fromkeys(row["system"] for row in searches))
    return sorted(
        searches,
        key=lambda row: (row["k"], names.index(row["system"]), not row["default"], row["overlap"]),
    )


def match(searches: list[dict[str, Any]], ours: str, batches: Iterable[int]) -> list[tuple]:
    """(batch, peer's row, our row) for each row of a peer.

    Our row is the one of the same k with the most queries per second among those whose overlap is
    not below the peer's; where there is none, the one with the highest overlap.
    """
    found = []
    for peer in searches:
        mine = [row for row in searches if row["system"] == ours and row["k"] == peer["k"]]
        if peer["system"] == ours or not mine:
            continue
        least = min(peer["overlap"], max(row["overlap"] for row in mine))
        enough = [row for row in mine if row["overlap"] >= least]
        for batch in map(str, batches):
            if batch in peer["batches"]:
                found.append((batch, peer, max(enough, key=partial(_speed, batch=batch))))
    return found


def _speed(row: dict[str, Any], batch: str) -> float:
    return row["batches"][batch]["queries_per_second"]


def _matched(batch: str, peer: dict[str, Any], best: dict[str, Any]) -> list[str]:
    speed, theirs = _speed(best, batch), _speed(peer, batch)
    row = [peer["system"], _settings(peer), str(peer["k"]), batch, f"{peer['overlap']:.4f}"]
    row += [_number(theirs, 1), _settings(best), f"{best['overlap']:.4f}", _number(speed, 1)]
    ratio = f"{speed / theirs:.2f}"
    return [*row, ratio if best["overlap"] >= peer["overlap"] else f"({ratio})"]


def _settings(row: dict[str, Any]) -> str:
    text = " ".join(f"{_short(name)}={value}" for name, value in row["settings"].items())
    return ("defaults" + (f" ({text})" if text else "")) if row["default"] else text


def _short(name: str) -> str:
    return {"centroid_score_threshold": "threshold"}.get(name, name)


def _rate(times: dict[str, Any] | None) -> str:
    if times is None:
        return "-"
    rate = _number(times["queries_per_second"], 1)
    return rate if times["one_call"] else f"({rate})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def picture(results: dict[str, Any], file: Path) -> None:
    """Overlap against queries per second: a row of panels for each k, a column for each batch size.

    Every point is one group of settings, the line of a system joins those that no other of its own
    beats in both, and a star is its defaults.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (run,) = results["runs"]
    batches = results["about"]["batches"]
    ks = sorted({row["k"] for row in run["searches"]})
    names = list(dict.fromkeys(row["system"] for row in run["searches"]))
    size = (5.2 * len(batches), 3.8 * len(ks) + 0.4)
    figure, axes = plt.subplots(len(ks), len(batches), figsize=size, sharey="row", squeeze=False)
    for k, row in zip(ks, axes, strict=True):
        for batch, axis in zip(map(str, batches), row, strict=True):
            _panel(axis, [r for r in run["searches"] if r["k"] == k], names, batch)
            axis.set_title("one query at a time" if batch == "1" else f"batches of {batch}")
        row[0].set_ylabel(f"overlap@{k} with exact scoring")
    for axis in axes[-1]:
        axis.set_xlabel("queries per second")
    axes[0][0].legend(title="star: defaults")
    machine = results["about"]["machine"]
    figure.suptitle(
        f"{run['passages']:,} passages, {results['about']['nbits']} bits; "
        f"{machine['cpu']}, {results['about']['threads']} threads"
    )
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]], names: list[str], batch: str) -> None:
    """One k and one batch size."""
    for colour, name in enumerate(names):
        points = sorted(
            (_speed(row, batch), row["overlap"], row["default"])
            for row in rows
            if row["system"] == name and batch in row["batches"]
        )
        if not points:
            continue
        style = f"C{colour}"
        front = [p for i, p in enumerate(points) if all(q[1] < p[1] for q in points[i + 1 :])]
        axis.plot(*zip(*[p[:2] for p in front], strict=True), color=style, label=name)
        axis.scatter(*zip(*[p[:2] for p in points], strict=True), color=style, s=14)
        stars = [p[:2] for p in points if p[2]]
        if stars:
            axis.scatter(*zip(*stars, strict=True), color=style, marker="*", s=150, zorder=3)
    axis.set_xscale("log")
    axis.grid(True, which="both", alpha=0.25)
