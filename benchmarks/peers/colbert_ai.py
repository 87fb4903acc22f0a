"""Stanford's colbert-ai, through its Indexer and Searcher.

It compiles its C++ extensions when they are first used, about a minute each, and keeps them; that
needs ninja and g++, and is done here before anything is timed. Texts are the documents' numbers and
a lookup stands for the encoder, so that it is given the embeddings of everybody else; a checkpoint
of one tiny layer with random weights, made on the spot, satisfies the constructors.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from colbert import Indexer, Searcher
from colbert.indexing.codecs.residual import ResidualCodec
from colbert.indexing.collection_encoder import CollectionEncoder
from colbert.infra import ColBERTConfig, Run, RunConfig
from colbert.modeling.colbert import ColBERT
from colbert.modeling.hf_colbert import class_factory
from colbert.search.index_storage import IndexScorer
from colbert.search.strided_tensor import StridedTensor
from transformers import BertConfig, BertTokenizer

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
BATCHES = False
for extended in (ResidualCodec, ColBERT, IndexScorer, StridedTensor):
    extended.try_load_torch_extensions(torch.cuda.is_available())
SCRATCH = tempfile.TemporaryDirectory()  # what has to exist beside an index


def settings(k: int) -> list[dict[str, Any]]:
    sweep = [(1, 0.5, 1024), (2, 0.45, 1024), (2, 0.45, 4096), (4, 0.4, 1024), (4, 0.4, 4096)]
    rows = [_settings(*values) for values in [_defaults(k), *sweep, (8, 0.3, 16384)]]
    return [row for i, row in enumerate(rows) if row not in rows[:i] and row["ndocs"] >= 4 * k]


def _defaults(k: int) -> tuple[int, float, int]:
    """What Searcher chooses in its first search and keeps: given each time, by the k of that."""
    if k <= 10:
        return 1, 0.5, 256
    return (2, 0.45, 1024) if k <= 100 else (4, 0.4, max(4 * k, 4096))


def _settings(ncells: int, threshold: float, ndocs: int) -> dict[str, Any]:
    return {"ncells": ncells, "centroid_score_threshold": threshold, "ndocs": ndocs}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("colbert-ai", "torch", "faiss-cpu", "transformers")}


def build(folder: Path, values: np.ndarray, lengths: np.ndarray, nbits: int) -> None:
    ends = np.cumsum(lengths)
    tokens = torch.from_numpy(values)

    def lookup(encoder: Any, passages: list[str]) -> Any:
        if not passages:
            return None, None
        found = [tokens[ends[i] - lengths[i] : ends[i]] for i in map(int, passages)]
        return torch.cat(found).float(), [len(rows) for rows in found]

    CollectionEncoder.encode_passages = lookup
    checkpoint = _write_checkpoint(values.shape[1])
    settings = ColBERTConfig(dim=values.shape[1], nbits=nbits, index_path=str(folder))
    with Run().context(_run()):
        Indexer(checkpoint, config=settings, verbose=0).index(
            name="index", collection=[str(i) for i in range(len(lengths))]
        )


def open(folder: Path) -> Searcher:
    config = json.loads((folder / "metadata.json").read_text())["config"]
    documents = sum(len(json.loads(file.read_text())) for file in folder.glob("doclens.*.json"))
    with Run().context(_run()):
        return Searcher(
            index=str(folder),
            checkpoint=_write_checkpoint(config["dim"]),
            collection=[str(i) for i in range(documents)],
            verbose=0,
        )


def prepare(queries: list[np.ndarray]) -> torch.Tensor:
    (query,) = queries
    return torch.from_numpy(query)[None]


def search(opened: Searcher, prepared: torch.Tensor, k: int, settings: dict[str, Any]) -> Any:
    opened.configure(**settings)
    return opened.dense_search(prepared, k=k)


def ids(found: Any) -> list[list[int]]:
    return [list(found[0])]


def _run() -> RunConfig:
    return RunConfig(nranks=1, root=SCRATCH.name, avoid_fork_if_possible=True)


def _write_checkpoint(dim: int) -> str:
    folder = Path(SCRATCH.name, "checkpoint")
    if not folder.exists():
        folder.mkdir()
        words = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        BertTokenizer(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
        shape = BertConfig(
            vocab_size=len(words),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
        shape.save_pretrained(folder)
        model = class_factory(str(folder))(shape, colbert_config=ColBERTConfig(dim=dim))
        model.save_pretrained(folder)
    return str(folder)
