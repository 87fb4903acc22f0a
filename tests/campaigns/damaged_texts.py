"""Damage small text files of every kind and read them.

    python tests/campaigns/damaged_texts.py --count 500 --seed 0

Each trial damages one file: a collection, queries, judgements, examples, a ranking or settings.
Right is an error that names the file, with the line where one line was damaged, or what the whole
file holds. Other values are right only where no reader can tell: letters inside a text, lines that
are gone. Everything else is a fault: a crash, a hang, an error of another kind, other values in
silence. A trial depends on the seed and its number alone. Named pipes are read like files, and
waited for, so there are none.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # programs run for milliseconds

import support  # noqa: E402
from campaigns.common import (  # noqa: E402
    Campaign,
    Damage,
    delete,
    flip,
    junk,
    pick,
    replace,
    truncate,
    unreadable,
    wrong_type,
    zeros,
)

N = 30


def write_sources(root: Path) -> None:
    """A folder of files that belong together, and a checkpoint."""
    support.write_stanford(root / "model", {"num_hidden_layers": 1})
    folder = root / "files"
    folder.mkdir()
    texts = [f"{text} é{i}" for i, text in enumerate(support.passages(N))]
    queries = [f"which {word} is it" for word in support.WORDS[:N]]

    def write(name: str, lines: list[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    def objects(**columns: list) -> list[str]:
        rows = zip(*columns.values(), strict=True)
        return [
            json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows
        ]

    ids, titles = [f"d{i}" for i in range(N)], [f"title {i}" for i in range(N)]
    numbered = [f"{i}\t{text}" for i, text in enumerate(texts)]
    titled = ["\t".join(row) for row in zip(ids, texts, titles, strict=True)]
    for end in ("", ".gz"):
        write(f"collection.tsv{end}", numbered)
        write(f"beir.jsonl{end}", objects(_id=ids, title=titles, text=texts))
    write("titled.tsv", titled)
    write("header.tsv", ["pid\ttext\ttitle", *titled])
    urls = [f"{i}\thttps://a.example/{i}\t{titles[i]}\t{texts[i]}" for i in range(N)]
    write("documents.tsv", urls)
    write("collection.txt", texts)
    qids = [f"q{i}" for i in range(N)]
    write("queries.tsv", [f"{i}\t{text}" for i, text in enumerate(queries)])
    write("named.queries.tsv", ["qid\ttext", *map("\t".join, zip(qids, queries, strict=True))])
    write("queries.jsonl", objects(qid=list(range(N)), question=queries))
    write("qrels.tsv", [f"{i}\t0\t{(7 * i) % N}\t1" for i in range(N)])
    beir = [f"q{i}\td{(7 * i) % N}\t{i % 3}" for i in range(N)]
    write("beir.qrels.tsv", ["query-id\tcorpus-id\tscore", *beir])
    triples = [[i, (7 * i) % N, (7 * i + 3) % N] for i in range(N)]
    write("triples.jsonl", list(map(json.dumps, triples)))
    write("triples.tsv", ["\t".join(map(str, triple)) for triple in triples])
    scored = [[i, *([pid, pid / 7] for pid in pids)] for i, *pids in triples]
    write("scored.jsonl", list(map(json.dumps, scored)))
    named = objects(
        query=queries,
        positive=texts,
        negatives=[[texts[i - 1], texts[i - 2]] for i in range(N)],
        scores=[[1.5, 0.25, -3]] * N,
    )
    write("pairs.jsonl", named)
    write("pairs.jsonl.gz", named)
    write("texts.tsv", [f"{queries[i]}\t{texts[i]}\t{texts[i - 1]}" for i in range(N)])
    ranking = [f"{i}\t{(i + n) % N}\t{n}\t{9.5 - n}" for i in range(N) for n in range(1, 4)]
    write("ranking.tsv", ranking)
    settings = dict(checkpoint="x", folder="y", triples="t", queries="q", collection="c")
    training = dict(lr=1e-5, maxsteps=10, bsize=4, loss="cross-entropy")
    settings_ = {**settings, "training": training, "text": {"query_maxlen": 16}}
    (folder / "settings.json").write_text(json.dumps(settings_, indent=1))


# --- Reading --------------------------------------------------------------------------------


def _collection(file: Path, model: Any) -> Any:
    """What an index of it holds, and what training reads."""
    from colbert_jax import Retriever
    from colbert_jax.data.texts import Texts

    with tempfile.TemporaryDirectory() as place:
        built = Retriever.build(
            Path(place) / "i", model, file, num_centroids=4, kmeans_niters=1, progress=False
        )
        assert built.index.texts is not None
        found = list(zip(built.index.ids, built.index.texts, strict=True))
    assert list(Texts.passages(file).items()) == found, "two readers differ"
    return found


def _queries(file: Path, model: Any) -> Any:
    from colbert_jax.data.collections import read_queries
    from colbert_jax.data.texts import Texts

    found = list(read_queries(file).items())
    assert list(Texts.queries(file).items()) == found, "two readers differ"
    return found


def _qrels(file: Path, model: Any) -> Any:
    from colbert_jax.evaluation import read_qrels

    return read_qrels(file)


def _triples(file: Path, model: Any) -> Any:
    from colbert_jax.data.examples import stanford_examples

    files = (file.with_name(name) for name in ("queries.tsv", "collection.tsv"))
    found = stanford_examples(file, *files, progress=False)
    return [found[i] for i in range(len(found))]


def _pairs(file: Path, model: Any) -> Any:
    from colbert_jax.data.examples import pair_examples

    fields = dict(negatives="negatives", scores="scores") if ".jsonl" in file.name else {}
    found = pair_examples(file, progress=False, **fields)
    return [found[i] for i in range(len(found))]


def _ranking(file: Path, model: Any) -> Any:
    from colbert_jax.data.texts import Texts
    from colbert_jax.mining.ranking import RankedPairs

    queries = Texts.queries(file.with_name("queries.tsv"))
    passages = Texts.passages(file.with_name("collection.tsv"))
    found = RankedPairs(file, queries, passages, progress=False)
    return found.qids, found.rows.tolist(), found.offsets.tolist(), found.pids(0)


def _settings(file: Path, model: Any) -> Any:
    from colbert_jax.settings import make, read_settings
    from colbert_jax.training.recipes import RECIPES

    return make(RECIPES["colbertv1"][0], read_settings(file), str(file))


READERS: dict[str, Callable[[Path, Any], Any]] = {
    **dict.fromkeys(("collection.tsv", "collection.tsv.gz", "collection.txt"), _collection),
    **dict.fromkeys(("titled.tsv", "header.tsv", "documents.tsv"), _collection),
    **dict.fromkeys(("beir.jsonl", "beir.jsonl.gz"), _collection),
    **dict.fromkeys(("queries.tsv", "named.queries.tsv", "queries.jsonl"), _queries),
    **dict.fromkeys(("qrels.tsv", "beir.qrels.tsv"), _qrels),
    **dict.fromkeys(("triples.jsonl", "triples.tsv", "scored.jsonl"), _triples),
    **dict.fromkeys(("pairs.jsonl", "pairs.jsonl.gz", "texts.tsv"), _pairs),
    "ranking.tsv": _ranking,
    "settings.json": _settings,
}


# --- Damage to lines ------------------------------------------------------------------------


def _on_a_line(change: Callable[[bytes, np.random.Generator], bytes]) -> Damage:
    """Change one line of a file, also of a compressed one."""

    def damage(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
        file = pick(files, rng)
        data = file.read_bytes()
        packed = file.suffix == ".gz"
        lines = (gzip.decompress(data) if packed else data).split(b"\n")
        at = int(rng.integers(len(lines) - 1)) if len(lines) > 1 else 0
        lines[at] = change(lines[at], rng)
        whole = b"\n".join(lines)
        file.write_bytes(gzip.compress(whole) if packed else whole)
        return f"{file.name}: {change.__name__.strip('_')} at line {at + 1}"

    return damage


def _inserted(*others: bytes) -> Callable[[bytes, np.random.Generator], bytes]:
    def insert(line: bytes, rng: np.random.Generator) -> bytes:
        place, other = int(rng.integers(len(line) + 1)), others[int(rng.integers(len(others)))]
        return line[:place] + other + line[place:]

    return insert


def _instead(*others: bytes) -> Callable[[bytes, np.random.Generator], bytes]:
    def put(line: bytes, rng: np.random.Generator) -> bytes:
        return others[int(rng.integers(len(others)))]

    return put


def _fields_lost(line: bytes, rng: np.random.Generator) -> bytes:
    return line.rpartition(b"\t")[0] if b"\t" in line else line[: len(line) // 2]


def _fields_more(line: bytes, rng: np.random.Generator) -> bytes:
    return line + b"\tone\tmore"


def _value_changed(line: bytes, rng: np.random.Generator) -> bytes:
    """Another sort of value in a line of JSON, else in a field."""
    others: list = [None, -1, 10**30, float("nan"), True, [], {}, "", "  ", [["x"]], "\ud800"]
    others.append("9" * 5000)
    other = others[int(rng.integers(len(others)))]
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        value[keys[int(rng.integers(len(keys)))]] = other
        return json.dumps(value).encode()
    fields = line.split(b"\t")
    fields[int(rng.integers(len(fields)))] = str(other).encode("utf-8", "replace")
    return b"\t".join(fields)


def old_line_ends(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = pick(files, rng)
    data = file.read_bytes()
    packed = file.suffix == ".gz"
    whole = (gzip.decompress(data) if packed else data).replace(b"\n", b"\r")
    file.write_bytes(gzip.compress(whole) if packed else whole)
    return f"{file.name}: CR for every LF"


def other_encoding(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = pick([f for f in files if f.suffix != ".gz"] or files, rng)
    if file.suffix == ".gz":
        return truncate(folder, files, rng)
    name = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "utf-8-sig")[rng.integers(6)]
    file.write_bytes(file.read_text("utf-8").encode(name))
    return f"{file.name}: {name}"


def crlf(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = pick([f for f in files if f.suffix != ".gz"] or files, rng)
    if file.suffix != ".gz":
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    return f"{file.name}: CRLF"


def twice(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """All lines are there twice."""
    file = pick(files, rng)
    data = file.read_bytes()
    file.write_bytes(data + data)
    return f"{file.name}: twice"


def no_pipe(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    said = unreadable(folder, files, rng)
    if said.endswith("pipe"):
        files[0].unlink()
        files[0].mkdir()
        said = f"{files[0].name} became a folder"
    return said


bad_utf8 = _on_a_line(_inserted(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80"))
nul = _on_a_line(_inserted(b"\0", b"\0" * 100))
carriage_return = _on_a_line(_inserted(b"x\rx"))
deep = _on_a_line(_instead(b"[" * 100_000, b'{"a":' * 100_000, b'{"_id": ' + b"[" * 100_000))
no_json = _on_a_line(_instead(b"{", b"[1", b'{"_id": "x"', b"nul", b'{"_id": 1,}'))
other_json = _on_a_line(_instead(b"null", b"[]", b"{}", b"3", b'"x"', b"[[]]", b"[1, null, 2]"))
huge = _on_a_line(_inserted(b"x" * 1_000_000, b"9" * 100_000))
fields_lost, fields_more = _on_a_line(_fields_lost), _on_a_line(_fields_more)
value_changed = _on_a_line(_value_changed)
blank = _on_a_line(lambda line, rng: b"" if rng.random() < 0.3 else line + b"\n \t ")

KINDS: dict[str, Damage] = {
    **{f.__name__: f for f in (truncate, flip, zeros, junk, replace, delete, wrong_type)},
    **{f.__name__: f for f in (no_pipe, old_line_ends, other_encoding, crlf, twice)},
    **dict(bad_utf8=bad_utf8, nul=nul, carriage_return=carriage_return, deep=deep, huge=huge),
    **dict(no_json=no_json, other_json=other_json, blank=blank),
    **dict(fields_lost=fields_lost, fields_more=fields_more, value_changed=value_changed),
}
# What is refused wherever it stands, and what may give other values that no reader can tell.
ALWAYS = {"bad_utf8", "nul", "carriage_return", "old_line_ends", "zeros", "delete", "no_pipe"}
UNSEEN = {"truncate", "flip", "junk", "huge", "value_changed", "blank", "fields_lost", "twice"}
# In a plain text, or a field of texts, anything may be meant.
IN_TEXTS = {"fields_more", "deep", "no_json", "other_json", "replace", "wrong_type"}
TEXTS = ("collection.txt", "texts.tsv")


# --- A trial --------------------------------------------------------------------------------


def load(sources: Path) -> Any:
    """A model, and what each file holds."""
    import jax

    from colbert_jax import ColBERT

    model = ColBERT.from_pretrained(sources / "model", devices=jax.devices()[:1])
    expected = {name: repr(read(sources / "files" / name, model)) for name, read in READERS.items()}
    return model, expected


def trial(sources: Path, seed: int, number: int, loaded: Any) -> dict[str, str]:
    """Damage a copy and read it: what was done, and the verdict."""
    model, expected = loaded
    rng = np.random.default_rng([seed, number])
    names = sorted(READERS)
    name, kind = names[int(rng.integers(len(names)))], list(KINDS)[int(rng.integers(len(KINDS)))]
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        folder = shutil.copytree(sources / "files", Path(place) / "files")
        file = folder / name
        before = file.read_bytes()
        done = f"{kind}: {KINDS[kind](folder, [file], rng)}"
        unchanged = file.is_file() and file.read_bytes() == before
        try:
            same = repr(READERS[name](file, model)) == expected[name]
            said = any(str(file) in str(w.message) for w in warned)
            if same:
                verdict = "the same values"
                # Line ends mean nothing in JSON; bytes that a packed file ends with are no part.
                blind = name.endswith(".gz") or (kind, name) == ("old_line_ends", "settings.json")
                if kind in ALWAYS and not unchanged and not blind:
                    verdict = "fault: taken for whole"
            elif said:
                verdict = "other values, with a warning"
            elif kind in UNSEEN or "cut to" in done or (name in TEXTS and kind in IN_TEXTS):
                verdict = "other values"
            else:
                verdict = "fault: other values in silence"
        except (ValueError, OSError) as error:
            message = str(error)
            named = str(file) in message or f"{folder}: {name} is missing" in message
            lined = "line " in message or "duplicate" in message or name == "settings.json"
            verdict = "an error"
            if not named or (" at line " in done and not lined) or len(message) > 2000:
                verdict = f"fault: no file, no line or too long: {message[:300]!r}"
        except BaseException as error:
            verdict = f"fault: {type(error).__name__}: {str(error)[:300]!r}"
    return {"done": done, "verdict": verdict}


CAMPAIGN = Campaign(__file__, write_sources, load, trial)

if __name__ == "__main__":
    sys.exit(CAMPAIGN.main(__doc__.split("\n")[0], 500))
