"""Draw late_interaction.svg, the picture in the README, from a model's own similarities.

    python docs/images/late_interaction.py [CHECKPOINT]

CHECKPOINT is a folder or a hub id; the committed picture is of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

from colbert_jax import ColBERT

QUERY = "who wrote Dune?"
DOCUMENT = "Dune is a novel by Frank Herbert."
LEFT, TOP, WIDTH, HEIGHT = 124, 84, 62, 34  # of the first cell, of a cell
BEST = 34  # from the last column to that of the row maxima

# The picture brings its own background, so that it is read on any page.
STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de } .cell { fill: #2f6feb } .best { stroke: #d9480f }
  text { font: 14px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
  .query { text-anchor: end; font-weight: 600 } .document { font-weight: 600 }
  .small { fill: #59636e; font-size: 13px } .left { text-anchor: start }
  .max { font-weight: 700; fill: #b83a09 } .on { fill: #ffffff } .top { font-weight: 700 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d } .cell { fill: #3b7cff } .best { stroke: #ffa657 }
    text { fill: #e6edf3 } .small { fill: #9198a1 } .max { fill: #ffa657 } .on { fill: #ffffff }
  }
"""


def draw(query: list[str], document: list[str], similarity: list[list[float]]) -> str:
    """Return the SVG of a similarity matrix [Lq, Ld], its row maxima and their sum."""
    right = LEFT + WIDTH * len(document)
    bottom = TOP + HEIGHT * len(query)
    column = right + BEST + WIDTH // 2
    page = (column + WIDTH, bottom + 56)
    maxima = [max(row) for row in similarity]
    parts = [
        _text(LEFT, 26, "document tokens, one vector each", "small left"),
        _text(LEFT - 14, TOP - 20, "query tokens", "small query"),
        _text(column, TOP - 40, "best match", "small"),
        _text(column, TOP - 20, "of each row", "small"),
    ]
    for j, word in enumerate(document):
        parts.append(_text(LEFT + WIDTH * j + WIDTH // 2, TOP - 20, word, "document"))
    for i, (word, row) in enumerate(zip(query, similarity, strict=True)):
        middle = TOP + HEIGHT * i + HEIGHT // 2 + 5
        parts.append(_text(LEFT - 14, middle, word, "query"))
        best = row.index(maxima[i])
        for j, value in enumerate(row):
            x, y = LEFT + WIDTH * j, TOP + HEIGHT * i
            shade = round(max(value, 0) ** 2, 3)
            frame = ' stroke-width="3"' if j == best else ""
            parts.append(
                f'<rect class="cell{" best" * (j == best)}" x="{x + 2}" y="{y + 2}" '
                f'width="{WIDTH - 4}" height="{HEIGHT - 4}" rx="4" fill-opacity="{shade}"{frame}/>'
            )
            kind = "on " * (shade > 0.78) + "top" * (j == best)
            parts.append(_text(x + WIDTH // 2, middle, f"{value:.2f}", kind))
        parts.append(_text(column, middle, f"{maxima[i]:.2f}", "max"))
    terms = " + ".join(f"{value:.2f}" for value in maxima)
    parts.append(_text(LEFT, bottom + 34, f"score = {terms} =", "small left"))
    parts.append(_text(column, bottom + 34, f"{sum(maxima):.2f}", "max"))
    size = f'viewBox="0 0 {page[0]} {page[1]}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>Late interaction of {escape(QUERY)} and {escape(DOCUMENT)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{page[0] - 1}" height="{page[1] - 1}" '
            'rx="10"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _text(x: int, y: int, words: str, kind: str = "") -> str:
    kind = f' class="{kind.strip()}"' if kind else ""
    return f'<text{kind} x="{x}" y="{y}">{escape(words)}</text>'


def main(checkpoint: str = "sentence-transformers/all-MiniLM-L6-v2") -> None:
    explanation = ColBERT.from_pretrained(checkpoint, dtype="float32").explain(QUERY, DOCUMENT)
    picture = draw(explanation.query, explanation.document, explanation.similarity.tolist())
    Path(__file__).with_suffix(".svg").write_text(picture, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
