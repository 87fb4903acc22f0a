"""The last step of ColBERTv2 (Santhanam et al., 2022): distillation over 64-way examples.

    python train/distill.py --examples examples.json --queries queries.train.tsv \
        --collection collection.tsv --folder runs/colbertv2

`examples.json` is what `train/denoised_supervision.py` writes for its last round, or the published
file of colbert-ir/colbertv2.0_msmarco_64way: lines of [qid, [pid, score], ...], the positive first.

The same as `colbert-jax train distill`; every setting below is a flag of its name. Run the command
again and it goes on where it stopped. For a batch that does not fit, in this order: --remat true,
--accumsteps 2 (in-batch negatives then come from half the batch), --chunk 256.
"""

import sys

from colbert_jax.cli import main

SETTINGS = [
    *("--checkpoint", "colbert-ir/colbertv1.9"),
    *("--doc-maxlen", "180"),
    # KL divergence from the teacher over 64 passages, plus cross-entropy against the other
    # queries' passages.
    *("--loss", "distillation"),
    *("--nway", "64"),
    *("--distillation-alpha", "1.0"),
    *("--use-ib-negatives", "true"),
    # AdamW without decay; linear warm-up and decay.
    *("--lr", "1e-5"),
    *("--warmup", "20000"),
    *("--maxsteps", "400000"),
    *("--bsize", "32"),
]

if __name__ == "__main__":
    sys.exit(main(["train", "distill", *SETTINGS, *sys.argv[1:]]))
