"""What several commands share: how an index is searched, and how a warning is shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from colbert_jax.config import CANDIDATES, MODES
from colbert_jax.fusion import FUSIONS, Hybrid
from colbert_jax.index.filters import parse_json_filter
from colbert_jax.multimodal import Query
from colbert_jax.progress import tqdm
from colbert_jax.retriever import Hit, Retriever


def warn(message: str) -> None:
    """One line, above the bars."""
    tqdm.write(f"colbert-jax: warning: {' '.join(message.split())}", file=sys.stderr)


_CHECKPOINT_SETTINGS = {
    "truncate_dim": (int, "features kept of each token embedding, of models trained for it"),
    "language": (str, "which adapters of an X-MOD model to read, such as de_DE"),
    "pool_factor": (float, "keep one token embedding for so many of a document"),
}


def add_checkpoint_settings(sub: argparse._ActionsContainer) -> None:
    """Flags of how a checkpoint is loaded, for commands that load one as they are told."""
    for name, (kind, about) in _CHECKPOINT_SETTINGS.items():
        sub.add_argument(f"--{name.replace('_', '-')}", type=kind, help=about)


def checkpoint_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, as arguments of `ColBERT.from_pretrained`."""
    given = {name: getattr(args, name) for name in _CHECKPOINT_SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def refuse_checkpoint_settings(args: argparse.Namespace, where: str) -> None:
    """Raise ValueError if one was given where no checkpoint is loaded by them."""
    for name in checkpoint_settings(args):
        raise ValueError(f"--{name.replace('_', '-')} is for a checkpoint to load, not for {where}")


def search_queries(
    retriever: Retriever,
    queries: Mapping[str, Query],
    k: int,
    args: argparse.Namespace,
    texts: bool,
) -> Iterator[tuple[str, list[Hit]]]:
    """Query ids and hits, in the order of the queries."""
    hits = retriever.search_many(
        queries.values(),
        k,
        mode=args.mode,
        ncells=args.ncells,
        centroid_score_threshold=args.centroid_score_threshold,
        ndocs=args.ndocs,
        hybrid=_hybrid(args),
        candidates=args.candidates,
        where=None if args.where is None else parse_json_filter(args.where),
        texts=texts,
        # A bar among results on the same terminal would hide them.
        progress=False if texts and sys.stdout.isatty() else None,
    )
    return zip(queries, hits, strict=True)


def _hybrid(args: argparse.Namespace) -> Hybrid | None:
    if args.hybrid is None:
        if args.bm25_weight is not None:
            raise ValueError("--bm25-weight belongs to --hybrid")
        return None
    weight = {} if args.bm25_weight is None else {"bm25_weight": args.bm25_weight}
    return Hybrid(args.hybrid, **weight)


def add_search_settings(sub: argparse.ArgumentParser) -> None:
    """Flags of how an index is searched."""
    sub.add_argument("--checkpoint", help="default: the one the index was built with")
    sub.add_argument(
        "--mode",
        choices=MODES,
        default="accurate",
        help="how hard to look (default: accurate); exact scores every document",
    )
    sub.add_argument("--ncells", type=int, help="centroids probed per query token")
    sub.add_argument("--centroid-score-threshold", type=float)
    sub.add_argument("--ndocs", type=int, help="candidates kept by the first ranking")
    sub.add_argument(
        "--candidates",
        choices=CANDIDATES,
        help="how they are found: by PLAID's stages, or by learned vectors (index --learned-dim)",
    )
    sub.add_argument("--where", help='condition on fields, in JSON: \'{"year": {"gte": 2020}}\'')
    sub.add_argument(
        "--hybrid",
        choices=FUSIONS,
        help="look for the query's words too, with BM25, and join both by ranks or scores",
    )
    sub.add_argument("--bm25-weight", type=float, help="BM25's part, 0 to 1 (default: 0.5)")
