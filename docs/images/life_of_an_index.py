"""Draw life_of_an_index.svg, the picture in docs/life_of_an_index.md.

python docs/images/life_of_an_index.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de } .old { fill: #2f6feb } .new { fill: #e8590c }
  .left { fill: none; stroke: #59636e; stroke-dasharray: 4 3 } .line { stroke: #59636e }
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .name { font-family: ui-monospace, monospace; font-size: 13px } .small { fill: #59636e }
  .in { fill: #ffffff } .bold { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d } text { fill: #e6edf3 } .small { fill: #9198a1 }
    .left { stroke: #9198a1 } .line { stroke: #9198a1 } .in { fill: #ffffff }
  }
"""
LEFT, TOP, ROW = 190, 96, 40
OLD, NEW, REST = 330, 110, 70  # widths: committed before, committed by this change, a killed one's
GROWING = ("codes.npy", "residuals.npy", "offsets.npy", "texts.npy", "fields.sqlite")
REPLACED = (("deleted-7.npy", "deleted-8.npy"), ("metadata.json", "metadata.json"))


def draw() -> str:
    """Return the SVG: files that grow, files that are replaced, and who reads how far."""
    bottom = TOP + ROW * (len(GROWING) + len(REPLACED)) + 20
    width, height = LEFT + OLD + NEW + REST + 40, bottom + 96
    parts = [
        text(LEFT, 30, "readers of generation 7 map this far", "small"),
        text(LEFT + OLD + 8, 56, "those of 8 this far", "small"),
        line(LEFT + OLD, 40, LEFT + OLD, bottom),
        line(LEFT + OLD + NEW, 66, LEFT + OLD + NEW, TOP + ROW * len(GROWING)),
    ]
    for i, name in enumerate(GROWING):
        y = TOP + ROW * i
        parts += [
            text(LEFT - 12, y + 18, name, "name", "end"),
            box(LEFT, y, OLD, "old"),
            box(LEFT + OLD, y, NEW, "new"),
        ]
        if i == 0:
            parts += [
                box(LEFT + OLD + NEW, y, REST, "left"),
                text(LEFT + 12, y + 18, "documents 0 to 9,999", "in"),
                text(LEFT + OLD + 10, y + 18, "100 more", "in"),
            ]
    for i, (before, after) in enumerate(REPLACED):
        y = TOP + ROW * (len(GROWING) + i) + 10
        parts += [
            box(LEFT, y, 150, "old"),
            text(LEFT + 12, y + 18, before, "name in"),
            box(LEFT + OLD + 8, y, 150, "new"),
            text(LEFT + OLD + 20, y + 18, after, "name in"),
            text(LEFT + 170, y + 18, "replaced by" if i else "and a new file", "small"),
        ]
    parts += [
        text(30, bottom + 30, "The rename of metadata.json is the change.", "bold"),
        text(
            30, bottom + 54, "Dashed: what a killed change left; the next one cuts it off.", "small"
        ),
        text(30, bottom + 76, "deleted-7.npy goes; who has it mapped keeps it.", "small"),
    ]
    title = "Arrays grow at their end; metadata.json is replaced by one rename."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img"><title>{title}</title>'
        f"<style>{STYLE}</style>"
        f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>'
        + "\n".join(["", *parts, "</svg>"])
        + "\n"
    )


def text(x: int, y: int, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: int, y: int, width: int, kind: str) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width - 2}" height="28" rx="3"/>'


def line(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line class="line" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), "utf-8")
