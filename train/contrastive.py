"""Contrastive training on pairs: each query's document against all other documents of the batch.

    python train/contrastive.py --pairs pairs.jsonl --folder runs/contrastive

`pairs.jsonl` has lines of {"query": ..., "positive": ...}. Where lines have hard negatives too, a
text or a list, name their field: --negatives negatives. --pairs also takes a Hugging Face data set,
by hub id or folder and column names:

    python train/contrastive.py --pairs sentence-transformers/msmarco-bm25 --subset triplet \\
        --negatives negative --folder runs/contrastive

--checkpoint is a plain encoder, which gets a new projection to --dim values, or a late-interaction
checkpoint, which keeps its own (leave --dim out below). With --dev-collection, --dev-queries and
--dev-qrels the run is evaluated as it goes, and keeps the best model beside the last one.

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
    *("--lr", "3e-6"),
    *("--warmup", "0"),
    *("--bsize", "32"),
    # Once through 500,000 pairs.
    *("--maxsteps", "15600"),
    # A checkpoint, and an evaluation where there is a dev collection.
    *("--save-every", "2000"),
]

if __name__ == "__main__":
    sys.exit(main(["train", "contrastive", *SETTINGS, *sys.argv[1:]]))
