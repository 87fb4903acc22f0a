"""Qdrant's local mode, which scores exactly in NumPy: its server, which has indexes, is no Python
package. It keeps lists of floats: give it a thousand passages, not ten thousand."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models

BATCHES = True


def settings(k: int) -> list[dict[str, Any]]:
    return [{}]


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("qdrant-client", "numpy")}


def build(folder: Path, values: np.ndarray, lengths: np.ndarray, nbits: int) -> None:
    client = QdrantClient(path=str(folder))
    client.create_collection(
        "documents",
        vectors_config=models.VectorParams(
            size=values.shape[1],
            distance=models.Distance.COSINE,
            multivector_config=models.MultiVectorConfig(
                comparator=models.MultiVectorComparator.MAX_SIM
            ),
        ),
    )
    documents = np.split(values.astype(np.float32), np.cumsum(lengths)[:-1])
    for first in range(0, len(documents), 100):
        points = [
            models.PointStruct(id=first + i, vector=rows.tolist())
            for i, rows in enumerate(documents[first : first + 100])
            if len(rows)
        ]
        client.upsert("documents", points=points)
    client.close()


def open(folder: Path) -> QdrantClient:
    return QdrantClient(path=str(folder))


def prepare(queries: list[np.ndarray]) -> list[list[list[float]]]:
    return [query.tolist() for query in queries]


def search(opened: QdrantClient, prepared: list, k: int, settings: dict[str, Any]) -> Any:
    requests = [models.QueryRequest(query=query, limit=k) for query in prepared]
    return opened.query_batch_points("documents", requests=requests)


def ids(found: Any) -> list[list[int]]:
    return [[point.id for point in response.points] for response in found]
