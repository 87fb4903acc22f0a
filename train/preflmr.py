"""PreFLMR (Lin et al., 2024) on questions about images, in the tables of M2KR.

    python train/preflmr.py --data M2KR/EVQA_data --passages M2KR/EVQA_passages \\
        --images images --folder runs/preflmr

--data and --passages are parquet or JSONL files, folders of them, folders that `datasets` saved, or
owner/name/config on the hub. Each step a question has one of its positives and four negatives,
drawn from all passages; the positive is told from all passages of the batch. A question's text is
its row's instruction and the question.

The same as `colbert-jax train preflmr`; every setting below is a flag of its name. Run the command
again and it goes on where it stopped. On a device with more memory, fewer micro-batches
(--accumsteps) have more negatives each.
"""

import sys

from colbert_jax.cli import main

SETTINGS = [
    *("--checkpoint", "LinWeizheDragon/PreFLMR_ViT-L"),
    *("--split", "train"),
    # The vision encoder stays as it is; `false` trains it too.
    *("--freeze-vision", "true"),
    # A positive and four negatives a question: a softmax over the scores of all that are in a
    # micro-batch.
    *("--loss", "contrastive"),
    *("--nway", "5"),
    *("--use-ib-negatives", "false"),
    # AdamW; 8 micro-batches of 8 questions.
    *("--lr", "1e-5"),
    *("--warmup", "100"),
    *("--bsize", "64"),
    *("--accumsteps", "8"),
    *("--maxsteps", "10000"),
    *("--seed", "42"),
]

if __name__ == "__main__":
    sys.exit(main(["train", "preflmr", *SETTINGS, *sys.argv[1:]]))
