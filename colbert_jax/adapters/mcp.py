"""An MCP server over indexes, for coding agents and assistants: `colbert-jax mcp`, extra `mcp`."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from colbert_jax.adapters.common import find
from colbert_jax.index.columns import UnknownIdError
from colbert_jax.retriever import Retriever

_IndexName = Annotated[str | None, Field(description="name of an index; if left out, the first")]
_MOST = 100  # results: an agent reads all of them


def make_server(indexes: Mapping[str, Retriever]) -> MCPServer:
    """A server with the tools `search`, `explain` and `get`.

    Args:
      indexes: retrievers by name; the first is meant where a call names none.

    Returns:
      the server; `server.run()` answers on standard input and output.
    """
    names = list(indexes)
    about = "; ".join(f"{name}: {len(one)} documents" for name, one in indexes.items())
    server = MCPServer(
        "colbert-jax", instructions=f"Searches documents by meaning. Indexes: {about}."
    )

    def chosen(index: str | None) -> Retriever:
        name = names[0] if index is None else index
        if name not in indexes:
            raise ValueError(f"no index is called {name!r}; there are: {', '.join(names)}")
        retriever = indexes[name]
        with contextlib.suppress(OSError, ValueError):  # else it is searched as it was
            retriever.refresh()
        return retriever

    @server.tool(description="Find the passages that answer a query or are about it, best first.")
    @_explained
    def search(
        query: Annotated[str, Field(description="a question or key words")],
        k: Annotated[int, Field(description="results", ge=1, le=_MOST)] = 5,
        where: Annotated[
            dict[str, Any] | None,
            Field(description='condition on fields, as in {"year": {"gte": 2020}}'),
        ] = None,
        index: _IndexName = None,
    ) -> str:
        found = find(chosen(index), query, k, {"where": where})
        return _json(
            [
                {"id": hit.id, "score": round(hit.score, 4), "text": hit.text} | _shown(fields)
                for hit, fields in found
            ]
        )

    @server.tool(description="Say which words of a query match which words of a document.")
    @_explained
    def explain(
        query: str,
        id: Annotated[str, Field(description="a document's id, as search gives it")],
        index: _IndexName = None,
    ) -> str:
        retriever = chosen(index)
        found = retriever.model.explain(query, retriever.index.text(id))
        matches = [
            {"query": word, "document": match, "similarity": round(similarity, 3)}
            for word, match, similarity in found.strongest(20)
        ]
        return _json({"score": round(found.score, 4), "matches": matches})

    @server.tool(description="The whole text of a document, and its fields.")
    @_explained
    def get(
        id: Annotated[str, Field(description="a document's id, as search gives it")],
        index: _IndexName = None,
    ) -> str:
        state = chosen(index).index
        return _json({"id": id, "text": state.text(id)} | _shown(state.fields(id)))

    return server


def _explained(tool: Callable[..., str]) -> Callable[..., str]:
    """Tell the client what was wrong with its arguments; of other errors it hears nothing."""

    @functools.wraps(tool)
    def told(**arguments: Any) -> str:
        try:
            return tool(**arguments)
        except (ValueError, TypeError, UnknownIdError) as error:
            raise ToolError(str(error)) from None

    return told


def _shown(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"fields": dict(fields)} if fields else {}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
