"""The application, asked over ASGI: what it answers, what it refuses, and with which status."""

import asyncio
import base64
import json
import re
import threading

import numpy as np
import pytest

from colbert_jax import Hybrid, Index, Retriever
from colbert_jax.retriever import rank_documents
from colbert_jax.serving.indexes import ServedIndex
from colbert_jax.serving.limits import Limits
from colbert_jax.serving.schema import checked
from colbert_jax.serving.service import Service

SERVE = 'needs pip install "colbert-jax[serve]"'
create_app = pytest.importorskip("colbert_jax.serving.app", reason=SERVE).create_app
operations = pytest.importorskip("colbert_jax.serving.endpoints", reason=SERVE).operations
httpx = pytest.importorskip("httpx", reason="httpx asks the server")

QUERY = "running cats"


def records(texts, first=0):
    return [
        {"id": f"d{n}", "text": text, "year": 2000 + n % 3, "tags": ["odd"] if n % 2 else ["even"]}
        for n, text in enumerate(texts, first)
    ]


@pytest.fixture(scope="module")
def retriever(model, texts, tmp_path_factory) -> Retriever:
    path = tmp_path_factory.mktemp("served") / "books.index"
    return Retriever.build(path, model, records(texts[:40]))


@pytest.fixture(scope="module")
def ask(retriever):
    """Asks one application of the module: ask("POST", path, json=...)."""
    return asker({"books": retriever, "again": retriever})


def asker(indexes, **settings):
    settings = {"refresh_seconds": 0} | settings

    def ask(method, path, headers=None, **content):
        async def once(client):
            return await client.request(method, path, headers=headers, **content)

        return together(indexes, once, **settings)

    return ask


def together(indexes, scenario, **settings):
    """What a scenario, given a client of a new application, returns."""

    async def whole():
        app = create_app(indexes, **settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            return await scenario(client)

    return asyncio.run(whole())


def message(response, status) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status and "Traceback" not in response.text
    return error["message"]


def test_search_is_the_retrievers(ask, retriever):
    expected = retriever.search(QUERY, k=4)
    given = {"query": QUERY, "k": 4}
    for response in (ask("POST", "/search", json=given), ask("GET", "/search", params=given)):
        answer = response.json()
        assert response.status_code == 200 and answer["index"] == "books"
        assert [one["id"] for one in answer["results"]] == [hit.id for hit in expected]
        for one, hit in zip(answer["results"], expected, strict=True):
            assert one["text"] == hit.text and one["score"] == pytest.approx(hit.score, abs=1e-4)
            assert one["fields"] == retriever.index.fields(hit.id)


def test_search_settings(ask, retriever):
    where, ids = {"year": {"gte": 2001}}, ["d1", "d2", "d3", "d5"]
    expected = [hit.id for hit in retriever.search(QUERY, where=where, ids=ids, mode="exact")]
    assert set(expected) == {"d1", "d2", "d5"}
    given = {"query": QUERY, "where": where, "ids": ids, "mode": "exact", "index": "again"}
    answer = ask("POST", "/search", json=given).json()
    assert [one["id"] for one in answer["results"]] == expected and answer["index"] == "again"
    answer = ask("GET", "/search", params=given | {"where": json.dumps(where)}).json()
    assert [one["id"] for one in answer["results"]] == expected
    answer = ask("POST", "/search", json={"queries": [QUERY, "heat"], "k": 2}).json()
    assert [one["query"] for one in answer["answers"]] == [QUERY, "heat"]
    assert [len(one["results"]) for one in answer["answers"]] == [2, 2]


def test_learned_candidates(model, texts, tmp_path):
    learned = Retriever.build(tmp_path / "learned", model, records(texts[:40]), learned_dim=8)
    settings = {"candidates": "learned", "ndocs": 12, "k": 3}
    expected = [hit.id for hit in learned.search(QUERY, **settings)]
    given = {"query": QUERY} | settings
    for sent in ({"method": "POST", "json": given}, {"method": "GET", "params": given}):
        answer = asker({"learned": learned})(path="/search", **sent).json()
        assert [one["id"] for one in answer["results"]] == expected


def test_hybrid_searches(ask, model, texts, tmp_path):
    pytest.importorskip("bm25s", reason='needs pip install "colbert-jax[hybrid]"')
    both = Retriever.build(tmp_path / "both", model, records(texts[:40]), bm25=True)
    own = asker({"both": both}, write_key="w")
    expected = both.search(QUERY, 4, hybrid=Hybrid("relative", 0.8))
    given = {"query": QUERY, "k": 4, "hybrid": "relative", "bm25_weight": 0.8}
    for answer in (own("POST", "/search", json=given), own("GET", "/search", params=given)):
        found = answer.json()["results"]
        assert [(one["id"], one["ranks"]) for one in found] == [
            (hit.id, hit.ranks._asdict()) for hit in expected
        ]
    given = {"documents": [{"id": "z", "text": "a zebra"}]}
    assert own("PUT", "/documents", json=given, headers={"x-api-key": "w"}).status_code == 200
    given = {"query": "zebra", "k": 1, "hybrid": "rrf", "bm25_weight": 1}
    (one,) = own("POST", "/search", json=given).json()["results"]
    assert one["id"] == "z" and one["ranks"]["bm25"] == 1
    assert "keeps no BM25" in message(ask("POST", "/search", json=given), 400)
    alone = {"query": QUERY, "bm25_weight": 0.5}
    assert "give hybrid too" in message(ask("POST", "/search", json=alone), 400)
    wrong = {"query": QUERY, "hybrid": "both"}
    assert "must be one of" in message(ask("POST", "/search", json=wrong), 400)


def test_bm25_that_is_kept_later_is_served(model, texts, tmp_path):
    pytest.importorskip("bm25s", reason='needs pip install "colbert-jax[hybrid]"')
    served = ServedIndex("i", Retriever.build(tmp_path / "i", model, records(texts[:5])))
    assert not served.has_bm25
    Index.open(tmp_path / "i").keep_bm25()
    assert not served.refresh() and served.has_bm25 and served.about()["bm25"]


def test_explanation_marks_words_of_both_texts(ask, model):
    answer = ask("POST", "/search", json={"query": QUERY, "k": 2, "explain": True}).json()
    for one in answer["results"]:
        found = one["explanation"]
        assert [QUERY[word["start"] : word["end"]] for word in found["query"]] == QUERY.split()
        words = [one["text"][word["start"] : word["end"]] for word in found["document"]]
        assert words == one["text"].rstrip(".").split()[: len(words)]
        expected = model.explain(QUERY, one["text"])
        assert found["score"] == pytest.approx(expected.score, abs=1e-2)
        for word in found["query"]:
            rows = [
                i for i, w in enumerate(expected.query) if w == QUERY[word["start"] : word["end"]]
            ]
            columns = [j for j, w in enumerate(expected.document) if w == words[word["match"]]]
            best = expected.similarity[np.ix_(rows, columns)].max()
            assert word["similarity"] == pytest.approx(best, abs=1e-3)


def test_hits_without_a_text_are_not_explained(ask, monkeypatch):
    """The index may be replaced, after it was looked at, by one that keeps no texts."""
    search = Service.search
    lacking = {0}

    async def replaced(self, *arguments):
        found = await search(self, *arguments)
        return [
            one._replace(
                hits=[h._replace(text=None) if n in lacking else h for n, h in enumerate(one.hits)]
            )
            for one in found
        ]

    expected = ask("POST", "/search", json={"query": QUERY, "k": 3, "explain": True}).json()
    monkeypatch.setattr(Service, "search", replaced)
    answer = ask("POST", "/search", json={"query": QUERY, "k": 3, "explain": True}).json()
    first, *others = answer["results"]
    assert first["text"] is None and first["explanation"] is None
    assert [one["explanation"] for one in others] == [
        one["explanation"] for one in expected["results"][1:]
    ]
    lacking |= {1, 2}
    answer = ask("POST", "/search", json={"query": QUERY, "k": 3, "explain": True}).json()
    assert [one["explanation"] for one in answer["results"]] == [None] * 3


def test_rerank_in_three_shapes(ask, model, texts):
    documents = [texts[3], {"text": texts[4]}, texts[5]]
    expected = rank_documents(model, QUERY, texts[3:6])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        given = {"model": "any", "query": QUERY, "documents": documents, "top_n": 2}
        answer = ask("POST", path, json=given).json()
        assert answer["model"] == "any" and answer["usage"]["total_tokens"] > 16
        assert [one["index"] for one in answer["results"]] == [h.position for h in expected[:2]]
        for one, hit in zip(answer["results"], expected, strict=False):
            assert one["relevance_score"] == pytest.approx(hit.score, abs=1e-4)
            assert one["document"] == {"text": hit.text}
    given = {"query": QUERY, "texts": texts[3:6], "raw_scores": True, "return_text": True}
    answer = ask("POST", "/rerank", json=given).json()
    assert [(one["index"], one["text"]) for one in answer] == [
        (h.position, h.text) for h in expected
    ]
    scaled = ask("POST", "/rerank", json={"query": QUERY, "texts": texts[3:6]}).json()
    for one, raw in zip(scaled, answer, strict=True):
        assert one["score"] == pytest.approx(raw["score"] / 16) and "text" not in one


def test_score_one_query_or_pairs(ask, model, texts):
    alone = {hit.position: hit.score for hit in rank_documents(model, QUERY, texts[:3])}
    answer = ask("POST", "/score", json={"text_1": QUERY, "text_2": texts[:3]}).json()
    assert [one["score"] for one in answer["data"]] == pytest.approx(
        [alone[n] for n in range(3)], abs=1e-4
    )
    pairs = {"queries": [QUERY, "heat"], "documents": [texts[0], texts[1]]}
    answer = ask("POST", "/score", json=pairs).json()
    assert answer["data"][0]["score"] == pytest.approx(alone[0], abs=1e-4)
    assert "one for each" in message(
        ask("POST", "/score", json={"queries": ["a", "b"], "documents": texts[:3]}), 400
    )
    assert "give queries" in message(ask("POST", "/score", json={"text_1": "a"}), 400)


def test_pooling_gives_token_embeddings(ask, model, texts):
    given = {"input": [texts[0], texts[1]], "task": "token_embed"}
    rows = [one["data"] for one in ask("POST", "/pooling", json=given).json()["data"]]
    expected = model.encode_documents(texts[:2])
    for row, other in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row, other, atol=1e-5)
    given = {"input": QUERY, "is_query": True, "encoding_format": "base64"}
    (one,) = ask("POST", "/pooling", json=given).json()["data"]
    row = np.frombuffer(base64.b64decode(one["data"]), "<f4").reshape(-1, model.dim)
    np.testing.assert_allclose(row, model.encode_queries(QUERY)[0], atol=1e-5)


def test_the_shape_of_dspy_and_stanford(ask, retriever):
    expected = [hit.id for hit in retriever.search(QUERY, k=3)]
    for response in (
        ask("GET", "/api/search", params={"query": QUERY, "k": 3}),
        ask("POST", "/api/search", json={"query": QUERY, "k": 3}),
    ):
        topk = response.json()["topk"]
        assert [one["pid"] for one in topk] == expected
        assert [one["rank"] for one in topk] == [1, 2, 3] and topk[0]["long_text"]
        assert sum(one["prob"] for one in topk) == pytest.approx(1)


BAD = [
    ({}, 400, "give query or queries"),
    ({"query": "a", "queries": ["b"]}, 400, "give query or queries"),
    ({"query": "  "}, 400, "query 0 is empty or blank"),
    ({"query": "\ud800"}, 400, "not valid Unicode"),
    ({"query": "a" * 10_000}, 400, "query may have at most 8192 characters"),
    ({"query": "a", "k": 1_000_000_000}, 400, "k must be at most 1000"),
    ({"query": "a", "wehre": {}}, 400, 'has no field "wehre"'),
    ({"query": "a", "where": {"color": 1}}, 400, "no document has a field 'color'"),
    ({"query": "a", "where": {"year": {"near": 1}}}, 400, "no such operator"),
    ({"query": "a", "ids": ["nobody"]}, 404, "books: no document has the id 'nobody'"),
    ({"query": "a", "index": "films"}, 404, "no index is called 'films'; there are: books, again"),
    ({"query": "a", "mode": "exact", "ncells": 3}, 400, "means nothing"),
    ({"query": "a", "candidates": "learned"}, 400, "books: has no learned vectors"),
    ({"query": "a", "candidates": "best"}, 400, 'candidates must be one of "plaid", "learned"'),
    ([], 400, "the body must be an object"),
]


@pytest.mark.parametrize(("body", "status", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_searches_are_named(ask, body, status, text, tmp_path_factory):
    told = message(ask("POST", "/search", content=json.dumps(body)), status)
    assert text in told and str(tmp_path_factory.getbasetemp()) not in told


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not JSON"),
        (b'{"query": ', "not JSON"),
        (b'{"query": "\xff"}', "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"query": "a", "k": NaN}', "NaN is no number"),
        (b'{"query": "a", "k": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bad_json_is_named(ask, content, text):
    assert text in message(ask("POST", "/search", content=content), 400)


def test_other_addresses_and_methods(ask):
    assert "/docs lists" in message(ask("GET", "/serach"), 404)
    assert message(ask("DELETE", "/search"), 405)
    assert "given 2 times" in message(ask("GET", "/search?query=a&query=b"), 400)
    assert "query is missing" in message(ask("GET", "/search"), 400)


def test_health_indexes_documents_and_metrics(ask, retriever):
    health = ask("GET", "/health").json()
    assert health["status"] == "ok" and health["stale"] == []
    books, again = ask("GET", "/indexes").json()["indexes"]
    assert books["name"] == "books" and again["name"] == "again" and books["documents"] == 40
    assert books["fields"] == {"tags": ["list"], "year": ["number"]}
    one = ask("GET", "/documents/d7").json()
    assert one == {
        "id": "d7",
        "text": retriever.index.text("d7"),
        "fields": {"year": 2001, "tags": ["odd"]},
    }
    message(ask("GET", "/documents/nobody/else"), 404)

    async def scenario(client):
        await asyncio.gather(*(client.get("/search", params={"query": "a"}) for _ in range(6)))
        await client.get("/search")
        return (await client.get("/metrics")).text

    counted = together({"books": retriever}, scenario, limits=Limits(wait_ms=200.0))
    assert 'colbert_jax_requests_total{route="/search",status="200"} 6.0' in counted
    assert 'colbert_jax_requests_total{route="/search",status="400"} 1.0' in counted
    assert 'colbert_jax_batch_size_sum{lane="search"} 6.0' in counted
    assert 'colbert_jax_batch_size_count{lane="search"} 1.0' in counted  # one call for all
    assert 'colbert_jax_documents{index="books"} 40.0' in counted


def test_requests_of_different_settings_are_answered_apart(retriever):
    async def scenario(client):
        asked = [{"query": QUERY, "k": n} for n in (1, 2, 3)] + [
            {"query": QUERY, "where": {"year": 2001}},
            {"query": "a", "where": {"colour": 1}},
        ]
        return await asyncio.gather(*(client.post("/search", json=one) for one in asked))

    *good, bad = together(retriever, scenario, limits=Limits(wait_ms=200.0))
    assert [len(one.json()["results"]) for one in good[:3]] == [1, 2, 3]
    assert {one["fields"]["year"] for one in good[3].json()["results"]} == {2001}
    assert "colour" in message(bad, 400)


def test_keys(retriever):
    ask = asker(retriever, api_key="read", write_key="write")
    for path in ("/", "/docs", "/openapi.json", "/health"):
        assert ask("GET", path).status_code == 200
    for path in ("/indexes", "/metrics", "/documents/d1", "/search?query=a"):
        assert "a key is needed" in message(ask("GET", path), 401)
        assert "not the server's" in message(ask("GET", path, {"x-api-key": "rea"}), 401)
        assert ask("GET", path, {"x-api-key": "read"}).status_code == 200
        assert ask("GET", path, {"authorization": "Bearer write"}).status_code == 200
    given = {"ids": ["d0"]}
    assert "write key" in message(
        ask("DELETE", "/documents", {"x-api-key": "read"}, json=given), 403
    )
    message(ask("DELETE", "/documents", json=given), 401)
    without = asker(retriever, api_key="read")
    told = message(without("DELETE", "/documents", {"x-api-key": "read"}, json=given), 403)
    assert "COLBERT_JAX_WRITE_KEY" in told
    open_to_read = asker(retriever, write_key="write")
    assert open_to_read("GET", "/indexes").status_code == 200
    message(open_to_read("DELETE", "/documents", json=given), 401)
    with pytest.raises(ValueError, match="API key is empty"):
        create_app(retriever, api_key=" ")


def test_cors_is_off_unless_asked(retriever):
    headers = {"origin": "https://example.org"}
    assert "access-control-allow-origin" not in asker(retriever)("GET", "/health", headers).headers
    ask = asker(retriever, cors=["https://example.org"])
    allowed = ask("GET", "/health", headers).headers["access-control-allow-origin"]
    assert allowed == "https://example.org"
    other = ask("GET", "/health", {"origin": "https://example.com"}).headers
    assert "access-control-allow-origin" not in other


def test_a_long_body_is_refused(retriever):
    ask = asker(retriever, limits=Limits(body=1000))
    told = message(ask("POST", "/search", content=b"x" * 2000), 413)
    assert told == "the body is longer than 1000 bytes"

    async def parts():
        for _ in range(20):
            yield b"x" * 100

    assert message(ask("POST", "/search", content=parts()), 413) == told


def test_a_full_queue_and_slow_work(retriever, monkeypatch):
    go_on, search = threading.Event(), Retriever.search

    def slow(*arguments, **settings):
        assert go_on.wait(20)
        return search(*arguments, **settings)

    monkeypatch.setattr(Retriever, "search", slow)

    async def scenario(client):
        def later():
            return asyncio.ensure_future(client.get("/search", params={"query": "a"}))

        tasks = []
        for _ in range(4):
            tasks.append(later())
            await asyncio.sleep(0.05)
        assert "2 requests wait already" in message(await tasks.pop(), 429)
        assert "no answer within 0.5 seconds" in message(await tasks[0], 504)
        go_on.set()
        return await asyncio.gather(*tasks[1:])

    limits = Limits(wait_ms=0.0, batch=1, queue=2, timeout=0.5)
    answers = together(retriever, scenario, limits=limits)
    # Whoever waited longer than that was told so; nobody got a traceback.
    assert {one.status_code for one in answers} <= {200, 504}


def test_errors_of_the_server_are_told_to_its_log_only(retriever, monkeypatch, caplog):
    def broken(*arguments, **settings):
        raise RuntimeError("a secret place")

    monkeypatch.setattr(Retriever, "search", broken)
    told = message(asker(retriever)("GET", "/search", params={"query": "a"}), 500)
    assert told == "the server could not answer; its log says why"
    assert "a secret place" in caplog.text


@pytest.fixture
def living(model, texts, tmp_path):
    return Retriever.build(tmp_path / "living", model, records(texts[:10]))


def test_documents_are_added_replaced_and_deleted(living, texts):
    ask = asker(living, write_key="w")
    key = {"x-api-key": "w"}

    def change(method, status, **body):
        response = ask(method, "/documents", key, json=body)
        return response.json() if status == 200 else message(response, status)

    new = records(texts[10:12], 10)
    assert change("POST", 200, documents=new)["documents"] == 12
    assert "already has the document ids 'd10', 'd11'" in change("POST", 409, documents=new)
    found = ask("GET", "/search", params={"query": texts[11], "ids": "d11"}).json()
    assert found["results"][0]["id"] == "d11" and found["generation"] == 1
    changed = [{"id": "d11", "text": texts[20]}]
    assert change("PUT", 200, documents=changed, must_exist=True)["documents"] == 12
    assert ask("GET", "/documents/d11").json() == {"id": "d11", "text": texts[20], "fields": {}}
    change("PUT", 404, documents=[{"id": "new", "text": "a"}], must_exist=True)
    assert change("PUT", 200, documents=[{"id": "new", "text": "a"}])["documents"] == 13
    assert change("DELETE", 200, ids=["new", "d0"])["documents"] == 11
    assert "'d0'" in change("DELETE", 404, ids=["d0"])
    assert "field 'bad'" in change("POST", 400, documents=[{"id": "x", "text": "a", "bad": [1]}])


def test_the_next_state_is_followed_without_losing_a_request(living, model, texts):
    """Another process's changes: a second retriever on the same folder."""
    writer = Retriever.open(living.index.path, model)

    async def scenario(client):
        async def search():
            answer = await client.get("/search", params={"query": texts[30], "k": 1})
            assert answer.status_code == 200
            return answer.json()

        assert (await search())["generation"] == 0
        change = asyncio.ensure_future(
            asyncio.to_thread(writer.add, [("late", texts[30])], progress=False)
        )
        generations = []
        async with asyncio.timeout(60):
            while not generations or generations[-1] == 0:
                generations.append((await search())["generation"])
        await change
        assert (await search())["results"][0]["id"] == "late"
        # A new index in its place.
        change = asyncio.ensure_future(
            asyncio.to_thread(
                Retriever.build, living.index.path, model, {"only": texts[30]}, overwrite=True
            )
        )
        found = []
        async with asyncio.timeout(60):
            while not found or found[-1] != "only":
                found.append((await search())["results"][0]["id"])
        await change
        return set(found)

    assert together(living, scenario, refresh_seconds=0.02) == {"late", "only"}


def test_a_state_that_cannot_be_searched_leaves_the_former(living, model, texts):
    async def scenario(client):
        metadata = living.index.path / "metadata.json"
        kept = metadata.read_bytes()
        metadata.write_text("{}")
        async with asyncio.timeout(30):
            while (health := (await client.get("/health")).json())["status"] == "ok":
                await asyncio.sleep(0.02)
        assert health["stale"] == ["living"]
        assert (await client.get("/search", params={"query": "heat"})).status_code == 200
        metadata.write_bytes(kept)
        async with asyncio.timeout(30):
            while (await client.get("/health")).json()["status"] != "ok":
                await asyncio.sleep(0.02)

    together(living, scenario, refresh_seconds=0.02)


def test_openapi_is_what_is_checked(ask):
    api = ask("GET", "/openapi.json").json()
    assert api["openapi"] == "3.1.0"
    for one in operations(Limits()):
        path = re.sub(r":\w+\}", "}", one.path)
        described = api["paths"][path][one.method.lower()]
        if one.from_query:
            names = {parameter["name"] for parameter in described["parameters"]}
            assert names == set(one.schema["properties"])
        else:
            assert described["requestBody"]["content"]["application/json"]["schema"] == one.schema
    schema = {"type": "object", "required": ["openapi", "info", "paths"]}
    assert checked(api, schema) == api


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_ask_nobody_else_and_run_only_their_own_script(ask, path):
    response = ask("GET", path)
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'; script-src 'sha256-" in response.headers["content-security-policy"]
    page = response.text
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", page)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
    assert 'name="viewport"' in page and not re.findall(r"\son\w+=", page)


def test_retrievers_only_under_names_that_an_address_takes(retriever):
    for wrong in ([], {}, "folder"):
        with pytest.raises(TypeError, match="serve a Retriever"):
            create_app(wrong)
    with pytest.raises(ValueError, match="cannot be an index's name"):
        create_app({"a b": retriever})
    with pytest.raises(ValueError, match="queue must be at least 1, got 0"):
        Limits(queue=0)
