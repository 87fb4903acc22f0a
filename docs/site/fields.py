"""For the API page: what the docstrings of classes list, as lists.

Data classes and named tuples here list their fields as `name: meaning`, without a heading or under
headings of their own; griffe, which reads them for mkdocstrings, knows `Attributes:` only.
"""

from __future__ import annotations

import re

import griffe

_NAMES = r"(\w+(?:, \w+)*)"
_ENTRY = re.compile(_NAMES + r": \S")
_SECTION = re.compile(rf"^(\w[^\n]*):\n(?=  {_NAMES}: \S)", re.MULTILINE)


def listed(text: str, fields: set[str]) -> str:
    """The docstring of a class of these fields, with their meanings in lists."""

    def is_entry(line: str) -> bool:
        entry = _ENTRY.match(line)
        return entry is not None and set(entry[1].split(", ")) <= fields

    paragraphs = text.split("\n\n")
    for at, paragraph in enumerate(paragraphs):
        if is_entry(paragraph):
            paragraphs[at] = "Attributes:\n  " + paragraph.replace("\n", "\n  ")
            break
        title = _SECTION.match(paragraph)
        if title is not None and title[1] != "Attributes":
            lines = [
                re.sub(_NAMES + ": ", r"* **\1**: ", line.removeprefix("  "), count=1)
                if is_entry(line.removeprefix("  "))
                else re.sub(r"^(\w.*):$", r"\n**\1**\n", line)
                for line in paragraph.split("\n")
            ]
            paragraphs[at] = "\n".join(lines)
    return "\n\n".join(paragraphs)


class Fields(griffe.Extension):
    """Named in mkdocs.yml."""

    def on_class_members(self, *, cls, **kwargs) -> None:
        if cls.docstring is not None:
            fields = {name for name, member in cls.members.items() if member.is_attribute}
            cls.docstring.value = listed(cls.docstring.value, fields)
