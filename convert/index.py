"""Write an index in another layout: `python convert/index.py SRC DST --to LAYOUT`.

The same as `colbert-jax convert-index`; the work is done by `colbert_jax.index.layouts.convert`.
"""

import sys

from colbert_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert-index", *sys.argv[1:]]))
