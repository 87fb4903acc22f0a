"""Damage small checkpoints of every layout and load them.

    python tests/campaigns/damaged_checkpoints.py --count 2000 --seed 0

Each trial damages one file (or exchanges two) of one checkpoint and reads it. Right is an error
that names a file of the folder, or the undamaged model: the same parameters, settings and token
ids. A warning that names the folder makes another model right too; without one only damage that no
reader can see, changed bytes inside a value, may give one. Everything else is a fault: a crash, a
hang, an error of another kind, another model in silence. A trial depends on the seed and its
number alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import support  # noqa: E402

LIMIT = 30  # seconds of one trial
TEXTS = ["What is the CAPITAL of Paris, 42nd?", "fish", "", "the river runs. " * 20]
Damage = Callable[[Path, list[Path], np.random.Generator], str]


# --- Checkpoints ----------------------------------------------------------------------------


def write_sources(root: Path) -> None:
    """One folder for each layout, and for each form of weights and tokenizer."""
    from safetensors.numpy import load_file, save_file
    from tokenizers import BertWordPieceTokenizer

    from colbert_jax.checkpoints import convert_checkpoint
    from colbert_jax.tensors.torch_file import write_torch_file

    stanford = support.write_stanford(root / "stanford", nbits=4)
    support.write_plain(root / "huggingface")
    support.write_flmr(root / "flmr")
    support.write_flmr(root / "flmr-two", separate=True)
    for layout in ("native", "pylate", "sentence-transformers", "colbertv1"):
        convert_checkpoint(stanford, root / layout, layout)

    single = support.write_plain(root / "single-vector")
    BertWordPieceTokenizer(str(single / "vocab.txt")).save(str(single / "tokenizer.json"))
    entries = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in entries
    ]
    (single / "modules.json").write_text(json.dumps(modules))
    (single / "1_Pooling").mkdir()
    (single / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    shutil.copytree(root / "pylate" / "1_Dense", single / "2_Dense")
    settings = {"prompts": {"query": "query: ", "document": "passage: "}}
    (single / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (single / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40}))

    plain = shutil.copytree(single, root / "single-vector-plain")
    shutil.rmtree(plain / "2_Dense")
    (plain / "modules.json").write_text(json.dumps(modules[:2]))

    cased = shutil.copytree(root / "huggingface", root / "cased")
    (cased / "tokenizer_config.json").write_text('{"do_lower_case": false}')

    tensors = load_file(stanford / "model.safetensors")
    torch = shutil.copytree(stanford, root / "torch")
    (torch / "model.safetensors").unlink()
    write_torch_file(torch / "pytorch_model.bin", tensors)

    shards = shutil.copytree(stanford, root / "shards")
    (shards / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for part, some in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{part:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, shards / shard)
        places |= dict.fromkeys(some, shard)
    index = {"metadata": {}, "weight_map": places}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))


# --- Damage ---------------------------------------------------------------------------------


def _pick(files: list[Path], rng: np.random.Generator) -> Path:
    return files[int(rng.integers(len(files)))]


def truncate(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick(files, rng)
    size = int(rng.integers(file.stat().st_size))
    os.truncate(file, size)
    return f"{file.name} cut to {size} bytes"


def flip(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick(files, rng)
    data = bytearray(file.read_bytes())
    # Half of the flips fall into the first bytes, where headers are.
    most = len(data) if rng.random() < 0.5 else min(len(data), 4096)
    places = rng.integers(most * 8, size=int(rng.integers(1, 5)))
    for place in places.tolist():
        data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)
    return f"{file.name}: bits {places.tolist()} flipped"


def zeros(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick(files, rng)
    data = bytearray(file.read_bytes())
    start = int(rng.integers(len(data)))
    stop = min(len(data), start + int(rng.integers(1, 4096)))
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)
    return f"{file.name}: zeros at {start}..{stop}"


def junk(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick(files, rng)
    with file.open("ab") as stream:
        stream.write(rng.bytes(int(rng.integers(1, 200))))
    return f"{file.name}: bytes appended"


def replace(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick(files, rng)
    contents = (  # an empty object is a valid file, which sets nothing
        b"",
        b"null",
        b"[]",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"<!DOCTYPE html><html></html>",
        b"\xff\xfe{\x00",
        b"[" * 100_000,
    )
    content = contents[int(rng.integers(len(contents)))]
    file.write_bytes(content)
    return f"{file.name} became {content[:20]!r}"


def delete(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick(files, rng)
    file.unlink()
    return f"{file.relative_to(folder)} deleted"


def unreadable(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    file = _pick(files, rng)
    file.unlink()
    kind = ("link", "circle", "folder", "pipe")[int(rng.integers(4))]
    if kind == "link":
        file.symlink_to("pruned")
    elif kind == "circle":
        file.symlink_to(file)
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    return f"{file.relative_to(folder)} became a {kind}"


def swap(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    first, second = (files[int(i)] for i in rng.choice(len(files), 2, replace=False))
    aside = folder / "aside"
    os.rename(first, aside)
    os.rename(second, first)
    os.rename(aside, second)
    return f"{first.relative_to(folder)} and {second.relative_to(folder)} exchanged"


def wrong_type(folder: Path, files: list[Path], rng: np.random.Generator) -> str:
    """A value of a JSON file becomes one of another type; null would mean that it is not set."""
    file = _pick([f for f in files if f.suffix in (".json", ".metadata")] or files, rng)
    try:
        value = json.loads(file.read_text())
    except ValueError:
        return truncate(folder, [file], rng)
    places = list(_places(value, ()))
    path, old = places[int(rng.integers(len(places)))]
    others = ["text", -1, 10**30, 0.5, True, [], ["text"], {}, {"text": -1}, float("nan")]
    others = [o for o in others if not _alike(o, old)]
    new = others[int(rng.integers(len(others)))]
    if path:
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = new
    else:
        value = new
    file.write_text(json.dumps(value))
    return f"{file.relative_to(folder)}: {'.'.join(map(str, path))} {old!r:.40} became {new!r}"


def _alike(new: Any, old: Any) -> bool:
    """Whether a reader may take one for the other: numbers, anything in the place of null."""
    if isinstance(new, bool) or isinstance(old, bool):
        return type(new) is type(old)
    numbers = isinstance(new, (int, float)) and isinstance(old, (int, float))
    return old is None or type(new) is type(old) or numbers


def _places(value: Any, path: tuple) -> Iterator[tuple[tuple, Any]]:
    yield path, value
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if len(path) < 6:
        for key, inner in list(items)[:40]:
            yield from _places(inner, (*path, key))


# Bytes changed inside a value leave a valid file of other values, which no reader can tell.
UNSEEN: tuple[Damage, ...] = (flip, zeros)
KINDS: tuple[Damage, ...] = (
    truncate, flip, zeros, junk, replace, delete, unreadable, swap, wrong_type, wrong_type,
)  # fmt: skip


# --- A trial --------------------------------------------------------------------------------


def load(path: Path) -> str:
    """Read a checkpoint: a hash of all that embeddings depend on."""
    import jax

    from colbert_jax.checkpoints import read_checkpoint

    checkpoint = read_checkpoint(path)
    tokenizer = checkpoint.text_tokenizer()
    digest = hashlib.sha256(repr((checkpoint.encoder, checkpoint.config.text)).encode())
    for role in ("queries", "documents"):
        ids, attended = getattr(tokenizer, role)(TEXTS)
        digest.update(repr([[row.tolist() for row in ids], attended.tolist()]).encode())
        digest.update(repr([tokenizer.kept(row).tolist() for row in ids]).encode())
    for where, array in jax.tree.leaves_with_path((checkpoint.params, checkpoint.query_params)):
        digest.update(f"{where}{array.shape}".encode() + np.asarray(array).tobytes())
    return digest.hexdigest()


def trial(sources: Path, seed: int, number: int, expected: dict[str, str]) -> dict[str, str]:
    """Damage a copy and read it: what was done, and the verdict; one that begins with "fault"."""
    rng = np.random.default_rng([seed, number])
    names = sorted(expected)
    name = names[int(rng.integers(len(names)))]
    damage = KINDS[int(rng.integers(len(KINDS)))]
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(sources / name, Path(place) / name)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        known = {file.name for file in files} | {file.parent.name for file in files} - {name}
        known.add("model.safetensors")  # which is asked for where no weights are left
        done = f"{name}: {damage(folder, files, rng)}"
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                got = load(folder)
                said = [w for w in warned if str(folder) in str(w.message)]
                if got == expected[name]:
                    verdict = "the same model"
                elif said:
                    verdict = "another model, with a warning"
                elif damage in UNSEEN:
                    verdict = "other values"
                else:
                    verdict = "fault: another model in silence"
            except (ValueError, OSError) as error:
                message = str(error)
                rest = message.replace(str(folder), "")
                if str(folder) in message and any(known_ in rest for known_ in known):
                    verdict = "an error"
                else:
                    verdict = f"fault: names no file: {message[:300]!r}"
            except BaseException as error:  # a Rust panic is no Exception
                verdict = f"fault: {type(error).__name__}: {str(error)[:300]!r}"
    return {"done": done, "verdict": verdict}


# --- A campaign -----------------------------------------------------------------------------


def work(sources: Path, seed: int, start: int, stop: int) -> None:
    """Run trials in this process, a line of JSON for the beginning and the end of each."""
    expected = {folder.name: load(folder) for folder in sorted(sources.iterdir())}
    for number in range(start, stop):
        print(json.dumps({"number": number}), flush=True)
        print(json.dumps(trial(sources, seed, number, expected)), flush=True)


def campaign(count: int, seed: int, first: int = 0) -> Iterator[dict[str, str]]:
    """Run trials in a process that is started again after a crash or a hang."""
    with tempfile.TemporaryDirectory() as root:
        sources = Path(root)
        write_sources(sources)
        start, stop = first, first + count
        while start < stop:
            command = [sys.executable, __file__, "--worker", root]
            command += map(str, ["--seed", seed, "--first", start, "--count", stop - start])
            with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
                number, why = start - 1, "crash"
                for line in _lines(worker):
                    if line is None:
                        worker.kill()
                        why = "hang"
                    elif "number" in line:
                        number = line["number"]
                    else:
                        start = number + 1
                        yield {"number": str(number), **line}
            if start < stop:
                if number < start:
                    raise RuntimeError(f"the worker ended before trial {start}")
                verdict = f"fault: {why}, exit status {worker.returncode}"
                yield {"number": str(number), "done": "see the seed", "verdict": verdict}
                start = number + 1


def _lines(worker: Any) -> Iterator[dict[str, Any] | None]:
    """The worker's lines; None where none comes in time."""
    pending = b""
    while True:
        ready, _, _ = select.select([worker.stdout], [], [], LIMIT * (4 if not pending else 1))
        if not ready:
            yield None
            return
        data = os.read(worker.stdout.fileno(), 1 << 16)
        if not data:
            return
        *whole, pending = (pending + data).split(b"\n")
        yield from map(json.loads, whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="trials (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.seed, args.first, args.first + args.count)
        return 0
    verdicts: Counter[str] = Counter()
    for result in campaign(args.count, args.seed, args.first):
        fault = result["verdict"].startswith("fault")
        verdicts["fault" if fault else result["verdict"]] += 1
        if fault:
            print(f"trial {result['number']}: {result['done']}\n    {result['verdict']}")
    print(", ".join(f"{verdict}: {n}" for verdict, n in verdicts.most_common()))
    return 1 if verdicts["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
