"""ColBERT as first published (Khattab and Zaharia, 2020): pairwise cross-entropy over triples.

    python train/colbertv1.py --triples triples.train.small.tsv --folder runs/colbertv1

`triples.train.small.tsv` is MS MARCO's own: query, positive and negative passage, a triple a line.
With --queries and --collection the triples are lines of ids instead: [qid, pid+, pid-].

The same as `colbert-jax train colbertv1`; every setting below is a flag of its name. Run the
command again and it goes on where it stopped.
"""

import sys

from colbert_jax.cli import main

SETTINGS = [
    *("--checkpoint", "bert-base-uncased"),
    *("--dim", "128"),
    # As for the paper's re-ranking model: 32 query tokens with [MASK] expansion.
    *("--query-maxlen", "32"),
    *("--doc-maxlen", "180"),
    # The positive against one negative: a softmax over two scores.
    *("--loss", "cross-entropy"),
    *("--nway", "2"),
    *("--use-ib-negatives", "false"),
    # AdamW at a constant rate.
    *("--lr", "3e-6"),
    *("--warmup", "none"),
    *("--bsize", "32"),
    *("--maxsteps", "200000"),
]

if __name__ == "__main__":
    sys.exit(main(["train", "colbertv1", *SETTINGS, *sys.argv[1:]]))
