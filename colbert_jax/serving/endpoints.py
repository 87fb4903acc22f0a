"""What can be asked: for each address its schema, and what is answered."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from colbert_jax.colbert import ColBERT
from colbert_jax.config import CANDIDATES, MODES
from colbert_jax.fusion import FUSIONS, Hybrid
from colbert_jax.serving.indexes import ServedIndex
from colbert_jax.serving.limits import Limits
from colbert_jax.serving.schema import Schema
from colbert_jax.serving.service import RequestError, Service
from colbert_jax.serving.shading import shading
from colbert_jax.serving.work import Encoding, Found, max_sim
from colbert_jax.text import as_queries, as_texts


@dataclass(frozen=True)
class Operation:
    """A method of an address.

    handler: the service, and values as the schema has them, to a reply that JSON takes.
    schema: an object; of the body, or, where `from_query`, of the parameters in the address.
    reply: a description of the answer, and an example of it.
    open: asked without a key. writes: asked with the write key only.
    in_path: a name in the address that is one of the values.
    """

    method: str
    path: str
    summary: str
    handler: Callable[[Service, dict[str, Any]], Awaitable[Any]]
    schema: Schema
    reply: Any
    from_query: bool = False
    open: bool = False
    writes: bool = False
    in_path: str | None = None


def operations(limits: Limits) -> list[Operation]:
    """All that a server with these limits answers, except pages."""
    return [
        *_search_operations(limits),
        *_text_operations(limits),
        *_document_operations(limits),
        Operation(
            "GET",
            "/indexes",
            "The indexes that are served",
            _indexes,
            _object({}),
            {"indexes": [{"name": "books", "documents": 3, "fields": {"year": ["number"]}}]},
            from_query=True,
        ),
        Operation(
            "GET",
            "/health",
            "Whether the server answers",
            _health,
            _object({}),
            {"status": "ok", "version": "0.1.0", "stale": []},
            from_query=True,
            open=True,
        ),
    ]


# --- Search ---


def _search_operations(limits: Limits) -> list[Operation]:
    query = _string("What to look for.", limits.query_chars, 1)
    settings: dict[str, Schema] = {
        "index": _string("Name of the index; if left out, the first.", 64),
        "k": _integer("Results of a query.", limits.k) | {"default": 10},
        "mode": {
            "type": "string",
            "enum": list(MODES),
            "default": "accurate",
            "description": "How hard to look.",
        },
        "candidates": {
            "type": "string",
            "enum": list(CANDIDATES),
            "description": "How candidates are found; learned needs an index with learned vectors.",
        },
        "where": {"type": "object", "description": "A condition on the documents' fields."},
        "ids": {
            "type": "array",
            "items": _string("A document's id.", 1024),
            "maxItems": limits.documents,
            "description": "Find only documents of these ids.",
        },
        "ncells": _integer("Centroids probed for a query token.", 1 << 14),
        "centroid_score_threshold": {"type": "number", "minimum": -1, "maximum": 1},
        "ndocs": _integer("Candidates kept by the first ranking.", 1 << 17),
        "hybrid": {
            "type": "string",
            "enum": list(FUSIONS),
            "description": "Look for the query's words too, with BM25, and join both results by "
            "ranks (rrf) or by scores (relative).",
        },
        "bm25_weight": {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "description": "BM25's part of a hybrid search; if left out, 0.5.",
        },
        "explain": {
            "type": "boolean",
            "default": False,
            "description": "Say which words of query and document match.",
        },
    }
    many = {
        "type": "array",
        "items": query,
        "minItems": 1,
        "maxItems": limits.queries,
        "description": "Several queries in place of `query`; `answers` then has one for each.",
    }
    example = {
        "index": "books",
        "generation": 0,
        "took_ms": 9.1,
        "results": [{"id": "dune", "score": 21.4, "text": "Dune is ...", "fields": {"year": 1965}}],
    }
    dspy = _object(
        {"query": query, "k": settings["k"], "index": settings["index"]}, ["query"], more=True
    )
    topk = {"text": "Dune is ...", "pid": "dune", "rank": 1, "score": 21.4, "prob": 0.9}
    return [
        Operation(
            "POST",
            "/search",
            "Find documents",
            _search,
            _object({"query": query, "queries": many} | settings),
            example,
        ),
        Operation(
            "GET",
            "/search",
            "Find documents",
            _search,
            _object({"query": query} | settings, ["query"]),
            example,
            from_query=True,
        ),
        Operation(
            "GET",
            "/api/search",
            "Find documents, as Stanford's server and DSPy ask",
            _topk,
            dspy,
            {"query": "dune", "topk": [topk]},
            from_query=True,
        ),
        Operation(
            "POST",
            "/api/search",
            "Find documents, as DSPy asks",
            _topk,
            dspy,
            {"query": "dune", "topk": [topk | {"long_text": "Dune is ..."}]},
        ),
    ]


_SETTINGS = (
    "k",
    "mode",
    "candidates",
    "where",
    "ids",
    "ncells",
    "centroid_score_threshold",
    "ndocs",
)


async def _search(service: Service, values: dict[str, Any]) -> Any:
    start = time.monotonic()
    served = service.index(values.get("index"))
    several = "queries" in values
    if several == ("query" in values):
        raise RequestError(400, "give query or queries, one of the two")
    queries = as_queries(values["queries"] if several else [values["query"]])
    settings = {name: values[name] for name in _SETTINGS if name in values}
    settings |= _hybrid(served, values)
    if values["explain"] and served.now.index.texts is None:
        raise RequestError(400, "this index keeps no texts, so nothing can be explained")
    found = await service.search(served, queries, settings)
    answers = [_results(one) for one in found]
    if values["explain"]:
        for query, results in zip(queries, answers, strict=True):
            await _explain(service, served.now.model, query, results)
    reply: dict[str, Any] = {
        "index": served.name,
        "generation": found[0].generation,
        "took_ms": round((time.monotonic() - start) * 1000, 2),
    }
    if several:
        pairs = zip(queries, answers, strict=True)
        return reply | {"answers": [{"query": q, "results": results} for q, results in pairs]}
    return reply | {"results": answers[0]}


def _hybrid(served: ServedIndex, values: Mapping[str, Any]) -> dict[str, Hybrid]:
    if "hybrid" not in values:
        if "bm25_weight" in values:
            raise RequestError(400, "bm25_weight belongs to a hybrid search: give hybrid too")
        return {}
    if not served.has_bm25:
        raise RequestError(
            400,
            "no hybrid searches of this index here: it keeps no BM25 (colbert-jax bm25 INDEX), or "
            'the server lacks pip install "colbert-jax[hybrid]"',
        )
    given = {"bm25_weight": values["bm25_weight"]} if "bm25_weight" in values else {}
    return {"hybrid": Hybrid(values["hybrid"], **given)}


def _results(found: Found) -> list[dict[str, Any]]:
    results = []
    for hit, fields in zip(found.hits, found.fields, strict=True):
        one = {"id": hit.id, "score": hit.score, "text": hit.text}
        if fields:
            one["fields"] = fields
        if hit.ranks is not None:
            one["ranks"] = hit.ranks._asdict()
        results.append(one)
    return results


async def _explain(
    service: Service, model: ColBERT, query: str, results: list[dict[str, Any]]
) -> None:
    # A state of the index that keeps no texts may have come between.
    texts = [one["text"] for one in results if one["text"] is not None]

    def finish(queries: list[np.ndarray], documents: list[np.ndarray]) -> list[dict[str, Any]]:
        pairs = zip(texts, documents, strict=True)
        return [shading(model.tokenizer, query, text, queries[0], d) for text, d in pairs]

    found = iter(await service.encode(Encoding(model, [query], texts, finish)) if texts else ())
    for one in results:
        one["explanation"] = None if one["text"] is None else next(found)


async def _topk(service: Service, values: dict[str, Any]) -> Any:
    served = service.index(values.get("index"))
    (query,) = as_queries([values["query"]])
    (found,) = await service.search(served, [query], {"k": values["k"]})
    scores = np.array([hit.score for hit in found.hits])
    weights = np.exp(scores - scores.max(initial=-np.inf))
    topk = [
        {
            "text": hit.text or "",
            "long_text": hit.text or "",
            "pid": hit.id,
            "rank": rank,
            "score": hit.score,
            "prob": float(weight),
        }
        for rank, (hit, weight) in enumerate(
            zip(found.hits, weights / max(weights.sum(), 1e-30), strict=True), 1
        )
    ]
    return {"query": query, "topk": topk}


# --- Texts that need no index ---


def _text_operations(limits: Limits) -> list[Operation]:
    query = _string("The query.", limits.query_chars, 1)
    text = _string("A document.", limits.document_chars)
    model = _string("Name of an index, for its model; any other name is the first one's.", 1024)
    texts = _list(text, limits.documents)
    documents = _list(
        {"anyOf": [text, _object({"text": text}, ["text"], more=True)]}, limits.documents
    )
    cohere = _object(
        {
            "model": model,
            "query": query,
            "documents": documents,
            "top_n": _integer("Results; if left out, all.", 1 << 30),
            "return_documents": {"type": "boolean", "default": True},
        },
        ["query", "documents"],
        more=True,
    )
    tei = _object(
        {
            "query": query,
            "texts": texts,
            "return_text": {"type": "boolean", "default": False},
            "raw_scores": {
                "type": "boolean",
                "default": False,
                "description": "True: MaxSim; false: divided by the number of query tokens.",
            },
        },
        ["query", "texts"],
        more=True,
    ) | {"x-when": "texts"}
    ranked = {
        "id": "rerank-0",
        "model": "books",
        "usage": {"total_tokens": 40},
        "results": [{"index": 1, "relevance_score": 21.4, "document": {"text": "Dune is ..."}}],
    }
    one_or_more = {"anyOf": [query, _list(query, limits.documents)]}
    one_or_more_texts = {"anyOf": [text, texts]}
    score = _object(
        {
            "model": model,
            "queries": one_or_more,
            "documents": one_or_more_texts,
            "text_1": one_or_more,
            "text_2": one_or_more_texts,
        },
        more=True,
    )
    pooling = _object(
        {
            "model": model,
            "input": {"anyOf": [text, _list(text, limits.queries)]},
            "task": {"type": "string", "enum": ["token_embed"], "default": "token_embed"},
            "is_query": {
                "type": "boolean",
                "default": False,
                "description": "Whether the texts are queries; else they are documents.",
            },
            "encoding_format": {
                "type": "string",
                "enum": ["float", "base64"],
                "default": "float",
                "description": "base64: little-endian float32, row by row.",
            },
        },
        ["input"],
        more=True,
    )
    about = "Order documents by their scores, as Cohere, Jina and vLLM"
    return [
        Operation(
            "POST",
            "/rerank",
            f"{about}; with `texts`, as TEI",
            _rerank,
            {"anyOf": [tei, cohere]},
            ranked,
        ),
        Operation("POST", "/v1/rerank", about, _rerank, cohere, ranked),
        Operation("POST", "/v2/rerank", about, _rerank, cohere, ranked),
        Operation(
            "POST",
            "/score",
            "Scores of pairs, as vLLM",
            _score,
            score,
            {"object": "list", "data": [{"index": 0, "object": "score", "score": 21.4}]},
        ),
        Operation(
            "POST",
            "/pooling",
            "Token embeddings, as vLLM",
            _pooling,
            pooling,
            {"object": "list", "data": [{"index": 0, "object": "pooling", "data": [[0.1]]}]},
        ),
    ]


async def _rerank(service: Service, values: dict[str, Any]) -> Any:
    (query,) = as_queries([values["query"]])
    is_tei = "texts" in values
    given = values["texts"] if is_tei else values["documents"]
    texts = as_texts([one if isinstance(one, str) else one["text"] for one in given], "document")
    found = await _scored(service, values.get("model"), [query], texts)
    scores, tokens, length = found
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]  # a document without a token has no score
    if is_tei:
        scale = 1 if values["raw_scores"] else max(length, 1)
        return [
            {"index": i, "score": float(scores[i]) / scale}
            | ({"text": texts[i]} if values["return_text"] else {})
            for i in order.tolist()
        ]
    results = []
    for i in order[: values.get("top_n")].tolist():
        one: dict[str, Any] = {"index": i, "relevance_score": float(scores[i])}
        if values["return_documents"]:
            one["document"] = {"text": texts[i]}
        results.append(one)
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": _model_name(service, values),
        "usage": {"total_tokens": tokens},
        "results": results,
    }


async def _score(service: Service, values: dict[str, Any]) -> Any:
    left, right = (
        next((values[name] for name in names if name in values), None)
        for names in (("queries", "text_1"), ("documents", "text_2"))
    )
    if left is None or right is None:
        raise RequestError(400, "give queries and documents, or text_1 and text_2")
    queries = as_queries(left)
    texts = as_texts(right, "document")
    if len(queries) not in (1, len(texts)):
        raise RequestError(
            400, f"give one query, or one for each document: {len(queries)} for {len(texts)}"
        )
    scores, tokens, _ = await _scored(service, values.get("model"), queries, texts)
    data = [
        {"index": i, "object": "score", "score": value if np.isfinite(value) else None}
        for i, value in enumerate(scores.tolist())
    ]
    return _listed("score", service, values, data, tokens)


async def _scored(
    service: Service, name: str | None, queries: list[str], texts: list[str]
) -> tuple[np.ndarray, int, int]:
    """Scores of documents with the one query, or each with its own; all token embeddings, and those
    of the first query."""

    def finish(q: list[np.ndarray], d: list[np.ndarray]) -> tuple[np.ndarray, int, int]:
        if len(q) == 1:
            scores = max_sim(q[0], d)
        else:
            pairs = zip(q, d, strict=True)
            scores = np.array([max_sim(one, [other])[0] for one, other in pairs])
        return scores, sum(map(len, q)) + sum(map(len, d)), len(q[0])

    return await service.encode(Encoding(service.model(name), queries, texts, finish))


async def _pooling(service: Service, values: dict[str, Any]) -> Any:
    given = values["input"]
    texts = as_texts(given, "text")
    is_query, as_base64 = values["is_query"], values["encoding_format"] == "base64"
    if is_query:
        texts = as_queries(texts)

    def finish(q: list[np.ndarray], d: list[np.ndarray]) -> tuple[list[Any], int]:
        rows = q if is_query else d
        if as_base64:
            shown: list[Any] = [
                base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows
            ]
        else:
            shown = [row.tolist() for row in rows]
        return shown, sum(map(len, rows))

    queries, documents = (texts, []) if is_query else ([], texts)
    work = Encoding(service.model(values.get("model")), queries, documents, finish)
    rows, tokens = await service.encode(work)
    data = [{"index": i, "object": "pooling", "data": row} for i, row in enumerate(rows)]
    return _listed("pool", service, values, data, tokens)


def _listed(
    kind: str, service: Service, values: Mapping[str, Any], data: list[Any], tokens: int
) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": _model_name(service, values),
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _model_name(service: Service, values: Mapping[str, Any]) -> str:
    return values.get("model") or next(iter(service.indexes))


# --- Documents ---


def _document_operations(limits: Limits) -> list[Operation]:
    index = _string("Name of the index; if left out, the first.", 64)
    identity = _string("The document's id.", 1024)
    document = _object(
        {
            "id": {"anyOf": [identity, {"type": "integer"}]},
            "text": _string("The document.", limits.document_chars),
        },
        ["text"],
        more=True,
    ) | {"description": "All else in it are fields."}
    documents = _list(document, limits.documents)
    changed = {"index": "books", "documents": 4, "generation": 1}
    put = _object(
        {
            "index": index,
            "documents": documents,
            "must_exist": {
                "type": "boolean",
                "default": False,
                "description": "Refuse ids that are not there, in place of adding them.",
            },
        },
        ["documents"],
    )
    many = _list(identity, limits.documents)
    return [
        Operation(
            "POST",
            "/documents",
            "Add documents; ids that are there are refused",
            _add,
            _object({"index": index, "documents": documents}, ["documents"]),
            changed,
            writes=True,
        ),
        Operation(
            "PUT",
            "/documents",
            "Add documents, or replace those of their ids",
            _put,
            put,
            changed,
            writes=True,
        ),
        Operation(
            "DELETE",
            "/documents",
            "Delete documents",
            _delete,
            _object({"index": index, "ids": many}, ["ids"]),
            changed,
            writes=True,
        ),
        Operation(
            "GET",
            "/documents/{id:path}",
            "A document",
            _document,
            _object({"index": index, "id": identity}, ["id"]),
            {"id": "dune", "text": "Dune is ...", "fields": {"year": 1965}},
            from_query=True,
            in_path="id",
        ),
    ]


async def _add(service: Service, values: dict[str, Any]) -> Any:
    return await _changed(service, values, "add", values["documents"])


async def _put(service: Service, values: dict[str, Any]) -> Any:
    kind = "update" if values["must_exist"] else "upsert"
    return await _changed(service, values, kind, values["documents"])


async def _delete(service: Service, values: dict[str, Any]) -> Any:
    return await _changed(service, values, "delete", values["ids"])


async def _changed(
    service: Service, values: Mapping[str, Any], kind: str, argument: Sequence[Any]
) -> Any:
    served = service.index(values.get("index"))
    await service.change(served, kind, argument)
    return {
        "index": served.name,
        "documents": len(served.now),
        "generation": served.generation,
    }


async def _document(service: Service, values: dict[str, Any]) -> Any:
    retriever = service.index(values.get("index")).now
    index, identity = retriever.index, values["id"]
    return {
        "id": identity,
        "text": None if index.texts is None else index.text(identity),
        "fields": index.fields(identity),
    }


# --- The server ---


async def _indexes(service: Service, values: dict[str, Any]) -> Any:
    return {"indexes": [one.about() for one in service.indexes.values()]}


async def _health(service: Service, values: dict[str, Any]) -> Any:
    stale = [one.name for one in service.indexes.values() if one.problem is not None]
    return {"status": "stale" if stale else "ok", "version": service.version, "stale": stale}


# --- Schemas ---


def _object(
    properties: dict[str, Schema], required: Sequence[str] = (), *, more: bool = False
) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": more,
    }


def _string(about: str, most: int, least: int = 0) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most, "description": about}


def _integer(about: str, most: int) -> Schema:
    return {"type": "integer", "minimum": 1, "maximum": most, "description": about}


def _list(items: Schema, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}
