"""What mkdocs does to the pages besides.

The repository's address is `Repository` of pyproject.toml's `[project.urls]`. Pages link to files
outside docs/ by relative paths, as a checkout wants them: on the site these lead to the repository,
and as long as it has no address their paths are named. Commands, which are one line each in the
pages, are broken before their flags.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OUTSIDE = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\.\./([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w*)\n.*?^```$", re.MULTILINE | re.DOTALL)
_WIDTH = 88


def address(project: dict) -> str:
    """The repository's address without a slash at its end; "" where there is none yet."""
    return project.get("urls", {}).get("Repository", "").rstrip("/")


def outside(markdown: str, repository: str) -> str:
    """The page with links to files outside docs/ leading to the repository."""
    link = rf"[\1]({repository}/blob/main/\2)" if repository else r"\1 (`\2`)"
    return _OUTSIDE.sub(link, markdown)


def broken(command: str) -> str:
    """A command in lines as a shell takes them, as far as its flags allow."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > _WIDTH:
            lines[-1] += " \\"
            lines.append("    ")
        lines[-1] += part if lines[-1].isspace() or not lines[-1] else f" {part}"
    return "\n".join(lines)


def _displayed(block: re.Match) -> str:
    return block[0] if block[1] else "\n".join(map(broken, block[0].split("\n")))


def on_config(config):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    config.repo_url = address(project) or None
    config.site_url = project.get("urls", {}).get("Documentation")
    return config


def on_page_markdown(markdown, *, page, config, files):
    return _BLOCK.sub(_displayed, outside(markdown, config.repo_url or ""))
