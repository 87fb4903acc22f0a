"""Encode and index one part of a collection: one task of a job array (build.slurm).

    python build_shard.py passages.tsv wiki --shard 3 --of 64 --checkpoint colbert-ir/colbertv2.0

Part i has the documents i, i + n, i + 2n, ... under the ids that they have in the collection; the
number of its line, where a document has none. Killed or requeued, the same command goes on after
its last finished chunk; a shard that is complete is left alone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from colbert_jax import Retriever
from colbert_jax.data.documents import Documents
from colbert_jax.progress import log_to_stderr
from colbert_jax.runtime import enable_compilation_cache


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Index one part of a collection.")
    parser.add_argument("collection", type=Path)
    parser.add_argument("folder", type=Path, help="where the shards go")
    parser.add_argument("--shard", type=int, required=True, help="which part, from 0")
    parser.add_argument("--of", type=int, required=True, help="how many parts")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--nbits", type=int)
    args = parser.parse_args(arguments)
    if not 0 <= args.shard < args.of:
        parser.error(f"--shard {args.shard}: expected 0 to {args.of - 1}")

    log_to_stderr()
    enable_compilation_cache()
    index = args.folder / f"shard-{args.shard:04}-of-{args.of:04}.index"
    if index.exists():
        print(f"{index}: is there")
        return 0
    documents = itertools.islice(Documents(args.collection), args.shard, None, args.of)
    print(Retriever.build(index, args.checkpoint, documents, nbits=args.nbits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
