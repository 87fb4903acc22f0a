"""Contrastive training on pairs: each query's document against all other documents of the batch.

    python train/contrastive.py --pairs pairs.jsonl --folder runs/contrastive

`pairs.jsonl` has lines of {"query": ..., "positive": ...}; CSV, TSV and parquet will do too, and so
will other names of fields: --query question --positive answer. Where lines have hard negatives, a
text or a list, name their field: --negatives negatives. --pairs also takes a Hugging Face data set,
by hub id or folder and column names:

    python train/contrastive.py --pairs sentence-transformers/msmarco-bm25 --subset triplet \\
        --negatives negative --folder runs/contrastive

--checkpoint is a plain encoder, which gets a new projection to --dim values, or a late-interaction
checkpoint, which keeps its own (leave --dim out below). The run is evaluated before the first step
and as it goes, on queries of the pairs that are kept for that, or on --dev collections; the best
model is kept beside the last one.

The same as `colbert-jax train contrastive`; every setting below is a flag of its name. Run the
command again and it goes on where it stopped. Larger batches have more negatives and teach more:
for one that does not fit, --chunk 64 encodes 64 texts at a time and changes nothing else.
"""

import sys

from colbert_jax.cli import main

SETTINGS = [
    *("--checkpoint", "bert-base-uncased"),
    *("--dim", "128"),
    *("--query-maxlen", "32"),
    *("--doc-maxlen", "180"),
    # PyLate's: a softmax over the MaxSim scores as they are.
    *("--loss", "contrastive"),
    *("--temperature", "1.0"),
    # Documents of a query: all that its line has, here the positive alone.
    *("--nway", "none"),
    # Stanford's in-batch loss would count the same negatives again.
    *("--use-ib-negatives", "false"),
    # AdamW; a linear decay without warm-up.
    *("--lr", "2e-5"),
    *("--warmup", "0"),
    *("--bsize", "32"),
    # Once through the pairs.
    *("--maxsteps", "none"),
    *("--epochs", "1"),
    # A checkpoint, and an evaluation; one more before the first step.
    *("--save-every", "2000"),
    *("--eval-first", "true"),
]

if __name__ == "__main__":
    sys.exit(main(["train", "contrastive", *SETTINGS, *sys.argv[1:]]))
