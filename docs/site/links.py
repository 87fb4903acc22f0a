"""Check the links of the built site, those into its own pages and files: `links.py FOLDER`."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The names that a page can be linked to by, and what it links to."""

    def __init__(self, text: str):
        super().__init__()
        self.names: set[str] = {"", "top"}
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.names.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def broken(site: Path) -> list[str]:
    """One line for each link that leads nowhere, "page: link"."""
    site = site.resolve()
    pages = {file: _Page(file.read_text("utf-8")) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            place = unquote(parts.path)
            target = site / place.lstrip("/") if place.startswith("/") else file.parent / place
            target = (target if place else file).resolve()
            if target.is_dir():
                target /= "index.html"
            inside = target.is_relative_to(site) and target.is_file()
            named = target not in pages or unquote(parts.fragment) in pages[target].names
            if file.name != "404.html" and not (inside and named):
                found.append(f"{file.relative_to(site)}: {link}")
    return found


if __name__ == "__main__":
    lines = broken(Path(sys.argv[1]))
    sys.exit("\n".join(["links that lead nowhere:", *lines]) if lines else 0)
