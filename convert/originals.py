"""Encode texts with the library that a checkpoint comes from, for others to compare with.

    python originals.py LIBRARY FOLDER TEXTS.json OUT.npz

Needs numpy and that library, and not colbert_jax: its interpreter may be another one. TEXTS.json
holds "queries" and "documents", lists of strings, and where the library has no such settings
"query_maxlen" and "doc_maxlen", lengths in tokens. OUT.npz gets `queries` and `documents`, float32
[tokens, dim], their `query_lengths` and `document_lengths`, the library's own MaxSim `scores`
[queries, documents], and `versions`, what ran.

FLMR is not published as a package, so it is not among the libraries.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PACKAGES = {
    "stanford": "colbert-ai",
    "pylate": "pylate",
    "sentence-transformers": "sentence-transformers",
    "transformers": "transformers",
}
BATCH = 32


class Encoded(NamedTuple):
    """One [tokens, dim] array for every text, and the scores [queries, documents]."""

    queries: list[np.ndarray]
    documents: list[np.ndarray]
    scores: np.ndarray


def encode(library: str, folder: Path, texts: dict[str, Any]) -> Encoded:
    """Encode with the library's own public calls, in float32 on the CPU.

    Raises ModuleNotFoundError where the library is not installed here.
    """
    encoders = {
        "stanford": encode_stanford,
        "pylate": encode_pylate,
        "sentence-transformers": encode_sentence_transformers,
        "transformers": encode_transformers,
    }
    return encoders[library](str(folder), texts)


def encode_stanford(folder: str, texts: dict[str, Any]) -> Encoded:
    from colbert.infra.config import ColBERTConfig
    from colbert.modeling.checkpoint import Checkpoint
    from colbert.modeling.colbert import ColBERT, colbert_score

    ColBERT.loaded_extensions = True  # its C++ extensions are for search; do not compile them
    model = Checkpoint(folder, colbert_config=ColBERTConfig(), verbose=0)
    model.float()
    if not hasattr(model, "skiplist"):
        model.skiplist = {}  # with mask_punctuation off the package never sets what it reads
    queries = model.queryFromText(texts["queries"])
    documents = model.docFromText(texts["documents"], keep_dims=False)
    padded, mask = model.doc(
        *model.doc_tokenizer.tensorize(texts["documents"]), keep_dims="return_mask"
    )
    scores = [
        colbert_score(query[None], padded, mask, config=model.colbert_config).numpy()
        for query in queries
    ]
    return Encoded(list(queries.numpy()), [d.numpy() for d in documents], np.stack(scores))


def encode_pylate(folder: str, texts: dict[str, Any]) -> Encoded:
    import torch
    from pylate import models, scores

    model = models.ColBERT(folder, device="cpu", model_kwargs={"torch_dtype": torch.float32})

    def encoded(kind: str, name: str) -> list[np.ndarray]:
        # A prompt is used when it is asked for; the default one is when none is.
        prompt = name if model.prompts.get(name) else None
        return model.encode(
            texts[kind],
            is_query=name == "query",
            prompt_name=prompt,
            batch_size=BATCH,
            show_progress_bar=False,
        )

    queries, documents = encoded("queries", "query"), encoded("documents", "document")
    # Ragged lists: the function pads documents with zeros, which would beat negative similarities.
    columns = [
        [scores.colbert_scores([query], [document]).item() for document in documents]
        for query in queries
    ]
    return Encoded(queries, documents, np.array(columns, np.float32))


def encode_sentence_transformers(folder: str, texts: dict[str, Any]) -> Encoded:
    import sentence_transformers

    modules = json.loads((Path(folder) / "modules.json").read_text(encoding="utf-8"))
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if "Pooling" in kinds and "Dense" not in kinds:
        return encode_single_vector(folder, texts)
    if not hasattr(sentence_transformers, "MultiVectorEncoder"):
        raise ModuleNotFoundError(
            "MultiVectorEncoder came with sentence-transformers 6; here is "
            f"{sentence_transformers.__version__}"
        )
    model = sentence_transformers.MultiVectorEncoder(folder, device="cpu")
    model.float()
    settings: dict[str, Any] = dict(
        batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True
    )
    if "Pooling" in kinds:  # lengths for queries and documents are MultiVectorEncoder's
        model[0].query_length = texts.get("query_maxlen")
        model[0].document_length = texts.get("doc_maxlen")
    queries = model.encode_query(texts["queries"], **settings)
    documents = model.encode_document(texts["documents"], **settings)
    return Encoded(queries, documents, model.similarity(queries, documents).numpy())


def encode_single_vector(folder: str, texts: dict[str, Any]) -> Encoded:
    """Token embeddings of a model that pools them; it has no MaxSim of its own."""
    import sentence_transformers
    import torch

    model = sentence_transformers.SentenceTransformer(folder, device="cpu")
    model.float()

    def encoded(kind: str, length: str, encode: Any) -> list[np.ndarray]:
        model.max_seq_length = texts.get(length, model.max_seq_length)
        rows = encode(
            texts[kind],
            output_value="token_embeddings",
            batch_size=BATCH,
            show_progress_bar=False,
        )
        return [torch.nn.functional.normalize(row, dim=-1).numpy() for row in rows]

    queries = encoded("queries", "query_maxlen", model.encode_query)
    documents = encoded("documents", "doc_maxlen", model.encode_document)
    return Encoded(queries, documents, maxsim(queries, documents))


def encode_transformers(folder: str, texts: dict[str, Any]) -> Encoded:
    """Hidden states of the last layer, of unit length; the library has no MaxSim."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).float().eval()

    def encoded(kind: str, length: str) -> list[np.ndarray]:
        rows = []
        for text in texts[kind]:
            inputs = tokenizer(
                text, return_tensors="pt", truncation=True, max_length=texts.get(length)
            )
            with torch.inference_mode():
                hidden = model(**inputs).last_hidden_state[0]
            rows.append(torch.nn.functional.normalize(hidden, dim=-1).numpy())
        return rows

    queries, documents = encoded("queries", "query_maxlen"), encoded("documents", "doc_maxlen")
    return Encoded(queries, documents, maxsim(queries, documents))


def maxsim(queries: list[np.ndarray], documents: list[np.ndarray]) -> np.ndarray:
    """float32[queries, documents]: the sum over query tokens of the best document token."""
    scores = [[(d @ q.T).max(axis=0).sum() for d in documents] for q in queries]
    return np.array(scores, np.float32)


def versions(library: str) -> str:
    """The packages that matter, with their versions."""
    names = dict.fromkeys([PACKAGES.get(library, library), "transformers", "torch"])
    found = [f"{name} {importlib.metadata.version(name)}" for name in names if _is_installed(name)]
    return ", ".join(found)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def save(file: Path, encoded: Encoded, ran: str) -> None:
    arrays: dict[str, Any] = {"scores": np.asarray(encoded.scores, np.float32)}
    for name, rows in (("query", encoded.queries), ("document", encoded.documents)):
        plural = "queries" if name == "query" else "documents"
        arrays[plural] = np.concatenate(rows).astype(np.float32)
        arrays[f"{name}_lengths"] = np.array([len(row) for row in rows], np.int32)
    with file.open("wb") as out:  # a name without .npz stays as it is
        np.savez_compressed(out, versions=np.array(ran), **arrays)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog="libraries: " + ", ".join(f"{k} (package {v})" for k, v in PACKAGES.items()),
    )
    parser.add_argument("library", choices=PACKAGES, metavar="LIBRARY")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the checkpoint")
    parser.add_argument("texts", type=Path, metavar="TEXTS.json", help="queries and documents")
    parser.add_argument("out", type=Path, metavar="OUT.npz", help="where the embeddings go")
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        parser.error(f"{args.folder}: no such folder")
    texts = json.loads(args.texts.read_text(encoding="utf-8"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # colbert-ai takes any GPU it sees, and float16 with it
    try:
        encoded = encode(args.library, args.folder, texts)
    except ModuleNotFoundError as error:
        print(
            f"originals.py: {error}. Install {PACKAGES[args.library]} for {sys.executable}, or "
            "run this with an interpreter that has it",
            file=sys.stderr,
        )
        return 3
    save(args.out, encoded, versions(args.library))
    return 0


if __name__ == "__main__":
    sys.exit(main())
