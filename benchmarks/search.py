"""Search engines side by side: the same embeddings built into each and searched by each.

    python benchmarks/search.py CACHE --passages 10000 [--peer fast-plaid=PYTHON] \
        [--peer colbert-ai=PYTHON] [--peer torch=PYTHON] [--output benchmarks/results/search_cpu]
    python benchmarks/search.py CACHE --growth 10000,30000,100000 [--output FILE]

CACHE is a folder that `benchmarks/passages.py` filled. Installs nothing: a peer is run by the
PYTHON given for it, else by this one where it has the peer, else it is listed as not installed.
benchmarks/README.md says how to install each and what the columns mean. Writes OUTPUT.json with
everything, OUTPUT.md with the tables and OUTPUT.png with a picture. `--growth` measures this
library and exact scoring by torch only, at their defaults, at each size.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import numpy as np
import search_data
from search_process import OtherLoad, PeerError, Process
from search_report import markdown, picture

ADAPTERS = {
    "colbert-jax": "colbert_jax_",
    "colbert-jax-other": "colbert_jax_",
    "fast-plaid": "fast_plaid_",
    "xtr-warp": "xtr_warp_",
    "tachiom": "tachiom_",
    "colbert-ai": "colbert_ai",
    "lancedb": "lancedb_",
    "qdrant": "qdrant_",
    "torch": "exact_torch",
}
PACKAGES = {
    "fast-plaid": "fast_plaid",
    "xtr-warp": "xtr_warp",
    "tachiom": "tachiom",
    "colbert-ai": "colbert",
    "lancedb": "lancedb",
    "qdrant": "qdrant_client",
    "torch": "torch",
}
OURS = "colbert-jax"
OTHER = "colbert-jax-other"  # another version of this library, of the PYTHON that --peer names
LEAST = 16  # timed queries of a setting, however slow
ANSWERS_BATCH = 64


@dataclass
class System:
    name: str
    python: str
    about: dict[str, Any] = field(default_factory=dict)
    started: Process | None = None  # has imported the peer and done nothing else


@dataclass
class Point:
    """One system with one group of settings at one k, and what was measured of it."""

    system: str
    k: int
    settings: dict[str, Any]
    default: bool
    process: Process
    one_call: bool  # takes many queries in one call
    warm: int = 0  # the batch size that it has seen
    query_seconds: float = 0.0
    measured: dict[str, Any] = field(default_factory=dict)
    calls: dict[int, list[float]] = field(default_factory=dict)
    rates: dict[int, list[float]] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)


def main() -> None:
    args = parse()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.cache)))
        systems, missing = find_systems(args, work, stack)
        results: dict[str, Any] = {"about": about(systems, missing, args), "runs": []}
        for passages in args.growth or [args.passages]:
            results["runs"].append(run(systems, passages, args, work))
        if args.growth:
            results["exponents"] = exponents(results["runs"])
    report = markdown(results, OURS)
    print(report)
    if args.output:
        # Not with_suffix: a dot in the name is no suffix.
        Path(f"{args.output}.json").write_text(json.dumps(results, indent=1) + "\n")
        Path(f"{args.output}.md").write_text(report)
        if not args.growth:
            picture(results, Path(f"{args.output}.png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, help="what benchmarks/passages.py filled")
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--growth", type=_integers, help="sizes, such as 10000,30000,100000")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"the interpreter that has it: {', '.join((*PACKAGES, OTHER))}",
    )
    parser.add_argument("--without", default="", help="leave these systems out, comma between")
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--k", type=_integers, default=[10, 100])
    parser.add_argument("--batches", type=_integers, default=[64], help="sizes beside 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="of timing, for each setting and batch size"
    )
    parser.add_argument(
        "--longest-call",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="a batch that would take longer is not measured",
    )
    parser.add_argument("--defaults-only", action="store_true", help="no sweep of settings")
    parser.add_argument("--threads", type=int, default=_cores())
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--reuse-index", action="store_true", help="keep the peers' indexes in CACHE/indexes"
    )
    parser.add_argument(
        "--stanford-index", type=Path, help="a Stanford index that colbert-ai searches, not its own"
    )
    parser.add_argument("--output", type=Path, help="without suffix")
    args = parser.parse_args()
    for name in ("passages", "queries", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not args.cache.is_dir():
        parser.error(f"{args.cache}: not a folder; fill one with benchmarks/passages.py")
    for given in args.peer:
        if given.partition("=")[0] not in (*PACKAGES, OTHER) or "=" not in given:
            names = ", ".join((*PACKAGES, OTHER))
            parser.error(f"--peer {given}: not NAME=PYTHON with NAME one of {names}")
    if args.output and importlib.util.find_spec("matplotlib") is None and not args.growth:
        parser.error('the picture needs matplotlib: pip install "colbert-jax[notebook]"')
    args.batches = sorted({1, *args.batches})
    return args


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_systems(
    args: argparse.Namespace, work: Path, stack: contextlib.ExitStack
) -> tuple[list[System], dict[str, str]]:
    """What can be measured, each with a process that `stack` ends, and why the others cannot."""
    given = dict(peer.split("=", 1) for peer in args.peer)
    wanted = (OURS, "torch") if args.growth else tuple(ADAPTERS)
    wanted = tuple(name for name in wanted if name != OTHER or OTHER in given)
    systems, missing = [], {}
    for name in wanted:
        if name in args.without.split(","):
            missing[name] = "left out"
        elif name != OURS and name not in given and not importlib.util.find_spec(PACKAGES[name]):
            missing[name] = "not installed"
        else:
            systems.append(System(name, given.get(name, sys.executable)))
    for system in systems:
        try:
            system.started = stack.enter_context(_start(system, args, work))
        except OSError as error:
            raise SystemExit(f"{system.python} cannot run {system.name}: {error}") from None
    for system in list(systems):
        assert system.started
        try:
            system.about = system.started.ask("about")
        except PeerError as error:
            if system.name in given or system.name == OURS:
                raise SystemExit(f"{system.python} cannot run {system.name}: {error}") from None
            print(error, file=sys.stderr)
            missing[system.name] = "not usable here"
            systems.remove(system)
    return systems, missing


def _start(system: System, args: argparse.Namespace, work: Path) -> Process:
    """A process that has done nothing yet."""
    log = work / f"{system.name}.log"
    adapter = ADAPTERS[system.name]
    if system.started:
        process, system.started = system.started, None
        return process
    return Process(system.name, system.python, adapter, log, args.threads, args.device)


def run(
    systems: list[System], passages: int, args: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """Build and search at one size."""
    data = work / "data"
    data.mkdir(exist_ok=True)
    depth = max(args.k)
    tokens, check, exact = search_data.prepare(args.cache, passages, args.queries, data, depth)
    out: dict[str, Any] = {"passages": passages, "tokens": tokens, "builds": [], "searches": []}
    folders = {}
    for system in systems:
        name = f"{system.name}-{passages}-{args.nbits}bits-{check}"
        folders[system.name], record = build(system, data, name, tokens, args, work)
        out["builds"].append(record)
    with contextlib.ExitStack() as stack:
        processes = {s.name: stack.enter_context(_start(s, args, work)) for s in systems}
        load = OtherLoad(list(processes.values()))
        for record in out["builds"]:
            name = record["system"]
            opened = processes[name].ask("open", folder=str(folders[name]), data=str(data))
            record["open_seconds"], record["open_peak_mb"] = opened["seconds"], opened["peak_mb"]
        points = find_points(systems, processes, exact.shape[1], args)
        for point in points:
            answer(point, exact, args.queries)
        for batch in args.batches:
            take_turns([p for p in points if batch == 1 or p.one_call], batch, args)
        out["searches"] = [summary(point, args.batches) for point in points]
        out["other_load_cores"] = load.cores()
    for folder in folders.values():
        if work in folder.parents:
            shutil.rmtree(folder)
    return out


def build(
    system: System, data: Path, name: str, tokens: int, args: argparse.Namespace, work: Path
) -> tuple[Path, dict[str, Any]]:
    """The index folder, and what building it took. Kept ones of peers are used again if asked."""
    if system.name == "colbert-ai" and args.stanford_index:
        return args.stanford_index, {
            "system": system.name,
            "seconds": None,
            **_size(args.stanford_index, tokens),
        }
    keep = args.reuse_index and system.name != OURS
    parent = args.cache / "indexes" if keep else work
    parent.mkdir(exist_ok=True)
    folder, notes = parent / name, parent / f"{name}.json"
    if keep and notes.exists():
        record = json.loads(notes.read_text())
        if record["versions"] == system.about["versions"]:
            return folder, record
    shutil.rmtree(folder, ignore_errors=True)
    print(f"building {name}", flush=True)
    with _start(system, args, work) as process:
        load = OtherLoad([process])
        record = process.ask("build", folder=str(folder), data=str(data), nbits=args.nbits)
        record["other_load_cores"] = load.cores()
    record = {
        "system": system.name,
        "versions": system.about["versions"],
        **record,
        **_size(folder, tokens),
    }
    if keep:
        notes.write_text(json.dumps(record, indent=1) + "\n")
    return folder, record


def _size(folder: Path, tokens: int) -> dict[str, float]:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"bytes": size, "bytes_per_token": size / tokens}


def find_points(
    systems: list[System], processes: dict[str, Process], most: int, args: argparse.Namespace
) -> list[Point]:
    """What to measure, systems in turn, the defaults of each before its other settings."""
    groups = []
    for system in systems:
        process = processes[system.name]
        for k in args.k:
            k = min(k, most)
            found = process.ask("settings", k=k)
            for i, settings in enumerate(found[:1] if args.defaults_only else found):
                point = Point(system.name, k, settings, i == 0, process, system.about["batches"])
                groups.append((i, k, point))
    return [point for *_, point in sorted(groups, key=lambda group: group[:2])]


def answer(point: Point, exact: np.ndarray, queries: int) -> None:
    """Every query once: overlap with exact scoring, peak memory, a first idea of the time."""
    batch = min(ANSWERS_BATCH, queries) if point.one_call else 1
    start = time.perf_counter()
    asked = math.ceil(queries / batch)
    done = _search(point, batch, 0, asked, answers=True)
    point.warm, point.query_seconds = batch, sum(done["seconds"]) / (asked * batch)
    ids = done["ids"][:queries]
    point.measured = {
        "overlap": search_data.overlap(ids, exact, point.k),
        "returned_least": min(map(len, ids)),
        "peak_mb": done["peak_mb"],
    }
    print(
        f"{point.system} k={point.k} {point.settings}: overlap {point.measured['overlap']:.4f}, "
        f"{1e3 * point.query_seconds:.2f} ms a query, {time.perf_counter() - start:.1f} s",
        flush=True,
    )


def _search(point: Point, batch: int, first: int, calls: int, answers: bool = False) -> Any:
    return point.process.ask(
        "search",
        k=point.k,
        settings=point.settings,
        batch=batch,
        first=first,
        calls=calls,
        answers=answers,
    )


def take_turns(points: list[Point], batch: int, args: argparse.Namespace) -> None:
    """Time the points at one batch size, a share of the time each in every round.

    A round of fast settings takes every query once. One that has used up its time with `LEAST`
    queries is left out of later rounds, unless it is the default. A first round is not counted.
    """
    most = math.ceil(args.queries / batch)
    least = math.ceil(LEAST / (args.rounds * batch))
    for turn in range(args.rounds + 1):
        for point in points:
            if point.query_seconds * batch > args.longest_call:
                continue
            spent = point.calls.get(batch, [])
            enough = sum(spent) > args.seconds and len(spent) * batch >= LEAST
            if (enough and not point.default) or (not turn and point.warm == batch):
                continue
            share = args.seconds / args.rounds / (point.query_seconds * batch)
            calls = min(max(int(share), least), most)
            first = len(spent) * batch
            done = _search(point, batch, first, calls)
            point.query_seconds = sum(done["seconds"]) / (calls * batch)
            if turn:
                point.calls.setdefault(batch, []).extend(done["seconds"])
                point.rates.setdefault(batch, []).append(1 / point.query_seconds)
                point.cpu[batch] = point.cpu.get(batch, 0.0) + done["cpu_seconds"]


def summary(point: Point, batches: list[int]) -> dict[str, Any]:
    """One row of the results; times in milliseconds."""
    row = {
        "system": point.system,
        "k": point.k,
        "settings": point.settings,
        "default": point.default,
        **point.measured,
        "batches": {},
    }
    for batch in batches:
        of = batch if point.one_call else 1  # without batches: one query after the other
        if of not in point.calls:
            continue
        calls = 1e3 * np.asarray(point.calls[of])
        row["batches"][str(batch)] = {
            "one_call": of == batch,
            "queries_per_second": median(point.rates[of]),
            "cpu_ms_per_query": 1e3 * point.cpu[of] / (len(calls) * of),
            "call_ms_median": float(np.median(calls)),
            "call_ms_p95": float(np.percentile(calls, 95)),
            "queries": len(calls) * of,
            "rounds": len(point.rates[of]),
        }
    return row


def exponents(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponent e of time ~ N**e, fitted over the sizes: builds, and a query by k and batch."""
    sizes = [math.log(run["passages"]) for run in runs]
    series: dict[tuple[str, str], list[float]] = {}
    for run_ in runs:
        for record in run_["builds"]:
            if record["system"] == OURS:
                series.setdefault((OURS, "build"), []).append(record["seconds"])
        for row in run_["searches"]:
            for batch, times in row["batches"].items():
                what = f"query, k={row['k']}, batch {batch}"
                seconds = 1 / times["queries_per_second"]
                series.setdefault((row["system"], what), []).append(seconds)
    return [
        {"system": system, "of": what, "exponent": linear_regression(sizes, np.log(ys)).slope}
        for (system, what), ys in series.items()
        if len(ys) == len(sizes) > 1
    ]


def about(systems: list[System], missing: dict[str, str], args: argparse.Namespace) -> dict:
    return {
        "command": _command(args),
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(),
        "threads": args.threads,
        "load_average_before": os.getloadavg()[0],
        "nbits": args.nbits,
        "queries": args.queries,
        "batches": args.batches,
        "versions": {system.name: system.about["versions"] for system in systems},
        "missing": missing,
    }


def _command(args: argparse.Namespace) -> str:
    """The command without the paths of this machine."""
    words = list(sys.argv[1:])
    for i, word in enumerate(words):
        if word == str(args.cache):
            words[i] = "CACHE"
        elif word in args.peer:
            words[i] = word.partition("=")[0] + "=PYTHON"
        elif Path(word).is_absolute():
            words[i] = Path(word).name
    return " ".join(["python benchmarks/search.py", *words])


def _machine() -> dict[str, Any]:
    model, memory = platform.processor() or platform.machine(), None
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "system": platform.system(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
