"""How far our numbers are from those of the library that a checkpoint comes from.

    python convert/verify.py FOLDER [--original LIBRARY] [--python INTERPRETER] [--texts FILE]
    python convert/verify.py --published [NAME=FOLDER_OR_HUB_ID ...]

The first form encodes the same texts with both and compares embeddings and scores; it fails (exit
status 1) where embeddings differ by more than 1e-5 or scores by more than 1e-4 of their size. The
second compares with scores published for eleven checkpoints, of those whose weights are at hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax import ColBERT
from colbert_jax.checkpoints import detect_layout, hub
from colbert_jax.runtime import enable_compilation_cache

EMBEDDING_TOLERANCE = 1e-5
SCORE_TOLERANCE = 1e-4

# Layout -> library of originals.py; "single-vector" and "huggingface" have no lengths of their own
# for queries and documents, so the original is told ours.
ORIGINALS = {
    "stanford": "stanford",
    "pylate": "pylate",
    "sentence-transformers": "sentence-transformers",
    "single-vector": "sentence-transformers",
    "huggingface": "transformers",
}
LENGTHS_ARE_OURS = ("single-vector", "huggingface")
NOT_INSTALLED = 3  # exit status of originals.py

TEXTS = {
    "queries": [
        "What is late interaction?",
        "",
        "naïve café in Zürich, 東京 🙂",
        "  white space around, and a [MASK] inside  ",
        "dogs & cats... who (really) runs faster?!",
        "which of the many rivers of the world is the longest one " * 6,
    ],
    "documents": [
        "ColBERT keeps one vector for every token and sums the best matches of the query's.",
        "",
        "Überraschung! “curly quotes” \u2013 dashes — 東京 🙂🙃",
        "...!?",
        " \t leading and trailing white space \n ",
        "a [MASK] and a [SEP] in the text; punctuation, everywhere: here (and there).",
        "The Nile and the Amazon are the longest rivers; which is longer is disputed. " * 60,
    ],
}

QUERY = "Which planet is known as the Red Planet?"
DOCUMENTS = [
    "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
]
# As the tests of sentence-transformers print them, digit for digit.
PUBLISHED = {
    "colbert-ir/colbertv2.0": "12.79703 27.19449 23.8495 24.56564",
    "lightonai/colbertv2.0": "12.79703 27.19449 23.8495 24.56564",
    "answerdotai/answerai-colbert-small-v1": "30.56916 31.48954 31.30291 31.30716",
    "lightonai/GTE-ModernColBERT-v1": "11.25772 11.51133 11.34575 11.4518",
    "lightonai/LateOn": "10.79417 11.11042 10.97427 11.08107",
    "mixedbread-ai/mxbai-edge-colbert-v0-17m": "11.56932 11.75844 11.70989 11.72288",
    "lightonai/Reason-ModernColBERT": "9.05118 10.18419 9.12381 9.39101",
    "lightonai/mLateOn": "11.3486 11.5170 11.4391 11.4867",
    "LiquidAI/LFM2-ColBERT-350M": "30.42596 30.66987 30.55955 30.61758",
    "perplexity-ai/pplx-embed-v1-late-0.6b": "31.56128 31.80504 31.67393 31.74072",
}
# As the model card of bge-m3 prints them: for each of two queries two documents, by the weights of
# the dense, the lexical and the multi-vector score.
THREE_WAY_QUERIES = ["What is BGE M3?", "Defination of BM25"]
THREE_WAY_DOCUMENTS = [
    "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector "
    "interaction.",
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query "
    "terms appearing in each document",
]
PUBLISHED_THREE_WAYS: dict[str, dict[tuple[float, float, float], str]] = {
    "BAAI/bge-m3": {
        (1, 0, 0): "0.62598 0.34741 0.34985 0.67822",
        (0, 1, 0): "0.19556 0.00880 0.00000 0.18030",
        (0, 0, 1): "0.77965 0.46215 0.45238 0.78986",
        (0.4, 0.2, 0.4): "0.60136 0.32558 0.32089 0.62329",
    },
}
# They were computed on other devices and in other precisions.
PUBLISHED_TOLERANCE = 1e-2


class Encoded(NamedTuple):
    """One float32 [tokens, dim] array for every text, and the scores [queries, documents]."""

    queries: list[np.ndarray]
    documents: list[np.ndarray]
    scores: np.ndarray


class Difference(NamedTuple):
    """What was compared, by how much it differs (None: shapes differ), and the most allowed."""

    what: str
    value: float | None
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value is not None and self.value <= self.tolerance


def load(name_or_path: str | Path) -> ColBERT:
    dtype = jnp.dtype("float32")
    return ColBERT.from_pretrained(name_or_path, dtype=dtype, devices=jax.local_devices()[:1])


def encode(model: ColBERT, queries: Sequence[str], documents: Sequence[str]) -> Encoded:
    encoded = model.encode_queries(queries, allow_blank=True)
    rows = [query[np.abs(query).sum(axis=1) > 0] for query in encoded]  # the rest is padding
    columns = list(model.encode_documents(documents))
    scores = np.full((len(rows), len(columns)), -np.inf, np.float32)  # of documents without tokens
    for j, document in enumerate(columns):
        if len(document):
            scores[:, j] = [(document @ row.T).max(axis=0).sum() for row in rows]
    return Encoded(rows, columns, scores)


def read_encoded(file: Path) -> tuple[Encoded, str]:
    """What originals.py wrote, and the versions that ran."""
    arrays = np.load(file)

    def rows(values: str, lengths: str) -> list[np.ndarray]:
        return np.split(arrays[values], np.cumsum(arrays[lengths])[:-1])

    encoded = Encoded(
        rows("queries", "query_lengths"),
        rows("documents", "document_lengths"),
        arrays["scores"],
    )
    return encoded, str(arrays["versions"])


def differences(ours: Encoded, theirs: Encoded) -> list[Difference]:
    """The largest differences of embeddings, absolute, and of scores, relative."""
    found = []
    for what in ("queries", "documents"):
        pairs = list(zip(getattr(ours, what), getattr(theirs, what), strict=True))
        unequal = [i for i, (a, b) in enumerate(pairs) if a.shape != b.shape]
        if unequal:
            i = unequal[0]
            shapes = " and ".join(str(list(rows.shape)) for rows in pairs[i])
            note = f"{len(unequal)} of other shapes; number {i} has {shapes}"
            found.append(Difference(what, None, EMBEDDING_TOLERANCE, note))
            continue
        largest = max((float(np.abs(a - b).max()) for a, b in pairs if a.size), default=0.0)
        found.append(Difference(what, largest, EMBEDDING_TOLERANCE))
    scored = np.array([len(rows) > 0 for rows in ours.documents])
    a, b = ours.scores[:, scored], theirs.scores[:, scored]
    relative = np.abs(a - b) / np.maximum(np.abs(b), 1e-6)
    largest = float(relative.max()) if relative.size else 0.0
    found.append(Difference("scores", largest, SCORE_TOLERANCE))
    return found


def run_original(
    library: str, folder: Path, texts: dict[str, Any], python: str
) -> tuple[Encoded, str] | None:
    """The original's answer, or None where it is not installed. Raises RuntimeError if it fails."""
    script = Path(__file__).with_name("originals.py")
    with tempfile.TemporaryDirectory() as place:
        inputs, out = Path(place) / "texts.json", Path(place) / "out.npz"
        inputs.write_text(json.dumps(texts), encoding="utf-8")
        command = [python, str(script), library, str(folder), str(inputs), str(out)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode == NOT_INSTALLED:
            print(ran.stderr.strip().splitlines()[-1], file=sys.stderr)
            return None
        if ran.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr[-3000:]}")
        return read_encoded(out)


def verify(name: str, library: str | None, python: str, file: Path | None) -> int:
    """Compare one checkpoint with its library, print a table and return the exit status."""
    folder = hub.resolve(name)
    layout = detect_layout(folder)
    library = library or ORIGINALS.get(layout)
    if library is None:
        print(
            f"{name}: the {layout} layout has no original that can be installed; name one with "
            "--original if another library reads this folder too",
            file=sys.stderr,
        )
        return 2
    texts: dict[str, Any] = dict(TEXTS)
    if file is not None:
        texts = json.loads(file.read_text(encoding="utf-8"))
    model = load(folder)
    if layout in LENGTHS_ARE_OURS:
        text = model.config.text
        texts |= {"query_maxlen": text.query_maxlen, "doc_maxlen": text.doc_maxlen}
    ours = encode(model, texts["queries"], texts["documents"])
    answer = run_original(library, folder, texts, python)
    if answer is None:
        return 2
    theirs, versions = answer
    found = differences(ours, theirs)
    print(f"{name}: {layout} layout, compared with {versions}\n")
    print(f"{'':10} {'largest difference':>20} {'allowed':>9}")
    for difference in found:
        value = "-" if difference.value is None else f"{difference.value:.1e}"
        verdict = "PASS" if difference.passed else "FAIL"
        print(
            f"{difference.what:10} {value:>20} {difference.tolerance:>9.0e}  {verdict} "
            f"{difference.note}".rstrip()
        )
    return 0 if all(difference.passed for difference in found) else 1


def published(places: dict[str, str]) -> int:
    """Compare with the published scores, print a table and return the exit status."""
    passed = True
    print(f"{'checkpoint':40} {'published':>10} {'ours':>10} {'difference':>11}")
    for name in (*PUBLISHED, *PUBLISHED_THREE_WAYS):
        place = places.get(name, name)
        try:
            folder = hub.resolve(place)
        except OSError as error:
            print(f"{name:40} not at hand: {_reason(error, place)}")
            continue
        try:
            compared = _compared(name, load(folder))
        except ValueError as error:
            print(f"{name:40} not supported: {_reason(error, str(folder))}")
            continue
        for text, score in compared:
            digits = len(text.partition(".")[2])
            difference = abs(float(score) - float(text))
            within = difference <= PUBLISHED_TOLERANCE + 0.5 * 10.0**-digits
            passed &= within
            verdict = "PASS" if within else "FAIL"
            print(f"{name:40} {text:>10} {score:>10.5f} {difference:>11.5f}  {verdict}")
    return 0 if passed else 1


def _compared(name: str, model: ColBERT) -> list[tuple[str, float]]:
    """Scores as they are printed, and ours."""
    if name in PUBLISHED:
        scores = encode(model, [QUERY], DOCUMENTS).scores[0]
        return list(zip(PUBLISHED[name].split(), scores.tolist(), strict=True))
    compared: list[tuple[str, float]] = []
    for weights, printed in PUBLISHED_THREE_WAYS[name].items():
        hits = model.rank(THREE_WAY_QUERIES, THREE_WAY_DOCUMENTS, weights=weights)
        scores = np.empty_like(hits.scores)
        np.put_along_axis(scores, hits.positions, hits.scores, axis=1)
        compared += zip(printed.split(), scores.reshape(-1).tolist(), strict=True)
    return compared


def _reason(error: Exception, name: str) -> str:
    """The first sentence of an error, for a line of a table."""
    return str(error).partition("\n")[0].removeprefix(f"{name}: ").partition(". ")[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="a checkpoint or a hub id")
    parser.add_argument(
        "--original",
        choices=sorted(set(ORIGINALS.values())),
        metavar="LIBRARY",
        help=f"{', '.join(sorted(set(ORIGINALS.values())))}; by default the layout tells",
    )
    parser.add_argument(
        "--python", default=sys.executable, metavar="INTERPRETER", help="one that has the original"
    )
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help='JSON with lists "queries" and "documents"'
    )
    parser.add_argument(
        "--published",
        nargs="*",
        metavar="NAME=PLACE",
        help="compare with published scores; where the weights of NAME are, if not on the hub",
    )
    args = parser.parse_args(arguments)
    if (args.folder is None) == (args.published is None):
        parser.error("give either FOLDER or --published")
    enable_compilation_cache()
    try:
        if args.folder is not None:
            return verify(args.folder, args.original, args.python, args.texts)
        places = dict(entry.partition("=")[::2] for entry in args.published)
        known = (*PUBLISHED, *PUBLISHED_THREE_WAYS)
        unknown = sorted(places.keys() - set(known))
        if unknown:
            parser.error(f"no scores of {', '.join(unknown)}; known: {', '.join(known)}")
        return published(places)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
