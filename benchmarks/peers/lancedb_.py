"""LanceDB, through a table with a column of multivectors. It has no call for several queries."""

from __future__ import annotations

import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

os.environ["LANCE_CPU_THREADS"] = os.environ["OMP_NUM_THREADS"]

import lancedb
import pyarrow as pa

BATCHES = False


def settings(k: int) -> list[dict[str, Any]]:
    """refine_factor documents for each of the k are scored exactly."""
    return [{}, {"nprobes": 20, "refine_factor": 5}, {"nprobes": 40, "refine_factor": 20}]


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("lancedb", "pyarrow")}


def build(folder: Path, values: np.ndarray, lengths: np.ndarray, nbits: int) -> None:
    """An IVF_PQ index, its default for vectors, whatever nbits is."""
    dim = values.shape[1]
    kind = pa.list_(pa.list_(pa.float16(), dim))
    schema = pa.schema([("id", pa.int64()), ("vector", kind)])
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(values)), dim)
    column = pa.ListArray.from_arrays(pa.array(starts), tokens)
    rows = pa.RecordBatch.from_arrays([pa.array(np.arange(len(lengths))), column], schema=schema)
    table = lancedb.connect(folder).create_table("documents", data=[rows], schema=schema)
    partitions = 2 ** round(math.log2(math.sqrt(len(values))))
    table.create_index(
        metric="cosine",
        vector_column_name="vector",
        index_type="IVF_PQ",
        num_partitions=partitions,
        num_sub_vectors=dim // 4,
    )


def open(folder: Path) -> Any:
    return lancedb.connect(folder).open_table("documents")


def prepare(queries: list[np.ndarray]) -> np.ndarray:
    (query,) = queries
    return query


def search(opened: Any, prepared: np.ndarray, k: int, settings: dict[str, Any]) -> Any:
    query = opened.search(prepared).distance_type("cosine").limit(k).select(["id", "_distance"])
    for name, value in settings.items():
        query = getattr(query, name)(value)
    return query.to_arrow()


def ids(found: Any) -> list[list[int]]:
    return [found["id"].to_pylist()]
