"""Where a score comes from: which query words, and patches of an image, matched which document
words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR = 20  # characters of a similarity of 1
_LISTED = 12  # words beside an image
_LABELLED = 64  # patches that have room for a word each
_FAINT, _STRONG = 0.15, 0.65  # how opaque the tint of a patch is, by its similarity


class Picture(NamedTuple):
    """The image of a query.

    pixels: uint8[H, W, 3], the part that the model saw.
    first: the query's first row that is of the image's class token; those before are of its text.
    patches: the first row that is of a patch; patches are in reading order.
    grid: rows and columns of patches; (0, 0) for a model that gives none.
    """

    pixels: np.ndarray
    first: int
    patches: int
    grid: tuple[int, int]


class Explanation(NamedTuple):
    """The similarities behind the score of a query and a document.

    `print` it for a table, `plot` it for a picture.

    query, document: a label for every token embedding: the source word of its token; of an image
      "[image 1]", ... for those of its class token, "[patch 1,1]", ... for those of its patches,
      by row and column.
    similarity: float32[Lq, Ld]; the score is the sum of its row maxima.
    picture: the query's image; None for a query of text.
    """

    query: list[str]
    document: list[str]
    similarity: np.ndarray
    picture: Picture | None = None

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

    @property
    def text(self) -> Explanation:
        """The rows of the query's words alone, without those of its image."""
        if self.picture is None:
            return self
        end = self.picture.first
        return Explanation(self.query[:end], self.document, self.similarity[:end])

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
        """A table of the matches: query word, document word, similarity; of an image's rows, how
        many matched a word and the mean of their similarities."""
        rows = self._listed()
        left = max((len(word) for word, _, _ in rows), default=0)
        right = max((len(match) for _, match, _ in rows), default=0)
        lines = [
            f"{word:<{left}}  {match:<{right}}  {similarity:5.2f}  "
            + "#" * round(max(similarity, 0.0) * _BAR)
            for word, match, similarity in rows
        ]
        return "\n".join([*lines, f"score {self.score:.4f}"])

    def _listed(self) -> list[tuple[str, str, float]]:
        """The matches, those of an image's rows counted by word."""
        if self.picture is None or not self.document:
            return self.matches
        found = self.matches[: self.picture.first]
        for name, start, end in (
            ("image", self.picture.first, self.picture.patches),
            ("patch", self.picture.patches, len(self.query)),
        ):
            for word, values in self._by_word(start, end):
                found.append((f"[{name}] x {len(values)}", word, float(np.mean(values))))
        return found

    def _by_word(self, start: int, end: int) -> list[tuple[str, list[float]]]:
        """Document words and the similarities of the rows that matched them best, the most
        matched first."""
        found: dict[str, list[float]] = {}
        for _, word, similarity in self.matches[start:end]:
            found.setdefault(word, []).append(similarity)
        return sorted(found.items(), key=lambda item: -len(item[1]))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the similarities as a heat map, the best match of each query token marked; or, of a
        query with an image, the image, each patch in the colour of the word it matched best.

        The tint of a patch is the stronger the more similar it is; `text.plot()` draws the heat map
        of the query's words.

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
        if self.picture is not None and self.picture.grid != (0, 0):
            return self._plot_picture(self.picture, plt, ax)
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

    def _plot_picture(self, picture: Picture, plt: Any, ax: Axes | None) -> Axes:
        if ax is None:
            ax = plt.subplots(figsize=(8, 5), layout="constrained")[1]
            assert ax is not None
        height, width = picture.pixels.shape[:2]
        rows, columns = picture.grid
        extent = (0, columns, rows, 0)  # patches are squares of one unit
        ax.imshow(picture.pixels, extent=extent, aspect=height * columns / (width * rows))
        ax.set_axis_off()
        ax.set_anchor("W")
        ax.set_title(f"score {self.score:.2f}: which patch matched which word")
        words = self._by_word(picture.patches, len(self.query))
        colours = {word: plt.colormaps["tab20"](n % 20)[:3] for n, (word, _) in enumerate(words)}
        tint = np.zeros((rows * columns, 4))
        for n, (_, word, similarity) in enumerate(self.matches[picture.patches :]):
            strength = min(max(similarity, 0.0), 1.0)
            tint[n] = (*colours[word], _FAINT + (_STRONG - _FAINT) * strength)
            if rows * columns <= _LABELLED:
                row, column = divmod(n, columns)
                ax.text(
                    column + 0.5,
                    row + 0.5,
                    _escaped([word])[0],
                    ha="center",
                    va="center",
                    fontsize=7,
                    clip_on=True,
                    bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1},
                )
        ax.imshow(tint.reshape(rows, columns, 4), extent=extent, interpolation="nearest")
        ax.set_aspect(height * columns / (width * rows))
        for word, values in words[:_LISTED]:
            label = f"{_escaped([word])[0]}: {len(values)}, {np.mean(values):.2f}"
            ax.scatter([], [], marker="s", color=[colours[word]], label=label)
        if words:
            more = len(words) - _LISTED
            title = "word: patches, mean similarity" + (f"\n({more} more words)" * (more > 0))
            ax.legend(title=title, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
        return ax


def _escaped(words: list[str]) -> list[str]:
    """Words as matplotlib shows them: it reads text between dollar signs as formulas."""
    return [word.replace("$", r"\$") for word in words]
