"""A collection in shards: built by a job array, searched in one process, and behind one server."""

import asyncio
import contextlib
import json
import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from colbert_jax import Index, Retriever
from colbert_jax.retriever import Hit
from colbert_jax.shards import Shards, merge

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "shards"
QUERIES = ["running cats", "the heat of the sun", "a book to read in paris"]
COUNT = 3


@pytest.fixture(scope="module")
def folders(shallow_folder, texts, tmp_path_factory) -> list[Path]:
    """Shards of 40 documents, as the tasks of a job array build them."""
    folder = tmp_path_factory.mktemp("shards")
    collection = folder / "c.jsonl"
    records = [{"id": f"d{n}", "text": text, "year": n % 4} for n, text in enumerate(texts[:40])]
    collection.write_text("".join(json.dumps(one) + "\n" for one in records))
    build = runpy.run_path(str(EXAMPLES / "build_shard.py"))["main"]
    for shard in range(COUNT):
        build([str(collection), str(folder / "s"), "--shard", str(shard), "--of", str(COUNT),
               "--checkpoint", str(shallow_folder)])  # fmt: skip
    return sorted((folder / "s").glob("*.index"))


@pytest.fixture(scope="module")
def shards(folders) -> Shards:
    return Shards.open(folders)


def expected(shards, query, k, **settings):
    """All documents of all shards by their exact scores, then shard, then position."""
    every = [
        (-hit.score, n, hit.position, hit.id)
        for n, one in enumerate(shards.retrievers)
        for hit in one.search(query, len(one), mode="exact", **settings)
    ]
    return [(id, -score) for score, _, _, id in sorted(every)[:k]]


def test_merge_is_one_ranking():
    rows = [[Hit("a", 3.0, None, 0), Hit("b", 1.0, None, 1)], [], [Hit("c", 3.0, None, 0)]]
    assert [hit.id for hit in merge(rows, 2)] == ["a", "c"]
    assert [hit.id for hit in merge(rows, 9)] == ["a", "c", "b"]


def test_the_shards_have_every_document_once(shards, texts):
    assert len(shards) == 40 and [len(one) for one in shards.retrievers] == [14, 13, 13]
    for n, one in enumerate(shards.retrievers):
        ids = [f"d{i}" for i in range(n, 40, COUNT)]
        assert [one.index.ids[i] for i in range(len(one))] == ids
        assert [one.index.text(id) for id in ids] == texts[n:40:COUNT]


def test_exact_search_of_shards_is_the_exact_ranking_of_all(shards):
    found = shards.search(QUERIES, k=7, mode="exact")
    for query, hits in zip(QUERIES, found, strict=True):
        wanted = expected(shards, query, 7)
        assert [hit.id for hit in hits] == [id for id, _ in wanted]
        assert [hit.score for hit in hits] == pytest.approx([score for _, score in wanted])
        assert all(hit.text is not None for hit in hits)
    where = {"year": 2}
    (hits,) = shards.search(QUERIES[:1], k=20, mode="exact", where=where, texts=False)
    assert [hit.id for hit in hits] == [
        id for id, _ in expected(shards, QUERIES[0], 20, where=where)
    ]
    assert len(hits) == 10 and hits[0].text is None
    assert shards.search(QUERIES[0], k=3) == shards.search(QUERIES[:1], k=3)[0]


def test_shards_of_other_models_are_refused(folders, shards, model, texts, tmp_path):
    other = Retriever.build(tmp_path / "i", model, texts[:5], progress=False)
    with pytest.raises(ValueError, match="another model"):
        Shards([*shards.retrievers, other])
    with pytest.raises(ValueError, match="at least one"):
        Shards([])


def test_a_shard_is_built_once_and_keeps_numbers(folders, shallow_folder, tmp_path, capsys):
    build = runpy.run_path(str(EXAMPLES / "build_shard.py"))["main"]
    of = ["--of", "3", "--checkpoint", str(shallow_folder)]
    collection = folders[0].parent.parent / "c.jsonl"
    build([str(collection), str(folders[0].parent), "--shard", "0", *of])
    assert "is there" in capsys.readouterr().out
    (tmp_path / "plain.txt").write_text("one\ntwo\nthree\nfour\n")
    build([str(tmp_path / "plain.txt"), str(tmp_path), "--shard", "0", *of])
    index = Index.open(tmp_path / "shard-0000-of-0003.index")
    assert [index.ids[0], index.ids[1]] == ["0", "3"] and index.text("3") == "four"
    with pytest.raises(SystemExit):
        build([str(collection), str(tmp_path), "--shard", "3", *of])


def test_the_job_array_asks_for_its_shard(folders, shallow_folder, tmp_path):
    """build.slurm under a bash whose srun only says what it would run."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nfor one in "$@"; do printf "%s\\n" "$one"; done\n')
    srun.chmod(0o755)
    names = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "COLLECTION": str(folders[0].parent.parent / "c.jsonl"),
        "SHARDS": str(tmp_path / "wiki"),
        "CHECKPOINT": str(shallow_folder),
        "SLURM_ARRAY_TASK_ID": "3",
    }
    script = str(EXAMPLES / "build.slurm")
    done = subprocess.run(["bash", script], env=names, capture_output=True, text=True, check=True)
    python, program, *arguments = done.stdout.splitlines()
    assert (python, program) == ("python", "build_shard.py")
    assert runpy.run_path(str(EXAMPLES / "build_shard.py"))["main"](arguments) == 0
    index = Index.open(tmp_path / "wiki" / "shard-0003-of-0064.index")
    assert list(index.ids[:]) == ["d3"]


# --- Behind one server ---


@pytest.fixture(scope="module")
def ask(shards):
    """Asks a front over ASGI; addresses of shards: http://0, http://1, ..."""
    pytest.importorskip("starlette", reason='needs pip install "colbert-jax[serve]"')
    httpx = pytest.importorskip("httpx", reason="httpx asks the server")
    from colbert_jax.serving.app import create_app

    create_front = runpy.run_path(str(EXAMPLES / "front.py"))["create_front"]

    def ask(method, path, addresses=("http://0", "http://1", "http://2"), **content):
        async def whole():
            async with contextlib.AsyncExitStack() as stack:
                mounts = {}
                for n, one in enumerate(shards.retrievers):
                    app = create_app(one, refresh_seconds=0)
                    await stack.enter_async_context(app.router.lifespan_context(app))
                    mounts[f"http://{n}"] = httpx.ASGITransport(app)
                front = create_front(addresses, httpx.AsyncClient(mounts=mounts))
                await stack.enter_async_context(front.router.lifespan_context(front))
                client = httpx.AsyncClient(transport=httpx.ASGITransport(front))
                await stack.enter_async_context(client)
                return await client.request(method, f"http://front{path}", **content)

        return asyncio.run(whole())

    return ask


def test_one_server_gives_the_exact_ranking_of_all(ask, shards):
    given = {"queries": QUERIES, "k": 7, "mode": "exact"}
    for query, one in zip(
        QUERIES, ask("POST", "/search", json=given).json()["answers"], strict=True
    ):
        wanted = expected(shards, query, 7)
        assert one["query"] == query
        assert [hit["id"] for hit in one["results"]] == [id for id, _ in wanted]
        assert [hit["score"] for hit in one["results"]] == pytest.approx([s for _, s in wanted])
        assert all({"text", "fields"} <= hit.keys() for hit in one["results"])
    given = {"query": QUERIES[0], "k": 4, "mode": "exact", "where": '{"year": 2}'}
    results = ask("GET", "/search", params=given).json()["results"]
    wanted = expected(shards, QUERIES[0], 4, where={"year": 2})
    assert [hit["id"] for hit in results] == [id for id, _ in wanted]
    assert ask("GET", "/health").json() == {"status": "ok", "stale": []}


def test_a_shard_that_is_down_is_no_smaller_answer(ask):
    addresses = ("http://0", "http://127.0.0.1:9")
    answer = ask("POST", "/search", addresses, json={"query": "cats"})
    assert answer.status_code == 503
    assert answer.json()["error"]["message"].startswith("http://127.0.0.1:9 does not answer")
    assert ask("GET", "/health", addresses).status_code == 503


def test_an_address_of_something_else_is_named(ask):
    answer = ask("POST", "/search", ("http://0", "http://0/api"), json={"query": "cats"})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 503 and message == "http://0/api does not answer as a shard does"


def test_what_the_front_refuses(ask):
    for given, message in (
        ({"query": "cats", "k": 0}, "http://0: k must be at least 1"),
        ({"query": "cats", "hybrid": "rrf"}, "hybrid is not answered over shards"),
        ({"query": "cats", "ids": ["d1"]}, "ids is not answered over shards"),
        ([1], "the body must be an object"),
    ):
        answer = ask("POST", "/search", json=given)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert ask("POST", "/search", content=b"{").status_code == 400
