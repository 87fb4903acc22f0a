"""The demo: a real model, the documentation of Python's standard library, five questions."""

from __future__ import annotations

import ast
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from colbert_jax.checkpoints import hub
from colbert_jax.explanation import Explanation
from colbert_jax.files import present_folder
from colbert_jax.index.index import Index, check_documents
from colbert_jax.retriever import Retriever

QUESTIONS = (
    "How do I run an external command and capture its output?",
    "delete a directory together with everything inside it",
    "Which function finds the most common elements of a list?",
    "wait until several threads have reached the same point",
    "read rows of a spreadsheet exported as comma separated values",
)


_REMEDY = "remove it, and the demo indexes the library again, or name another folder"

_SKIPPED = {
    "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "test", "this", "tkinter", "turtle", "turtledemo",
}  # fmt: skip
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_WORDS = 60  # of a docstring


def run_demo(folder: Path, checkpoint: str | None = None, k: int = 3) -> None:
    """Build the demo's index in `folder` unless it is there, then answer the questions.

    Raises:
      FileExistsError: the index that is there is of another Python's library.
      FileNotFoundError: no checkpoint given and the model package is not installed.
    """
    start = time.perf_counter()
    path = folder / "standard_library.index"
    documents = standard_library_documents()
    if present_folder(path):
        index = Index.open(path)
        check_documents(index, list(documents.items()), _REMEDY)
        retriever = Retriever.open(index, checkpoint)
        print(f"Index of {len(retriever)} documents is there: {path}")
    else:
        print(f"Indexing {len(documents)} docstrings of the Python standard library")
        retriever = Retriever.build(path, checkpoint or packaged_model(), documents, nbits=2)
    for question, hits in zip(QUESTIONS, retriever.search(QUESTIONS, k=k), strict=True):
        print(f"\n{question}")
        for hit in hits:
            assert hit.text is not None
            print(f"  {hit.score:6.2f}  {hit.id}")
            print(f"          {hit.text[:100]}{'...' if len(hit.text) > 100 else ''}")
            print(f"          {matched_words(retriever.explain(question, hit))}")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Ask more:")
    print(f'  colbert-jax search {path} "your question"')


def matched_words(explanation: Explanation) -> str:
    """The strongest matches as text: "capture ~ captured 0.81, output = output 0.93"."""
    return ", ".join(
        f"{word} {'=' if word.lower() == match.lower() else '~'} {match} {similarity:.2f}"
        for word, match, similarity in explanation.strongest()
    )


def packaged_model() -> Path:
    """The folder of the MiniLM checkpoint inside its package, found without importing it."""
    place = hub.packaged_model()
    if place is None:
        raise FileNotFoundError(
            f"the demo's model is not installed: run '{hub.INSTALL_MODEL}', or pass --checkpoint "
            "with a folder or a hub id such as colbert-ir/colbertv2.0"
        )
    return place


def standard_library_documents() -> dict[str, str]:
    """Name -> text of the documented modules, classes and functions, a few thousand.

    Docstrings are read from the sources, so nothing is imported. Of a name that is defined twice
    the last definition counts.
    """
    return dict(_docstrings_of(Path(sysconfig.get_path("stdlib"))))


def _docstrings_of(library: Path) -> Iterator[tuple[str, str]]:
    for module in sorted(sys.stdlib_module_names - _SKIPPED):
        if module.startswith("_"):
            continue
        files = sorted((library / module).rglob("*.py")) or [library / f"{module}.py"]
        for file in files:
            parts = file.relative_to(library).with_suffix("").parts
            public = not any(p.startswith("_") for p in parts if p != "__init__")
            if file.is_file() and public and not {"test", "tests"} & set(parts):
                tree = ast.parse(file.read_bytes())
                name = ".".join(p for p in parts if p != "__init__")
                yield from _docstrings(tree, name)


def _docstrings(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    words = (ast.get_docstring(node) or "").split()
    if len(words) >= 6:
        yield name, f"{name}: {' '.join(words[:_WORDS])}"
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if not child.name.startswith("_"):
                yield from _docstrings(child, f"{name}.{child.name}")
