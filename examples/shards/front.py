"""One server in front of the servers of shards: asks all of them, and merges their answers.

    colbert-jax serve shard-0000-of-0002.index --port 8001     # on each machine its own
    colbert-jax serve shard-0001-of-0002.index --port 8002
    python front.py http://127.0.0.1:8001 http://127.0.0.1:8002 --port 8000    # needs httpx

`/search` takes and gives what a shard's does. An answer comes of all shards or is an error: one
that is down never makes an answer that only looks whole.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from colbert_jax.serving.app import parse_json, read_body
from colbert_jax.serving.limits import Limits
from colbert_jax.serving.schema import SchemaError
from colbert_jax.serving.service import RequestError
from colbert_jax.shards import merge

# What one shard cannot answer for all: BM25 counts words, and ranks, of a whole collection; an id
# is an error in every shard but its own.
_NOT_MERGED = ("hybrid", "bm25_weight", "ids")
_KEYS = ("authorization", "x-api-key")


def create_front(
    shards: Sequence[str], client: httpx.AsyncClient | None = None, limits: Limits | None = None
) -> Starlette:
    """The application.

    Args:
      shards: addresses of the servers, whose order decides between equal scores.
      client: what asks them; None: a new one.
      limits: of bodies and of time.
    """
    limits = limits or Limits()
    room = httpx.Limits(max_connections=None)  # a shard bounds its own
    asker = client or httpx.AsyncClient(timeout=limits.timeout, limits=room)

    async def ask(shard: str, method: str, path: str, expect: str, **content: Any) -> Any:
        try:
            reply = await asker.request(method, shard.rstrip("/") + path, **content)
            answer = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise RequestError(503, f"{shard} does not answer: {type(error).__name__}") from None
        if not isinstance(answer, dict) or (reply.status_code == 200 and expect not in answer):
            raise RequestError(503, f"{shard} does not answer as a shard does")
        if reply.status_code != 200:
            why = answer.get("error")
            told = why.get("message") if isinstance(why, dict) else reply.reason_phrase
            raise RequestError(reply.status_code, f"{shard}: {told}")
        return answer

    async def ask_all(method: str, path: str, expect: str, **content: Any) -> list[Any]:
        found = await asyncio.gather(
            *(ask(shard, method, path, expect, **content) for shard in shards),
            return_exceptions=True,
        )
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return found

    async def search(request: Request) -> JSONResponse:
        start = time.monotonic()
        if request.method == "GET":
            values: Any = {}
            for name, text in request.query_params.items():
                with contextlib.suppress(ValueError):
                    text = text if name in ("query", "index", "mode") else json.loads(text)
                values[name] = text
        else:
            values = parse_json(await read_body(request, limits))
        if not isinstance(values, dict):
            raise RequestError(400, "the body must be an object")
        for name in _NOT_MERGED:
            if name in values:
                raise RequestError(400, f"{name} is not answered over shards: ask one of them")
        headers = {name: request.headers[name] for name in _KEYS if name in request.headers}
        wanted = "answers" if "queries" in values else "results"
        answers = await ask_all("POST", "/search", wanted, json=values, headers=headers)
        k = values.get("k", 10)  # which the shards have checked
        reply = {"took_ms": round((time.monotonic() - start) * 1000, 2)}
        if "queries" not in values:
            return JSONResponse(reply | {"results": _merged(answers, k)})
        rows = zip(*(answer["answers"] for answer in answers), strict=True)
        merged = [{"query": row[0]["query"], "results": _merged(row, k)} for row in rows]
        return JSONResponse(reply | {"answers": merged})

    async def health(request: Request) -> JSONResponse:
        found = await ask_all("GET", "/health", "stale")
        stale = [name for name, one in zip(shards, found, strict=True) if one["stale"]]
        return JSONResponse({"status": "stale" if stale else "ok", "stale": stale})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        yield
        await asker.aclose()

    return Starlette(
        routes=[
            Route("/search", search, methods=["GET", "POST"]),
            Route("/health", health),
        ],
        exception_handlers={RequestError: _refused, SchemaError: _refused},
        lifespan=lifespan,
    )


def _merged(answers: Sequence[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    return merge((one["results"] for one in answers), k, lambda hit: hit["score"])


async def _refused(request: Request, error: Exception) -> JSONResponse:
    status = error.status if isinstance(error, RequestError) else 400
    return JSONResponse({"error": {"code": status, "message": str(error)}}, status)


def main() -> None:
    parser = argparse.ArgumentParser(description="One server in front of the servers of shards.")
    parser.add_argument("shards", nargs="+", help="addresses, such as http://10.0.0.5:8000")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(create_front(args.shards), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
