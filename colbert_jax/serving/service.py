"""What a server does, without HTTP: indexes, the lanes that gather work, changes, keys."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from colbert_jax.colbert import ColBERT
from colbert_jax.index.columns import DuplicateIdError, UnknownIdError
from colbert_jax.index.format import IndexFormatError
from colbert_jax.serving.gatherer import Gatherer, QueueFullError
from colbert_jax.serving.indexes import ServedIndex
from colbert_jax.serving.limits import Limits
from colbert_jax.serving.metrics import Metrics
from colbert_jax.serving.work import Encoding, Found, Search, encode_batch, search_batch

LOGGER = logging.getLogger("colbert_jax")
_TEXTS = 8  # texts encoded together, for each query searched together: these are shorter
_CHANGES = 16  # requests to change an index that may wait
_WARM_UP = "what is this about?"


class RequestError(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class Service:
    """Indexes under names, searched and changed for many clients at once.

    Attributes:
      indexes: by name; the first one is meant where a request names none.
      limits: of a request, and of what may wait.
      metrics: what is counted.
    """

    def __init__(
        self,
        indexes: Mapping[str, ServedIndex],
        limits: Limits,
        *,
        api_key: str | None = None,
        write_key: str | None = None,
        refresh_seconds: float = 1.0,
    ):
        """
        Args:
          api_key: what clients must send. If None, everybody is answered.
          write_key: what clients must send to change documents. If None, nobody may.
          refresh_seconds: how often to look for changes by others; 0: never.
        """
        for name, key in (("the API key", api_key), ("the write key", write_key)):
            if key is not None and (not key.strip() or not key.isascii()):
                raise ValueError(f"{name} is empty or not ASCII: set another, or none")
        if refresh_seconds < 0:
            raise ValueError(f"refresh_seconds must be at least 0, got {refresh_seconds}")
        self.version = importlib.metadata.version("colbert-jax")
        self.indexes, self.limits, self.metrics = dict(indexes), limits, Metrics()
        self._api_key, self._write_key, self._refresh_seconds = api_key, write_key, refresh_seconds
        self._tasks: list[asyncio.Task] = []
        self._changing = 0

        def lane(work: Any, name: str, most: int) -> Gatherer:
            return Gatherer(
                work,
                wait=limits.wait_ms / 1000,
                most=most,
                queue=limits.queue,
                name=name,
                observe=self.metrics.batch(name),
            )

        self._searches = lane(search_batch, "search", limits.batch)
        self._texts = lane(encode_batch, "encode", _TEXTS * limits.batch)
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="colbert_jax-change")
        self.metrics.gauge(
            "waiting",
            "Requests that wait",
            "lane",
            lambda: [("search", len(self._searches)), ("encode", len(self._texts))],
        )
        served = self.indexes.values()
        self.metrics.gauge(
            "documents",
            "Documents of an index",
            "index",
            lambda: [(one.name, len(one.now)) for one in served],
        )
        self.metrics.gauge(
            "generation",
            "Changes since the index was built",
            "index",
            lambda: [(one.name, one.generation) for one in served],
        )

    # --- Life ---

    def warm_up(self) -> None:
        """Compile what searches of any batch size need, so that no request waits for it."""
        for one in self.indexes.values():
            size = 1
            while size <= self.limits.batch:
                search = Search(one, _WARM_UP, {"k": 10})
                for result in search_batch([search] * size):
                    if isinstance(result, Exception):
                        raise result
                size *= 2

    @contextlib.asynccontextmanager
    async def running(self):
        """Answer requests inside; what was taken is finished before it ends."""
        self._searches.start()
        self._texts.start()
        if self._refresh_seconds:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._follow(one)) for one in self.indexes.values()]
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._searches.stop()
            await self._texts.stop()
            await asyncio.to_thread(self._changes.shutdown)

    async def _follow(self, served: ServedIndex) -> None:
        """Search the next state of an index when somebody has changed it."""
        told = None
        while True:
            await asyncio.sleep(self._refresh_seconds)
            if await asyncio.to_thread(served.refresh):
                LOGGER.info("%s: generation %d", served.name, served.generation)
            if served.problem is not None and served.problem != told:
                LOGGER.warning("%s: still searched as it was: %s", served.name, served.problem)
            told = served.problem

    # --- Who asks for what ---

    def authorise(self, key: str | None, writes: bool) -> None:
        """Let a client that sent this key in, or raise RequestError."""
        known = [one for one in (self._write_key, self._api_key) if one is not None]
        if writes and self._write_key is None:
            raise RequestError(
                403, "documents are not changed here: set COLBERT_JAX_WRITE_KEY for the server"
            )
        given = (key or "").encode()
        right = [one for one in known if hmac.compare_digest(given, one.encode())]
        if self._write_key in right and self._write_key is not None:
            return
        if right or self._api_key is None:
            if not writes:
                return
            if key is not None:
                raise RequestError(403, "this key does not allow changes: send the write key")
        raise RequestError(
            401,
            "a key is needed: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            if key is None
            else "the key is not the server's",
            {"www-authenticate": "Bearer"},
        )

    def index(self, name: str | None) -> ServedIndex:
        """The index of a name. Raises RequestError."""
        if name is None:
            return next(iter(self.indexes.values()))
        if name not in self.indexes:
            known = ", ".join(self.indexes)
            raise RequestError(404, f"no index is called {name!r:.80}; there are: {known}")
        return self.indexes[name]

    def model(self, name: str | None) -> ColBERT:
        """The model of an index; of the first one for a name that no index has, as clients of other
        servers send one."""
        return self.index(name if name in self.indexes else None).now.model

    # --- Work ---

    async def search(
        self, served: ServedIndex, queries: Sequence[str], settings: Mapping[str, Any]
    ) -> list[Found]:
        """Hits of queries, gathered with those of others."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._searches.submit(Search(served, query, settings)))
                for query in queries
            ]
        return [task.result() for task in tasks]

    async def encode(self, work: Encoding) -> Any:
        """What a request makes of its texts, encoded with those of others."""
        return await self._texts.submit(work, len(work.queries) + len(work.documents))

    async def change(self, served: ServedIndex, kind: str, argument: Any) -> None:
        """Change an index, after the changes before; once begun it is finished.

        Raises:
          RequestError: another process changes it.
          DuplicateIdError, UnknownIdError, ValueError, TypeError: as the retriever's methods.
        """
        if self._changing >= _CHANGES:
            raise QueueFullError(f"{_CHANGES} changes wait already")
        self._changing += 1
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._changes, served.change, kind, argument)
        future.add_done_callback(self._changed)
        try:
            await asyncio.shield(future)
        except RuntimeError as error:  # another process is at it
            raise RequestError(503, plainly(served, error), {"retry-after": "5"}) from None

    def _changed(self, future: asyncio.Future) -> None:
        self._changing -= 1
        if not future.cancelled():
            future.exception()  # which was told, if its client is still there


def plainly(served: ServedIndex, error: Exception) -> str:
    """An error's message without the server's folders."""
    return str(error).replace(str(served.now.index.path), served.name)


# What the library raises for what a client sent.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (UnknownIdError, 404),
    (DuplicateIdError, 409),
    (ValueError, 400),
    (TypeError, 400),
)


def request_error(error: BaseException, served: ServedIndex | None) -> RequestError | None:
    """What a client is told of an error; None for one of the server's own."""
    if isinstance(error, BaseExceptionGroup):
        return request_error(error.exceptions[0], served)
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return RequestError(429, f"{error}: try again in a moment", {"retry-after": "1"})
    if isinstance(error, IndexFormatError):
        return None
    for kind, status in _STATUS:
        if isinstance(error, kind):
            message = str(error) if served is None else plainly(served, error)
            return RequestError(status, message)
    return None
