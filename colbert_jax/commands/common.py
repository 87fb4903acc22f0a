"""What several commands share: how an index is searched, and how a warning is shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping

from colbert_jax.config import CANDIDATES, MODES
from colbert_jax.index.filters import parse_json_filter
from colbert_jax.multimodal import Query
from colbert_jax.progress import tqdm
from colbert_jax.retriever import Hit, Retriever


def warn(message: str) -> None:
    """One line, above the bars."""
    tqdm.write(f"colbert-jax: warning: {' '.join(message.split())}", file=sys.stderr)


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
        candidates=args.candidates,
        where=None if args.where is None else parse_json_filter(args.where),
        texts=texts,
        # A bar among results on the same terminal would hide them.
        progress=False if texts and sys.stdout.isatty() else None,
    )
    return zip(queries, hits, strict=True)


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
