"""Where a score comes from: which query words matched which document words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR = 20  # characters of a similarity of 1


class Explanation(NamedTuple):
    """The similarities behind the score of a query and a document.

    `print` it for a table, `plot` it for a picture.

    query, document: a label for every token embedding, the source word of its token.
    similarity: float32[Lq, Ld]; the score is the sum of its row maxima.
    """

    query: list[str]
    document: list[str]
    similarity: np.ndarray

    @property
    def score(self) -> float:
        """MaxSim: the sum over query tokens of their best similarity."""
        return float(self.similarity.max(axis=1).sum()) if self.document else float("-inf")

    @property
    def matches(self) -> list[tuple[str, str, float]]:
        """For each query token the document word it matched best, and their similarity."""
        if not self.document:
            return []
        best = self.similarity.argmax(axis=1)
        return [
            (word, self.document[j], float(self.similarity[i, j]))
            for i, (word, j) in enumerate(zip(self.query, best, strict=True))
        ]

    def strongest(self, most: int = 6) -> list[tuple[str, str, float]]:
        """The strongest matches of distinct query words, markers and punctuation left out."""
        best: dict[str, tuple[str, float]] = {}
        for word, match, similarity in self.matches:
            special = word.startswith("[") and word.endswith("]")
            spoken = not special and any(c.isalnum() for c in word)
            if spoken and similarity > best.get(word, ("", 0.0))[1]:
                best[word] = (match, similarity)
        ranked = sorted(best.items(), key=lambda item: -item[1][1])[:most]
        return [(word, match, similarity) for word, (match, similarity) in ranked]

    def __str__(self) -> str:
        """A table of the matches: query word, document word, similarity."""
        rows = self.matches
        left = max((len(word) for word, _, _ in rows), default=0)
        right = max((len(match) for _, match, _ in rows), default=0)
        lines = [
            f"{word:<{left}}  {match:<{right}}  {similarity:5.2f}  "
            + "#" * round(max(similarity, 0.0) * _BAR)
            for word, match, similarity in rows
        ]
        return "\n".join([*lines, f"score {self.score:.4f}"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the similarities as a heat map, the best match of each query token marked.

        Args:
          ax: matplotlib axes to draw on. If None, a new figure that fits the words.

        Returns:
          the axes.

        Raises:
          ImportError: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError('a plot needs matplotlib: pip install "colbert-jax[plot]"') from error
        rows, columns = self.similarity.shape
        if ax is None:
            size = (1.5 + 0.3 * columns, 1.2 + 0.3 * rows)
            figure, ax = plt.subplots(figsize=size, layout="constrained")
            assert ax is not None
        else:
            figure = ax.figure
        image = ax.imshow(self.similarity, cmap="viridis", aspect="auto", vmin=0, vmax=1)
        ax.set_xticks(range(columns), _escaped(self.document), rotation=90)
        ax.set_yticks(range(rows), _escaped(self.query))
        if columns:
            best: Any = self.similarity.argmax(axis=1)
            ax.scatter(best, range(rows), marker="s", s=60, facecolors="none", edgecolors="white")
        ax.set_xlabel("document")
        ax.set_ylabel("query")
        ax.set_title(f"score {self.score:.2f}: the sum of the marked similarities")
        figure.colorbar(image, ax=ax, label="cosine similarity")
        return ax


def _escaped(words: list[str]) -> list[str]:
    """Words as matplotlib shows them: it reads text between dollar signs as formulas."""
    return [word.replace("$", r"\$") for word in words]
