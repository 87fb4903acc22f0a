"""Make native_index with this library: an index of format version 1, and what it answers.

    python tests/golden/make_native.py tests/golden/native_index

The encoder is made up, so that no checkpoint is needed.
"""

import sys
from pathlib import Path

import numpy as np

from colbert_jax import Index
from colbert_jax.config import ColBERTConfig
from colbert_jax.embeddings import DocumentEmbeddings

TEXTS = [f"the {word} and the märz {'moon ' * n}".strip() for n, word in enumerate("abcdefghijkl")]
IDS = [f"é{n}/{n * n}" for n in range(len(TEXTS))]


class Encoder:
    """A token a word, drawn from a generator that the word seeds; the third document has none."""

    dim, config, load = 8, ColBERTConfig(), {"name_or_path": "made-up"}

    def fingerprint(self):
        return "0123456789abcdef"

    def describe(self):
        search = vars(self.config.search)
        return {"load": self.load, "fingerprint": self.fingerprint(), "search": search}

    def encode(self, text):
        words = [] if text == TEXTS[2] else text.split()
        rows = [np.random.default_rng([*word.encode()]).normal(size=8) for word in words]
        rows = np.array(rows, np.float32).reshape(-1, 8)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_windows(self, windows, bar=None):
        for window in windows:
            yield DocumentEmbeddings.from_list([self.encode(text) for text in window], 8)


def main(folder: Path) -> None:
    encoder = Encoder()
    index = Index.build(folder, encoder, TEXTS, ids=IDS, num_centroids=8)
    queries = np.stack([encoder.encode(text)[:4] for text in (TEXTS[5], TEXTS[9])])
    hits = index.search(queries, k=5, mode="exact")
    np.savez(folder / "answers.npz", queries=queries, positions=hits[0], scores=hits[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
