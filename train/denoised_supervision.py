"""All of ColBERTv2's training (Santhanam et al., 2022, 3.2 and appendix F), from raw queries.

    python train/denoised_supervision.py --queries queries.train.tsv --collection collection.tsv \
        --positives qrels.train.tsv --warm-triples triples.jsonl --folder runs/denoised

1. warm/: a pairwise model, trained on triples (left out where the checkpoint is warm already).
2. round1/: index the collection with it, retrieve 500 passages a query, score them with the
   cross-encoder, draw 32-way examples, distil.
3. round2/: the same with the model of round 1 and 64-way examples. Its model is the result.

Each round leaves plain files: ranking.tsv, scores.jsonl, examples.jsonl (Stanford's formats). Run
the command again and what is done stays as it is.

The same as `colbert-jax train denoised-supervision`; every setting below is a flag of its name.
"""

import sys

from colbert_jax.cli import main

SETTINGS = [
    *("--checkpoint", "bert-base-uncased"),
    *("--dim", "128"),
    *("--doc-maxlen", "180"),
    # Mining: with a 2-bit index, and the teacher's raw logits.
    *("--teacher", "cross-encoder/ms-marco-MiniLM-L6-v2"),
    *("--teacher-maxlen", "180"),
    *("--rounds", "2"),
    *("--k", "500"),
    *("--nbits", "2"),
    # The warm start: ColBERTv1.
    *("--warm-lr", "3e-6"),
    *("--warm-maxsteps", "200000"),
    # The first round.
    *("--first-nway", "32"),
    *("--first-maxsteps", "150000"),
    # The last one.
    *("--nway", "64"),
    *("--lr", "1e-5"),
    *("--warmup", "20000"),
    *("--maxsteps", "400000"),
    *("--bsize", "32"),
]

if __name__ == "__main__":
    sys.exit(main(["train", "denoised-supervision", *SETTINGS, *sys.argv[1:]]))
