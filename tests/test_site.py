"""The documentation site, as far as it can be tested without `make docs`, which builds it."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import colbert_jax

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
HOOKS = runpy.run_path(str(DOCS / "site" / "hooks.py"))
BROKEN = runpy.run_path(str(DOCS / "site" / "links.py"))["broken"]


def named_in(nav) -> list[str]:
    """The pages of a part of the nav, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav if isinstance(nav, list) else nav.values()
    return [page for part in parts for page in named_in(part)]


def test_nav_has_every_page_once():
    assert sorted(named_in(SITE["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))


def test_ci_builds_the_site():
    assert "\nmake docs\n" in (ROOT / ".ci" / "run").read_text()
    assert "mkdocs build --clean --strict" in (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"]["docs"]


def test_pages_publishes_the_built_site_where_it_is_enabled():
    text = (ROOT / ".github" / "workflows" / "pages.yml").read_text("utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["build"]["if"] == "github.event.repository.has_pages"
    assert jobs["deploy"]["needs"] == "build"
    steps = {step.get("uses", "run").partition("@")[0]: step for step in jobs["build"]["steps"]}
    assert steps["run"]["run"] == "make docs"
    assert steps["actions/upload-pages-artifact"]["with"]["path"] == SITE["site_dir"]
    assert "://" not in text  # whose repository it is, GitHub knows


def test_links_out_of_docs_lead_to_the_repository():
    page = "see [a\n`b`](../benchmarks/x.md) and [c](filters.md#d)"
    outside = HOOKS["outside"]
    assert outside(page, "") == "see a\n`b` (`benchmarks/x.md`) and [c](filters.md#d)"
    there = outside(page, "https://host/repository")
    assert "[a\n`b`](https://host/repository/blob/main/benchmarks/x.md) and [c](filters" in there
    assert HOOKS["address"]({}) == ""
    assert HOOKS["address"]({"urls": {"Repository": "https://host/r/"}}) == "https://host/r"


def test_commands_are_broken_before_flags():
    broken = HOOKS["broken"]
    command = "colbert-jax evaluate beir --run before=a.run --measures 'nDCG@10,AP(rel=2)@100'"
    assert broken(command) == command
    command += " --baseline before --html table.html"
    lines = broken(command).split(" \\\n    ")
    assert len(lines) == 2 and " ".join(lines) == command
    assert all(len(line) < 100 for line in lines) and lines[1].startswith("--")
    page = f"```python\n{command}\n```\n\n```\n{command}\n```\n"
    shown = HOOKS["on_page_markdown"](
        page, page=None, config=SimpleNamespace(repo_url=None), files=None
    )
    assert shown == page.replace(f"```\n{command}", f"```\n{broken(command)}")


def test_links_that_lead_nowhere_are_found(tmp_path):
    for folder in ("", "one", "two"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "index.html").write_text(
        '<a href="one/">1</a><a href="one/#here">2</a><a href="https://x.org/no">3</a>'
        '<a href="#top">4</a><a href="#no">5</a><a href="three/">6</a><img src="no.svg">'
    )
    (tmp_path / "one" / "index.html").write_text('<h1 id="here">a</h1><a href="../two/#gone">7</a>')
    (tmp_path / "two" / "index.html").write_text('<a href="..">8</a><a href="../../x">9</a>')
    assert BROKEN(tmp_path) == [
        "index.html: #no",
        "index.html: three/",
        "index.html: no.svg",
        "one/index.html: ../two/#gone",
        "two/index.html: ../../x",
    ]


def test_api_page_has_every_public_name():
    named = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    assert len(named) == len(set(named))
    assert {f"colbert_jax.{name}" for name in colbert_jax.__all__} <= set(named)
    for name in named:
        module, _, attribute = name.rpartition(".")
        documented = getattr(__import__(module, fromlist=[attribute]), attribute)
        assert documented.__doc__, name


def public(name: str) -> list[tuple[str, object]]:
    """A public name and, of a class, its public methods."""
    value = getattr(colbert_jax, name)
    if not inspect.isclass(value):
        return [(name, value)]
    methods = [
        (f"{name}.{key}", getattr(value, key))
        for key, member in vars(value).items()
        if inspect.isfunction(member) or isinstance(member, classmethod)
        if not key.startswith("_") or key == "__init__"
    ]
    return methods


@pytest.mark.parametrize("name", colbert_jax.__all__)
def test_docstrings_name_arguments_that_exist(name):
    for of, function in public(name):
        text = inspect.cleandoc(function.__doc__ or "")
        listed = re.search(r"^Args:\n((?:  .*\n|\n)*)", text + "\n", re.MULTILINE)
        entries = re.findall(r"^  ([\w*]\S*(?:, \S+)*):", listed[1] if listed else "", re.MULTILINE)
        given = {entry.strip("*") for line in entries for entry in line.split(", ")} - {"..."}
        assert given <= set(inspect.signature(function).parameters), of
        if not of.endswith("__init__"):
            assert text, f"{of} has no docstring"


def test_sizes_are_those_of_the_formula():
    """The table of sizes in settings.md, by the function that stands above it."""
    page = (DOCS / "settings.md").read_text("utf-8")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)^print", page, re.MULTILINE | re.DOTALL)[1], names)
    table = page[page.index("| dimensions |") :].split("\n\n", 1)[0]
    head, _, *rows = table.splitlines()
    assert re.findall(r"\d+ bits?", head) == ["1 bit", "2 bits", "4 bits", "8 bits"]
    for row in rows:
        dim, *sizes, raw = (float(cell) for cell in row.strip("| ").split(" | "))
        expected = [names["index_bytes"](94e6, int(dim), nbits) / 1e9 for nbits in (1, 2, 4, 8)]
        assert sizes == [round(size, 1) for size in expected]
        assert raw == round(94e6 * 2 * dim / 1e9, 1)
    assert len(rows) == 4


def test_fields_of_docstrings_are_lists(monkeypatch):
    """`listed` gives what griffe, which is not installed here, makes lists of."""
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    listed = runpy.run_path(str(DOCS / "site" / "fields.py"))["listed"]
    plain = "A text: and more.\n\nfirst, second: two\n  things.\nthird: one."
    attributes = "Attributes:\n  first,\N{NO-BREAK SPACE}second: two\n    things.\n  third: one."
    assert listed(plain, {"first", "second", "third"}) == f"A text: and more.\n\n{attributes}"
    assert listed(plain, {"first"}) == plain
    headed = "Text.\n\nOne kind:\n  first: a\n    thing.\nOther kind:\n  second, third: b"
    assert listed(headed, {"first", "second", "third"}) == (
        "Text.\n\n\n**One kind**\n\n* **first**: a\n    thing.\n\n**Other kind**\n\n"
        "* **second, third**: b"
    )
