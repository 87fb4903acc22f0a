"""For the API page: what the docstrings of classes list, as lists.

Data classes and named tuples here list their fields as `name: meaning`, without a heading or under
headings of their own; griffe, which reads them for mkdocstrings, knows `Attributes:` only.
"""

from __future__ import annotations

import re

import griffe

_NAMES = r"(\w+(?:, \w+)*)"
_ENTRY = re.compile(_NAMES + r": \S")
_SECTION = re.compile(rf"\w[^\n]*:\n  {_NAMES}: \S")


def listed(text: str, fields: set[str]) -> str:
    """The docstring of a class of these fields, with their meanings in lists."""

    def names_of(line: str) -> str | None:
        entry = _ENTRY.match(line)
        return entry[1] if entry is not None and set(entry[1].split(", ")) <= fields else None

    def attribute(line: str) -> str:
        names = names_of(line)
        # What follows a space in a name would be its type.
        return line if names is None else _glued(names) + line.removeprefix(names)

    def item(line: str) -> str:
        if re.fullmatch(r"\w.*:", line):
            return f"\n**{line[:-1]}**\n"
        inner = line.removeprefix("  ")
        names = names_of(inner)
        return line if names is None else f"* **{names}**{inner.removeprefix(names)}"

    paragraphs = text.split("\n\n")
    for at, paragraph in enumerate(paragraphs):
        lines = paragraph.split("\n")
        if names_of(lines[0]) is not None:
            paragraphs[at] = "\n  ".join(["Attributes:", *map(attribute, lines)])
        elif _SECTION.match(paragraph) and lines[0] != "Attributes:":
            paragraphs[at] = "\n".join(map(item, lines))
    return "\n\n".join(paragraphs)


def _glued(names: str) -> str:
    return names.replace(" ", "\N{NO-BREAK SPACE}")


class Fields(griffe.Extension):
    """Named in mkdocs.yml."""

    def on_class_members(self, *, cls, **kwargs) -> None:
        if cls.docstring is not None:
            fields = {name for name, member in cls.members.items() if member.is_attribute}
            cls.docstring.value = listed(cls.docstring.value, fields)
