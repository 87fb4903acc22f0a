"""The server over real connections: what clients do wrong, and how it ends."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from colbert_jax import Retriever
from colbert_jax.cli import main
from colbert_jax.serving.limits import Limits

SERVE = 'needs pip install "colbert-jax[serve]"'
uvicorn = pytest.importorskip("uvicorn", reason=SERVE)
create_app = pytest.importorskip("colbert_jax.serving.app", reason=SERVE).create_app
server = pytest.importorskip("colbert_jax.serving.server", reason=SERVE)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(model, texts, tmp_path_factory) -> Retriever:
    path = tmp_path_factory.mktemp("served") / "books"
    return Retriever.build(path, model, [(f"d{n}", text) for n, text in enumerate(texts[:40])])


@contextlib.contextmanager
def running(retriever, **limits):
    """The port of a server in a thread of its own."""
    with running_server(retriever, **limits) as (_, listening):
        yield listening.getsockname()[1]


@contextlib.contextmanager
def running_server(retriever, **limits):
    """A server in a thread of its own, and the socket where it listens."""
    app = create_app(retriever, limits=Limits(**limits), refresh_seconds=0)
    one = uvicorn.Server(server._configured(app))
    listening = server._listen("127.0.0.1", 0, app.state.service.limits.timeout)
    thread = threading.Thread(target=one.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield one, listening
    finally:
        one.should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(built):
    with running(built, timeout=2.0, body=1 << 20, queue=2000) as port:
        yield port


def ask(port, body, path="/search", timeout=60):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_a_long_body_is_heard_of_by_its_sender(port):
    """One who is still sending does not listen, so the answer waits for the end."""
    status, answer = ask(port, b"x" * (30 << 20))
    assert status == 413 and "longer than 1048576 bytes" in answer["error"]["message"]


def test_who_asks_before_sending_is_refused_before(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(
            b"POST /search HTTP/1.1\r\nhost: a\r\ncontent-length: 100000000\r\n"
            b"expect: 100-continue\r\n\r\n"
        )
        assert raw.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(b"POST /search HTTP/1.1\r\nhost: a\r\ncontent-length: 20\r\n\r\n{")
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")


def test_no_http(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(b"\x16\x03\x01 not HTTP\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")


def test_clients_that_hang_up_disturb_nobody(port):
    request = b'POST /search HTTP/1.1\r\nhost: a\r\ncontent-length: 14\r\n\r\n{"query": "a"}'
    for sent in (request, request[:30], b""):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                raw.sendall(sent)
    status, answer = ask(port, b'{"query": "heat", "k": 2}')
    assert status == 200 and len(answer["results"]) == 2


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only on Linux")
def test_slow_readers_hold_up_nobody_and_lose_their_connections(built, texts):
    """Clients that ask for much and read none of it."""
    body = json.dumps({"queries": texts[:40], "k": 40}).encode()
    request = b"POST /search HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as stack:
        one, listening = stack.enter_context(running_server(built, timeout=1.5))
        # Little room on the way, so that the answer waits in the server.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        port = listening.getsockname()[1]
        for _ in range(3):
            raw = stack.enter_context(socket.socket())
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", port))
            raw.sendall(request + body)
            assert raw.recv(12) == b"HTTP/1.1 200"
        status, answer = ask(port, b'{"query": "heat", "k": 2}')
        assert status == 200 and len(answer["results"]) == 2
        assert len(one.server_state.connections) >= 3
        end = time.monotonic() + 20
        while one.server_state.connections:
            assert time.monotonic() < end, "they hold their connections"
            time.sleep(0.05)


def test_concurrent_clients_get_their_own_answers(port, built, texts):
    expected = {text: built.search(text, k=3)[0].id for text in texts[:24]}
    with ThreadPoolExecutor(12) as pool:
        bodies = [json.dumps({"query": text, "k": 3}).encode() for text in texts[:24]] * 3
        answers = list(pool.map(lambda body: ask(port, body), bodies))
    for text, (status, answer) in zip(texts[:24] * 3, answers, strict=True):
        assert status == 200 and answer["results"][0]["id"] == expected[text]


def test_many_connections(port):
    """Idle ones do not keep others from being answered."""
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        assert ask(port, b'{"query": "heat"}')[0] == 200


def test_a_place_that_is_taken_is_named(built, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(built.index.path), "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1, port {port}" in capsys.readouterr().err


def test_two_indexes_of_one_name_are_refused(built, capsys):
    assert main(["serve", str(built.index.path), f"books={built.index.path}"]) == 2
    assert "two indexes are called 'books'" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_finishes_what_was_taken(built):
    """A process of its own, as from a shell: named indexes, a key, requests under way, its end."""
    environment = os.environ | {"COLBERT_JAX_API_KEY": "secret", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "colbert_jax.cli", "serve", f"novels={built.index.path}"]
    command += ["--port", "0", "--wait-ms", "300", "--batch", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving novels at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        port = int(found.group(1))

        def search(n):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(connection):
                connection.request("GET", "/search?query=heat", headers={"x-api-key": "secret"})
                response = connection.getresponse()
                return response.status, json.loads(response.read())["results"]

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionError):
                assert search(0)[0] == 200
                break
        with ThreadPoolExecutor(6) as pool:
            under_way = [pool.submit(search, n) for n in range(6)]
            time.sleep(0.15)
            process.send_signal(signal.SIGTERM)
            assert [one.result()[0] for one in under_way] == [200] * 6
        assert process.wait(60) == 0
        rest = process.stderr.read()
    assert "Traceback" not in rest and "stopped" in rest
