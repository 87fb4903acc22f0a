"""A server under load: many clients that ask one after the other, on this machine.

    python benchmarks/serving.py INDEX --queries QUERIES.tsv [--clients 64] [--seconds 60] \
        [--output benchmarks/results/serving_cpu]

INDEX is an index with its texts, QUERIES a file of qid and text. Each server has a process of its
own and is measured after the others, --rounds times; medians are reported:

    batches     colbert-jax serve INDEX --batch 8
    one by one  colbert-jax serve INDEX --batch 1
    plain app   what one writes by hand: Starlette, `Retriever.search` in a thread, a lock around it

The clients share the cores with the server. `errors` are answers other than 200; `MB at first` and
`MB at last` the server's resident memory after its first thousand requests and after its last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

SERVERS = {"batches": ["--batch", "8"], "one by one": ["--batch", "1"], "plain app": None}


def plain_app(folder: str) -> Any:
    """A server of one query at a time."""
    import threading

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from colbert_jax import Retriever

    retriever, lock = Retriever.open(folder), threading.Lock()

    def answer(query: str, k: int) -> list[dict[str, Any]]:
        with lock:
            hits = retriever.search(query, k=k)
        return [{"id": hit.id, "score": hit.score, "text": hit.text} for hit in hits]

    async def search(request: Request) -> JSONResponse:
        asked = await request.json()
        return JSONResponse({"hits": await asyncio.to_thread(answer, asked["query"], asked["k"])})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({})

    return Starlette(routes=[Route("/search", search, methods=["POST"]), Route("/health", health)])


def command(name: str, index: Path, port: int) -> list[str]:
    options = SERVERS[name]
    if options is None:
        return [sys.executable, __file__, str(index), "--serve", str(port)]
    start = [sys.executable, "-m", "colbert_jax.cli", "--quiet", "serve", str(index)]
    return [*start, "--port", str(port), *options]


def memory_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def load(url: str, pid: int, queries: list[str], clients: int, seconds: float) -> dict:
    """Ask for `seconds`, and report it."""
    took: list[float] = []
    errors: Counter[str] = Counter()
    memory: list[float] = []
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def client_asks(client: httpx.AsyncClient, first: int) -> None:
        place = first
        while time.monotonic() < end:
            query, start = queries[place % len(queries)], time.monotonic()
            place += clients
            try:
                reply = await client.post(f"{url}/search", json={"query": query, "k": 10})
                status = str(reply.status_code)
            except httpx.HTTPError as error:
                status = type(error).__name__
            if status == "200":
                took.append(time.monotonic() - start)
                if len(took) == 1000:
                    memory.append(memory_mb(pid))
            else:
                errors[status] += 1

    async with httpx.AsyncClient(limits=limits, timeout=120) as client:
        await asyncio.gather(*(client_asks(client, first) for first in range(clients)))
    p50, p95, p99 = 1e3 * np.percentile(took, [50, 95, 99])
    return {
        "requests": len(took),
        "per_second": len(took) / seconds,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "errors": sum(errors.values()),
        "first_mb": memory[0] if memory else float("nan"),
        "last_mb": memory_mb(pid),
    }


def measure(name: str, args: argparse.Namespace, queries: list[str]) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command(name, args.index, port)) as process:
        try:
            wait(url, process)
            for clients, seconds in ((args.clients, 3.0), (args.clients, args.seconds)):
                found = asyncio.run(load(url, process.pid, queries, clients, seconds))
            return found
        finally:
            process.terminate()


def wait(url: str, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    sys.exit("the server did not answer within two minutes")


def table(rows: dict[str, dict[str, float]]) -> str:
    columns = {
        "requests": "requests",
        "a second": "per_second",
        "p50 ms": "p50_ms",
        "p95 ms": "p95_ms",
        "p99 ms": "p99_ms",
        "errors": "errors",
        "MB at first": "first_mb",
        "MB at last": "last_mb",
    }
    lines = [f"| server | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [
            f"{row[c]:,.1f}" if c == "per_second" else f"{row[c]:,.0f}" for c in columns.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="without suffix")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        import uvicorn

        uvicorn.run(plain_app(str(args.index)), port=args.serve, log_level="warning")
        return
    if args.queries is None:
        parser.error("--queries is needed")
    lines = args.queries.read_text(encoding="utf-8").splitlines()
    queries = [line.split("\t", 1)[1] for line in lines]
    busy = os.getloadavg()[0]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SERVERS}
    for _ in range(args.rounds):
        for name in SERVERS:
            runs[name].append(measure(name, args, queries))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    rows = {
        name: {key: median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    versions = {name: version(name) for name in ("jax", "numpy", "starlette", "uvicorn", "httpx")}
    asked = f"--clients {args.clients} --seconds {args.seconds:g} --rounds {args.rounds}"
    about = (
        f"`python benchmarks/serving.py INDEX --queries {args.queries.name} {asked}`\n\n"
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores, {platform.machine()}; "
        f"load average before: {busy:.2f}; {', '.join(f'{k} {v}' for k, v in versions.items())}."
    )
    report = f"{about}\n\n{table(rows)}\n"
    print(report)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.output}.md").write_text(report)
        Path(f"{args.output}.json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
