"""BM25, the score of the words that a query and a document share: Lucene's form, by bm25s."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.files import check_types, checksum, read_object, write_json

# Of the field's baselines (Anserini's). Stored beside what was made with them.
SETTINGS = {"k1": 0.9, "b": 0.4, "stop words": "english", "stems": "english"}
_ABOUT = "about.json"


def check_bm25() -> None:
    """Raises ImportError, saying what to install, where bm25s or PyStemmer are not."""
    _packages()


def _packages() -> tuple[Any, Any]:
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise ImportError(
            f'BM25 needs bm25s and PyStemmer: pip install "colbert-jax[hybrid]" ({error})'
        ) from None
    return bm25s, Stemmer


def split_words(texts: Sequence[str]) -> list[list[str]]:
    """The words that count of each text: in lower case, without English stop words, as stems."""
    bm25s, stemmer = _packages()
    return bm25s.tokenize(
        list(texts),
        stopwords="en",
        stemmer=stemmer.Stemmer("english"),
        return_ids=False,
        show_progress=False,
    )


class Bm25:
    """BM25 of N documents. Safe to share between threads."""

    def __init__(self, engine: Any, num_documents: int):
        """`engine`: a `bm25s.BM25` of the documents; None where none of them has a word."""
        self._engine, self._count = engine, num_documents

    @classmethod
    def of(cls, texts: Iterable[str]) -> Bm25:
        """Of documents, which are all held in memory as words.

        Raises ImportError where bm25s or PyStemmer are not installed.
        """
        bm25s, _ = _packages()
        words = split_words(list(texts))
        if not any(words):
            return cls(None, len(words))
        engine = bm25s.BM25(k1=SETTINGS["k1"], b=SETTINGS["b"])
        engine.index(words, show_progress=False)
        return cls(engine, len(words))

    def __len__(self) -> int:
        return self._count

    @property
    def num_bytes(self) -> int:
        """Of the arrays that a search reads."""
        if self._engine is None:
            return 0
        return sum(a.nbytes for a in self._engine.scores.values() if hasattr(a, "nbytes"))

    def scores(self, query: str) -> np.ndarray:
        """float32[N]: 0 for a document that has no word of the query."""
        known = {} if self._engine is None else self._engine.vocab_dict
        words = [word for word in split_words([query])[0] if word and word in known]
        if not words:
            return np.zeros(self._count, np.float32)
        return self._engine.get_scores(words)

    def save(self, folder: Path, **about: Any) -> None:
        """Write it into a folder.

        Args:
          about: JSON that `load` wants to find again.
        """
        if self._engine is not None:
            self._engine.save(folder, show_progress=False)
        files = sorted(file for file in folder.iterdir() if file.name != _ABOUT)
        about |= {"settings": SETTINGS, "documents": self._count}
        about["checksums"] = {file.name: checksum(file) for file in files}
        write_json(folder / _ABOUT, about)

    @classmethod
    def load(cls, folder: Path, **about: Any) -> Bm25 | None:
        """What `save` has written; None where it was made with other settings or of something else.

        Raises:
          ValueError, FileNotFoundError: a file is damaged or missing, named.
          ImportError: bm25s or PyStemmer are not installed.
        """
        bm25s, _ = _packages()
        known = read_about(folder)
        about |= {"settings": SETTINGS}
        if any(known.get(name) != value for name, value in about.items()):
            return None
        engine = None
        if known["checksums"]:
            engine = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        return cls(engine, known["documents"])


def read_about(folder: Path) -> dict[str, Any]:
    """What `save` has written about its files, which are compared with their checksums.

    Raises ValueError or FileNotFoundError, naming a file that is damaged or missing.
    """
    known = read_object(folder / _ABOUT)
    check_types(folder / _ABOUT, known, {"checksums": dict, "documents": int})
    for name, expected in known["checksums"].items():
        if checksum(folder / name) != expected:
            raise ValueError(f"{folder / name}: damaged: its checksum differs")
    return known


def best(scores: np.ndarray, depth: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Places of the highest scores above 0, the best first, equal ones by their place.

    Args:
      scores: float[N].
      depth: places at most.
      allowed: bool[N]; None: all.
    """
    found = np.flatnonzero(scores > 0 if allowed is None else (scores > 0) & allowed)
    if len(found) > depth:
        least = np.partition(scores[found], len(found) - depth)[len(found) - depth]
        found = found[scores[found] >= least]
    return found[np.argsort(-scores[found], kind="stable")][:depth]
