"""What lifecycle.py measured, as Markdown tables."""

from __future__ import annotations

from typing import Any

from search_report import _number, _table

RATIO_OF_BUILD = 0.01  # an add, of the build at the largest size
FASTER = 10  # an add, than fast-plaid's
DELETE_SECONDS = 0.05
CHANGED = 1.15  # searching an index after many changes, of searching it compacted
OVERLAP = 0.01  # lost by growing tenfold


def markdown(results: dict[str, Any], ours: str) -> str:
    about = results["about"]
    machine = about["machine"]
    lines = [
        f"`{about['command']}`",
        "",
        f"{about['date']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB,"
        f" {about['threads']} threads; {about['nbits']} bits; k = {about['k']}, {about['queries']} "
        f"queries; medians of {about['rounds']} rounds and more. Cores that anything else on the "
        f"machine kept busy meanwhile: {results['other_load_cores']}.",
        "",
        *(
            f"- {name}: " + ", ".join(f"{k} {v}" for k, v in versions.items())
            for name, versions in about["versions"].items()
            if versions
        ),
        "",
        *_noise(results["sizes"]),
        "## Bars",
        "",
    ]
    head = ["what", "bar", "measured (wall)", "in processor time", "met"]
    lines += _table(
        head, [[*row[:4], "yes" if row[4] else "**no**"] for row in bars(results, ours)]
    )
    sizes = results["sizes"]
    if any("changes" in size for size in sizes.values()):
        lines += ["", f"## Changes of {about['count']} documents, embeddings ready", ""]
        lines += _changes(sizes, ours)
    if any("search" in size for size in sizes.values()):
        lines += ["", f"## Searching after {about['adds']} adds and 20 % deletes", ""]
        lines += _search(sizes)
    if any("filters" in size for size in sizes.values()):
        lines += ["", "## Filters", ""]
        lines += _filters(sizes)
    if "growth" in results:
        lines += ["", f"## Overlap@{about['k']} after growing tenfold", "", *_growth(results)]
    if results.get("quality"):
        lines += ["", "## nDCG@10 after growing tenfold", "", *_quality(results)]
    return "\n".join(lines) + "\n"


def _noise(sizes: dict[str, Any]) -> list[str]:
    return [
        f"**{int(size):,} passages are {found['real']:,} real ones, repeated with noise.**\n"
        for size, found in sizes.items()
        if found["real"] < int(size)
    ]


def bars(results: dict[str, Any], ours: str) -> list[tuple[str, str, str, str, bool]]:
    """What was asked for: what, the bar, what was measured, the same in CPU time, and if met."""
    rows: list[tuple[str, str, str, str, bool]] = []
    about, sizes = results["about"], results["sizes"]
    largest = max(sizes, key=int)
    count = about["count"]
    for size, found in sizes.items():
        if "changes" not in found:
            continue
        mine, built = found["changes"][ours], found["builds"][ours]
        if size == largest:
            share = [mine["add"][t] / built[t] for t in ("seconds", "cpu_seconds")]
            bar = f"at most {RATIO_OF_BUILD:.0%} of the build"
            values = (f"{100 * s:.2f} %" for s in share)
            rows.append((f"add {count} to {int(size):,}", bar, *values, share[0] <= RATIO_OF_BUILD))
        for peer in found["changes"]:
            if peer == "fast-plaid":
                times = found["changes"][peer]["add"]["ratio"]
                what = f"add {count} to {int(size):,}, beside fast-plaid"
                values = (f"{times[t]:.1f}x" for t in ("seconds", "cpu_seconds"))
                rows.append((what, f"{FASTER}x faster", *values, times["seconds"] >= FASTER))
        if size == largest:
            took = mine["delete"]
            values = (f"{1e3 * took[t]:.1f} ms" for t in ("seconds", "cpu_seconds"))
            bar = f"below {1e3 * DELETE_SECONDS:.0f} ms"
            what = f"delete {count} of {int(size):,}"
            rows.append((what, bar, *values, took["seconds"] < DELETE_SECONDS))
    for size, found in sizes.items():
        for batch, times in found.get("search", {}).get("searches", {}).get("changed", {}).items():
            slower = times["ratio"]
            values = (f"{slower[t]:.2f}x" for t in ("seconds", "cpu_seconds"))
            what = f"search after changes, {int(size):,}, batch {batch}"
            rows.append((what, f"at most {CHANGED}x", *values, slower["seconds"] <= CHANGED))
    for size, found in sizes.items():
        for batch, times in found.get("filters", {}).get("searches", {}).get("1 %", {}).items():
            slower = times["ratio"]
            values = (f"{slower[t]:.2f}x" for t in ("seconds", "cpu_seconds"))
            what = f"filter that keeps 1 %, {int(size):,}, batch {batch}"
            rows.append((what, "below 1x", *values, slower["seconds"] < 1))
    if "growth" in results:
        fresh, *others = results["growth"]["rows"]
        for row in others:
            lost = fresh["overlap_accurate"] - row["overlap_accurate"]
            what = f"overlap after {row['adds']} adds, beside a build"
            rows.append((what, f"at most {OVERLAP} less", f"{lost:+.4f} less", "", lost <= OVERLAP))
    return rows


def _pair(times: dict[str, float], digits: int = 1, scale: float = 1e3) -> list[str]:
    return [_number(scale * times[t], digits) for t in ("seconds", "cpu_seconds")]


def _changes(sizes: dict[str, Any], ours: str) -> list[str]:
    names = ("add", "delete", "update")
    head = ["documents", "system", "build s", "CPU s"]
    head += [h for name in names for h in (f"{name} ms", "CPU ms", "times ours")]
    rows, grown = [], False
    for size, found in sizes.items():
        for system, changes in found.get("changes", {}).items():
            built = found["builds"][system]
            grown = grown or built["grown"]
            cells = _pair(built, 0, 1)
            rows.append([f"{int(size):,}", system])
            rows[-1] += [f"({cell})" for cell in cells] if built["grown"] else cells
            for name in names:
                rows[-1] += _pair(changes[name])
                times = changes[name].get("ratio")
                rows[-1].append("" if times is None else f"{times['seconds']:.1f}")
    lines = _table(head, rows)
    most = max(len(found.get("changes", {})) for found in sizes.values())
    alone = [size for size, found in sizes.items() if 1 == len(found.get("changes", {})) < most]
    if alone:
        lines += ["", f"No peer was measured at {', '.join(f'{int(size):,}' for size in alone)}."]
    lines += [
        "",
        "A change is timed until it is on disk and the process that made it searches it. "
        "fast-plaid has no ids and no update: a delete moves all later documents, and its update "
        "is a delete and an add.",
    ]
    if grown:
        lines.append("In brackets: the smallest index and one add of all others, not a build.")
    return lines


def _search(sizes: dict[str, Any]) -> list[str]:
    head = ["documents", "batch", "compacted ms/query", "CPU ms", "changed ms/query", "CPU ms"]
    head += ["ratio", "ratio of CPU"]
    rows, notes = [], []
    for size, found in sizes.items():
        if "search" not in found:
            continue
        run = found["search"]
        for batch, clean in run["searches"]["clean"].items():
            changed = run["searches"]["changed"][batch]
            rows.append([f"{int(size):,}", batch, *_pair(clean, 2), *_pair(changed, 2)])
            rows[-1] += [f"{changed['ratio'][t]:.2f}" for t in ("seconds", "cpu_seconds")]
        opened, compact = run["open"], run["compact"]
        speed = compact["bytes_before"] / compact["seconds"] / 1e6
        notes += [
            "",
            f"{int(size):,}: {run['documents']:,} documents are left, "
            f"{run['unlisted_documents']:,} of all are not in the inverted lists on disk. Both "
            f"find the same {100 * run['same_answers']:.2f} % of the time. An add took "
            f"{1e3 * run['adds_seconds']:.0f} ms. Opening: "
            f"{1e3 * opened['changed']['seconds']:.1f} ms (CPU "
            f"{1e3 * opened['changed']['cpu_seconds']:.1f}), compacted "
            f"{1e3 * opened['clean']['seconds']:.1f} ms (CPU "
            f"{1e3 * opened['clean']['cpu_seconds']:.1f}). Compacting: {compact['seconds']:.2f} s "
            f"(CPU {compact['cpu_seconds']:.2f}), {speed:.0f} MB/s of the "
            f"{compact['bytes_before'] / 1e6:.0f} MB that it read; "
            f"{compact['bytes_after'] / 1e6:.0f} MB are left.",
        ]
    return [*_table(head, rows), *notes]


def _filters(sizes: dict[str, Any]) -> list[str]:
    head = ["documents", "keeps", "filter ms", "CPU ms", "batch", "search ms/query", "CPU ms"]
    head += ["of unfiltered", "of CPU", "of the exact best"]
    rows = []
    for size, found in sizes.items():
        if "filters" not in found:
            continue
        run = found["filters"]
        for name, batches in run["searches"].items():
            for batch, times in batches.items():
                select = run["select"].get(name)
                rows.append([f"{int(size):,}", name])
                rows[-1] += ["", ""] if select is None else _pair(select, 2)
                rows[-1] += [batch, *_pair(times, 2)]
                rows[-1] += [f"{times['ratio'][t]:.2f}" for t in ("seconds", "cpu_seconds")]
                rows[-1].append("" if select is None else f"{run['overlap_exact'][name]:.3f}")
    lines = _table(head, rows)
    return [
        *lines,
        "",
        "The filter is evaluated once for as many queries as one likes; its time is not in the "
        'search\'s. Last column: what mode="exact" finds under the same filter.',
    ]


def _growth(results: dict[str, Any]) -> list[str]:
    head = [
        "documents",
        "made by",
        "centroids",
        "outliers",
        "fast",
        "accurate",
        "exact",
        "s",
        "CPU s",
    ]
    rows = []
    for row in results["growth"]["rows"]:
        cells = [f"{results['growth']['documents']:,}", _made(row), f"{row['num_centroids']:,}"]
        cells += [f"{row['outliers']:.1%}"]
        cells += [f"{row[f'overlap_{mode}']:.4f}" for mode in ("fast", "accurate", "exact")]
        rows.append([*cells, *_pair(row, 1, 1)])
    return _table(head, rows)


def _quality(results: dict[str, Any]) -> list[str]:
    head = ["collection", "documents", "made by", "centroids", "outliers", "accurate", "exact"]
    rows = []
    for run in results["quality"]:
        for row in run["rows"]:
            rows.append([run["collection"], f"{run['documents']:,}", _made(row)])
            rows[-1] += [f"{row['num_centroids']:,}", f"{row['outliers']:.1%}"]
            rows[-1] += [f"{row[mode]:.4f}" for mode in ("accurate", "exact")]
    return _table(head, rows)


def _made(row: dict[str, Any]) -> str:
    return f"a tenth and {row['adds']} adds" if row["adds"] else "one build"
