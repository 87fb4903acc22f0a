"""The application under uvicorn."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from colbert_jax.serving.app import create_app

LOGGER = logging.getLogger("colbert_jax")
_IDLE = 30  # seconds that a connection may be open without a request
_LONGEST = 2**31 - 1  # milliseconds that fit


def serve(
    indexes: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    warm_up: bool = True,
    cors: Iterable[str] = (),
    **settings: Any,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then finish those that were taken, and return.

    Args:
      indexes: as of `create_app`.
      host, port: where to listen; "0.0.0.0" lets other machines ask.
      warm_up: search once with every batch size first, so that no request waits for a program to
        be compiled.
      cors, **settings: as of `create_app`.

    Raises:
      OSError: the port is taken.
      KeyboardInterrupt: after Ctrl-C.
    """
    app = create_app(indexes, cors=cors, **settings)
    listening = _listen(host, port, app.state.service.limits.timeout)
    try:
        if warm_up:
            app.state.service.warm_up()
        place = f"[{host}]" if ":" in host else host
        LOGGER.info(
            "serving %s at http://%s:%d",
            ", ".join(app.state.service.indexes),
            place,
            listening.getsockname()[1],
        )
        with _sigterm_ends_the_server():
            uvicorn.Server(_configured(app)).run(sockets=[listening])
    finally:
        listening.close()
    LOGGER.info("stopped")


def _configured(app: Starlette) -> uvicorn.Config:
    limits = app.state.service.limits
    return uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=int(limits.timeout) + 5,
        limit_concurrency=limits.connections,
    )


def _listen(host: str, port: int, unread: float = 30.0) -> socket.socket:
    """A socket that listens.

    Args:
      unread: seconds after which a connection is given up whose client takes nothing of what is
        sent to it: uvicorn itself would hold the answer for as long as the client likes.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        milliseconds = max(1, min(round(unread * 1000), _LONGEST))
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listening


@contextlib.contextmanager
def _sigterm_ends_the_server():
    """uvicorn raises the signal that ended it again: SIGTERM is no error here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
