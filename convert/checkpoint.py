"""Write a checkpoint in another layout: `python convert/checkpoint.py SRC DST --to LAYOUT`.

The same as `colbert-jax convert`; the work is done by `colbert_jax.checkpoints`.
"""

import sys

from colbert_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
