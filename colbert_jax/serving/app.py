"""The application: requests to values, replies and errors to JSON, pages."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from colbert_jax.retriever import Retriever
from colbert_jax.serving.endpoints import Operation, operations
from colbert_jax.serving.indexes import ServedIndex, checked_indexes
from colbert_jax.serving.limits import Limits
from colbert_jax.serving.openapi import openapi
from colbert_jax.serving.schema import SchemaError, checked, from_query
from colbert_jax.serving.service import RequestError, Service, request_error

LOGGER = logging.getLogger("colbert_jax")
_DAMAGED = "the server could not answer; its log says why"
_HUNG_UP = 499  # nobody reads it


def create_app(
    indexes: Retriever | Mapping[str, Retriever | ServedIndex],
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    write_key: str | None = None,
    cors: Iterable[str] = (),
    refresh_seconds: float = 1.0,
) -> Starlette:
    """An ASGI application that answers searches of indexes; docs/serving.md lists the addresses.

    Args:
      indexes: one retriever, or retrievers by name.
      limits: of requests and of what may wait. If None, `Limits()`.
      api_key: what clients must send. If None, everybody is answered.
      write_key: what clients must send to change documents. If None, nobody may.
      cors: origins whose pages may ask, such as "https://example.org".
      refresh_seconds: how often to look for changes by other processes; 0: never.

    Returns:
      the application; `app.state.service` is what it does without HTTP. It works while its lifespan
      lasts, as under uvicorn.
    """
    service = Service(
        checked_indexes(indexes),
        limits or Limits(),
        api_key=api_key,
        write_key=write_key,
        refresh_seconds=refresh_seconds,
    )
    known = operations(service.limits)
    description = _encoded(openapi(known, service.version))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        async with service.running():
            yield

    async def described(request: Request) -> Response:
        return Response(description, media_type="application/json")

    async def metrics(request: Request) -> Response:
        try:
            service.authorise(_key(request), False)
        except RequestError as error:
            return _error(error)
        return Response(service.metrics.render(), media_type=service.metrics.content_type)

    origins = list(cors)
    headers = ["authorization", "x-api-key", "content-type"]
    sharing = Middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=headers
    )
    app = Starlette(
        routes=[
            *(Route(one.path, _Endpoint(service, one), methods=[one.method]) for one in known),
            Route("/", _page("page.html")),
            Route("/docs", _page("docs.html")),
            Route("/openapi.json", described),
            Route("/metrics", metrics),
        ],
        middleware=[sharing] if origins else [],
        exception_handlers={HTTPException: _http_error, Exception: _failed},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


class _Endpoint:
    """One operation: who asks, what, the answer, and how long it took."""

    def __init__(self, service: Service, operation: Operation):
        self._service, self._operation = service, operation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        start, operation = time.monotonic(), self._operation
        response = await self._response(Request(scope, receive))
        took = time.monotonic() - start
        self._service.metrics.answered(operation.path, response.status_code, took)
        await response(scope, receive, send)

    async def _response(self, request: Request) -> Response:
        service, operation, served = self._service, self._operation, None
        try:
            if not operation.open:
                service.authorise(_key(request), operation.writes)
            values = await self._values(request)
            served = service.indexes.get(values.get("index") or next(iter(service.indexes)))
            reply = await self._answer(request, values)
            return Response(await _rendered(reply), media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=_HUNG_UP)
        except Exception as error:
            told = request_error(error, served)
            if told is None:
                LOGGER.error("%s %s", operation.method, operation.path, exc_info=error)
                told = RequestError(500, _DAMAGED)
            return _error(told)

    async def _values(self, request: Request) -> dict[str, Any]:
        """What is asked for, as the operation's schema has it. Raises SchemaError."""
        schema = self._operation.schema
        if not self._operation.from_query:
            return checked(parse_json(await read_body(request, self._service.limits)), schema)
        values: dict[str, Any] = dict(request.path_params)
        for name in request.query_params:
            given = request.query_params.getlist(name)
            one = schema["properties"].get(name, {})
            if one.get("type") == "array":
                values[name] = given
            elif len(given) > 1:
                raise SchemaError(f"{name} is given {len(given)} times: give it once")
            else:
                values[name] = from_query(given[0], one, name)
        return checked(values, schema, "the address")

    async def _answer(self, request: Request, values: dict[str, Any]) -> Any:
        """The reply, within the time limit, while the client is there.

        A change is waited for however long it takes: it is not undone.
        """
        operation, limits = self._operation, self._service.limits
        work = asyncio.ensure_future(operation.handler(self._service, values))
        left = asyncio.ensure_future(_hang_up(request))
        seconds = None if operation.writes else limits.timeout
        try:
            await asyncio.wait({work, left}, timeout=seconds, return_when="FIRST_COMPLETED")
            if work.done():
                return work.result()
            if left.done():
                raise ClientDisconnect
            raise RequestError(504, f"no answer within {limits.timeout:g} seconds")
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    """Wait until the client has gone; its request has been read."""
    if request.method == "GET":  # whose body nobody has read
        async for _ in request.stream():
            pass
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, limits: Limits) -> bytes:
    """The bytes of a request.

    Raises:
      RequestError: they are too many, which is said after the last one, because a client that is
        still sending does not listen; or they come too slowly.
    """
    chunks: list[bytes] = []
    size = 0
    too_long = RequestError(413, f"the body is longer than {limits.body} bytes")
    try:
        declared = int(request.headers.get("content-length", "0"))
        if declared > limits.body and "expect" in request.headers:
            raise too_long
        async with asyncio.timeout(limits.timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if max(size, declared) > limits.body:
                    chunks.clear()
                else:
                    chunks.append(chunk)
    except TimeoutError:
        message = f"the body did not arrive within {limits.timeout:g} seconds"
        raise RequestError(408, message, {"connection": "close"}) from None
    if max(size, declared) > limits.body:
        raise too_long
    return b"".join(chunks)


def parse_json(body: bytes) -> Any:
    """A body as JSON. Raises SchemaError."""
    try:
        return json.loads(body, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise SchemaError(f"the body is not UTF-8: byte {error.start}") from None
    except RecursionError:
        raise SchemaError("the body is nested too deeply") from None
    except ValueError as error:
        raise SchemaError(f"the body is not JSON: {error!s:.200}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _key(request: Request) -> str | None:
    bearer = request.headers.get("authorization", "")
    if bearer[:7].lower() == "bearer ":
        return bearer[7:].strip()
    return request.headers.get("x-api-key")


async def _rendered(reply: Any) -> bytes:
    """JSON; of many numbers beside the event loop."""
    if isinstance(reply, dict) and reply.get("object") == "list":
        return await asyncio.to_thread(_encoded, reply)
    return _encoded(reply)


def _encoded(reply: Any) -> bytes:
    text = json.dumps(reply, ensure_ascii=False, allow_nan=False, default=_date)
    return text.encode("utf-8", "backslashreplace")  # half a character as JSON writes it: \udXXX


def _date(value: Any) -> str:
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not of JSON")


def _error(error: RequestError) -> Response:
    body = {"error": {"code": error.status, "message": str(error)}}
    return Response(
        _encoded(body), error.status, media_type="application/json", headers=error.headers
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"nothing is at {request.url.path:.100}; /docs lists what is"
    return _error(RequestError(error.status_code, message, error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    return _error(RequestError(500, _DAMAGED))


def _page(name: str):
    """A page that loads nothing but itself and may run no other script."""
    text = Path(__file__).with_name(name).read_text("utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    async def page(request: Request) -> Response:
        return Response(text, media_type="text/html", headers=headers)

    return page
