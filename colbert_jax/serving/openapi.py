"""The description of the server's addresses in OpenAPI 3.1, from the schemas that it checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from colbert_jax.serving.endpoints import Operation

_ERRORS = {
    "400": "The request is not as described; the message says where.",
    "401": "A key is missing or wrong.",
    "404": "No such index or document.",
    "413": "The body is too long.",
    "429": "Too many requests wait; try again.",
    "504": "It took too long.",
}


def openapi(operations: Sequence[Operation], version: str) -> dict[str, Any]:
    """An OpenAPI document.

    Args:
      version: of this library.
    """
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = _described(one)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "colbert_jax", "version": version},
        "paths": paths,
        "components": {
            "securitySchemes": schemes,
            "schemas": {
                "Error": {
                    "type": "object",
                    "properties": {
                        "error": {
                            "type": "object",
                            "properties": {
                                "code": {"type": "integer"},
                                "message": {"type": "string"},
                            },
                        }
                    },
                }
            },
        },
    }


def _described(one: Operation) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    described: dict[str, Any] = {
        "summary": one.summary,
        "responses": {
            "200": {
                "description": "The answer",
                "content": {"application/json": {"example": one.reply}},
            }
        }
        | {status: {"description": about, "content": error} for status, about in _ERRORS.items()},
    }
    if not one.open:
        described["security"] = [{"bearer": []}, {"header": []}]
    if not one.from_query:
        content = {"application/json": {"schema": one.schema}}
        described["requestBody"] = {"required": True, "content": content}
        return described
    described["parameters"] = [
        {
            "name": name,
            "in": "path" if name == one.in_path else "query",
            "required": name in one.schema["required"],
        }
        | (
            {"content": {"application/json": {"schema": schema}}}
            if schema.get("type") == "object"
            else {"schema": schema}
        )
        for name, schema in one.schema["properties"].items()
    ]
    return described
