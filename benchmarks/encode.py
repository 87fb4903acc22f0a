"""Encoding speed on a CPU: this library, PyLate and colbert-ai on the same passages and weights.

    python benchmarks/encode.py DATA --checkpoint FOLDER [--documents 5000] \
        [--peer pylate=PYTHON] [--peer colbert-ai=PYTHON] [--peer torch=PYTHON] \
        [--peer "torch int8=PYTHON"] [--int8] \
        [--quality cranfield,scifact] [--output results.json]

DATA is the folder that `passages.py` reads. FOLDER is a checkpoint of any layout; one without a
projection gets a random one to 128 dimensions, which changes no speed. It is written as a Stanford
folder, which all three load. PYTHON is an interpreter that has the peer: nothing is installed here.

Every library runs in a process of its own, in turn, --repeat times; medians are reported. A run
loads the model, encodes all documents (at most 180 tokens, mixed lengths) twice, all queries twice
in one call, and single queries. The second time is reported; the first one, in which we compile
what is not in the cache on the disk, as `first_seconds`, of every run (the cache is empty in the
first run). Tokenisation is timed by itself as well. Batches are the libraries' own: PyLate sorts
by length and pads 32 documents to the longest, as colbert-ai does with the 64 of its indexer.
torch is transformers' model called as PyLate calls it, torch int8 the same after its
quantize_dynamic; both need a BERT. CPU
seconds are of all threads. --quality prints nDCG@10 of the checkpoint as it is, in float32 and in
int8, by exact scoring of the raw embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

DOC_MAXLEN, QUERY_MAXLEN, DIM = 180, 32, 128
COMPARED = 64  # documents whose embeddings are compared between the libraries
PACKAGES = ("jax", "jaxlib", "colbert-jax", "pylate", "colbert-ai", "torch", "transformers")
OURS = ("colbert_jax", "colbert_jax int8")


class Encoder(NamedTuple):
    """What is timed: functions of lists of texts."""

    tokenize: Callable[[list[str]], Any]
    documents: Callable[[list[str]], tuple[Any, Any]]  # flat values [T, D], lengths [N]
    queries: Callable[[list[str]], Any]


def load_colbert_jax(folder: str, quantization: str | None = None) -> Encoder:
    from colbert_jax import ColBERT
    from colbert_jax.runtime import enable_compilation_cache

    enable_compilation_cache()
    model = ColBERT.from_pretrained(folder, quantization=quantization)

    def documents(texts):
        encoded = model.encode_documents(texts, progress=False)
        return encoded.values, encoded.lengths

    return Encoder(model.tokenizer.documents, documents, model.encode_queries)


def load_pylate(folder: str) -> Encoder:
    import numpy as np
    import torch
    from pylate import models

    model = models.ColBERT(folder, device="cpu", model_kwargs={"torch_dtype": torch.float32})

    def encode(texts, is_query):
        return model.encode(texts, is_query=is_query, show_progress_bar=False)

    def documents(texts):
        rows = encode(texts, False)
        return np.concatenate(rows), np.array([len(row) for row in rows])

    def tokenize(texts):
        for i in range(0, len(texts), 32):
            model.tokenize(texts[i : i + 32], is_query=False)

    return Encoder(tokenize, documents, lambda texts: encode(texts, True))


def load_colbert_ai(folder: str) -> Encoder:
    from colbert.infra.config import ColBERTConfig
    from colbert.modeling.checkpoint import Checkpoint
    from colbert.modeling.colbert import ColBERT

    ColBERT.loaded_extensions = True  # its C++ extensions are for search; do not compile them
    model = Checkpoint(folder, colbert_config=ColBERTConfig(), verbose=0)
    model.float()
    size = model.colbert_config.index_bsize

    def documents(texts):
        values, lengths = model.docFromText(texts, bsize=size, keep_dims="flatten", to_cpu=True)
        return values.numpy(), lengths

    return Encoder(
        lambda texts: model.doc_tokenizer.tensorize(texts, bsize=size),
        documents,
        lambda texts: model.queryFromText(texts, bsize=32),
    )


def load_torch(folder: str, int8: bool = False) -> Encoder:
    """transformers' BERT and the projection in plain torch: 32 texts of like length at a time."""
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights: dict[str, Any] = {}
    for file in Path(folder).glob("*.safetensors"):
        weights |= load_file(file)
    bert = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    known = {name.removeprefix("bert."): value for name, value in weights.items()}
    bert.load_state_dict({name: known[name] for name in bert.state_dict()})
    projection = weights["linear.weight"].T
    if int8:
        bert = torch.ao.quantization.quantize_dynamic(bert, {torch.nn.Linear}, torch.qint8)
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    tokenizer.no_padding()
    of = tokenizer.token_to_id
    dropped: Any = [of(c) for c in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" if of(c) is not None]

    def tokenize(texts, marker="[unused1]", maxlen=DOC_MAXLEN):
        tokenizer.enable_truncation(maxlen - 1)
        rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        return [[row[0], of(marker), *row[1:]] for row in rows]

    def encode(rows, attended):
        places = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out: list[Any] = [None] * len(rows)
        for first in range(0, len(rows), 32):
            some = places[first : first + 32]
            width = max(len(rows[i]) for i in some)
            ids = torch.zeros((len(some), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for j, i in enumerate(some):
                ids[j, : len(rows[i])] = torch.tensor(rows[i])
                mask[j, : attended[i]] = 1
            with torch.inference_mode():
                hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state
                values = torch.nn.functional.normalize(hidden @ projection, dim=-1).numpy()
            for j, i in enumerate(some):
                out[i] = values[j, : len(rows[i])]
        return out

    def documents(texts):
        rows = tokenize(texts)
        values = encode(rows, list(map(len, rows)))
        kept = [v[~np.isin(np.array(r), dropped)] for v, r in zip(values, rows, strict=True)]
        return np.concatenate(kept), np.array([len(row) for row in kept])

    def queries(texts):
        rows = tokenize(texts, "[unused0]", QUERY_MAXLEN)
        filled = [row + [of("[MASK]")] * (QUERY_MAXLEN - len(row)) for row in rows]
        return np.stack(encode(filled, list(map(len, rows))))

    return Encoder(tokenize, documents, queries)


LOADERS: dict[str, Callable[[str], Encoder]] = {
    "colbert_jax": load_colbert_jax,
    "colbert_jax int8": lambda folder: load_colbert_jax(folder, "int8"),
    "pylate": load_pylate,
    "colbert-ai": load_colbert_ai,
    "torch": load_torch,
    "torch int8": lambda folder: load_torch(folder, int8=True),
}


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    return value, time.perf_counter() - wall, time.process_time() - cpu


def run(library: str, work: Path) -> dict[str, Any]:
    """One run, in the process of the library."""
    import numpy as np

    texts = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    documents, queries = texts["documents"], texts["queries"]
    encoder, load, _ = timed(lambda: LOADERS[library](str(work / "checkpoint")))
    _, first_wall, first_cpu = timed(lambda: encoder.documents(documents))
    encoder.queries(queries)
    encoder.queries(queries[:1])
    (values, lengths), wall, cpu = timed(lambda: encoder.documents(documents))
    _, query_wall, query_cpu = timed(lambda: encoder.queries(queries))
    single = [timed(lambda q=q: encoder.queries([q]))[1] for q in queries[:20]]  # type: ignore
    _, tokenize, tokenize_cpu = timed(lambda: encoder.tokenize(documents))
    lengths = np.asarray(lengths)
    compared = int(lengths[:COMPARED].sum())
    np.savez(work / f"{library}.npz", values=values[:compared], lengths=lengths)
    return {
        "documents_per_second": len(documents) / wall,
        "tokens_per_second": float(lengths.sum() / wall),
        "seconds": wall,
        "cpu_seconds": cpu,
        "first_seconds": first_wall,
        "first_cpu_seconds": first_cpu,
        "tokenize_seconds": tokenize,
        "tokenize_cpu_seconds": tokenize_cpu,
        "queries_per_second": len(queries) / query_wall,
        "query_cpu_seconds": query_cpu,
        "one_query_ms": 1e3 * statistics.median(single),
        "load_seconds": load,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def start(library: str, python: str, work: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(work / "xla"),
        "JAX_PLATFORMS": "cpu",
    }
    command = [python, __file__, "--worker", library, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{library}, run by {python}:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def prepare(args: argparse.Namespace, work: Path) -> None:
    """The texts and the checkpoint that the processes read."""
    from passages import read_passages, read_questions

    from colbert_jax import ColBERT
    from colbert_jax.checkpoints import hub, read_checkpoint

    passages = read_passages(args.data)[: args.documents]
    if len(passages) < args.documents:
        sys.exit(f"{args.data}: {len(passages)} passages, {args.documents} wanted")
    texts = {"documents": passages, "queries": read_questions(args.data, args.queries)}
    (work / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    settings: dict[str, Any] = dict(doc_maxlen=DOC_MAXLEN, query_maxlen=QUERY_MAXLEN)
    folder, _ = hub.resolve_checkpoint(args.checkpoint)
    if not read_checkpoint(folder).encoder.head:
        settings |= dict(
            dim=DIM,
            query_token_id="[unused0]",
            doc_token_id="[unused1]",
            query_expansion=True,
            mask_punctuation=True,
        )
    model = ColBERT.from_pretrained(folder, **settings)
    model.save_pretrained(work / "checkpoint", "stanford")


def agreement(work: Path, libraries: list[str]) -> dict[str, float | str]:
    """Largest difference of the first documents' embeddings from ours in float32."""
    import numpy as np

    ours = np.load(work / f"{libraries[0]}.npz")
    found: dict[str, float | str] = {}
    for library in libraries[1:]:
        theirs = np.load(work / f"{library}.npz")
        if (ours["lengths"] == theirs["lengths"]).all():
            found[library] = float(np.abs(ours["values"] - theirs["values"]).max())
        else:
            found[library] = "other tokens"
    return found


def quality(data: Path, checkpoint: str, names: list[str], work: Path) -> dict[str, Any]:
    """nDCG@10 in float32 and in int8."""
    from quality import Collection, evaluate_collection

    from colbert_jax import ColBERT

    results: dict[str, Any] = {}
    for name in names:
        results[name] = {}
        for quantization in (None, "int8"):
            model = ColBERT.from_pretrained(checkpoint, quantization=quantization)
            place = work / name / str(quantization)
            found = evaluate_collection(Collection(data / "eval" / name, model, place), bits=[])
            results[name][quantization or "float32"] = found["exact, raw"]["nDCG@10"]
    return results


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    units = [flag for flag in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")
             if flag in found.get("flags", "").split()]  # fmt: skip
    return (
        f"{os.cpu_count()} CPUs, {found.get('model name', platform.machine())}, {' '.join(units)}"
    )


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [name for name, value in runs[0].items() if isinstance(value, float)]
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in numbers}


def report(table: dict[str, dict[str, Any]]) -> str:
    columns = {
        "documents/s": "documents_per_second",
        "tokens/s": "tokens_per_second",
        "CPU s": "cpu_seconds",
        "tokenising, s": "tokenize_seconds",
        "queries/s": "queries_per_second",
        "one query, ms": "one_query_ms",
        "peak MB": "peak_mb",
    }
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for library, row in table.items():
        cells = " | ".join(f"{row[name]:,.1f}" for name in columns.values())
        lines.append(f"| {library} | {cells} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--checkpoint")
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--quality", help="collections of DATA/eval, for nDCG@10 of int8")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None and (args.data is None or args.checkpoint is None):
        parser.error("DATA and --checkpoint are needed")
    for peer in args.peer:
        if peer.partition("=")[0] not in set(LOADERS) - set(OURS) or "=" not in peer:
            names = ", ".join(name for name in LOADERS if name not in OURS)
            parser.error(f"--peer {peer}: give NAME=PYTHON with NAME one of {names}")
    return args


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(run(args.worker, args.work)))
        return
    pythons = dict.fromkeys(OURS[: 1 + args.int8], sys.executable)
    pythons |= dict(peer.split("=", 1) for peer in args.peer)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(args, work)
        runs: dict[str, list[dict[str, Any]]] = {library: [] for library in pythons}
        for turn in range(args.repeat):
            for library, python in pythons.items():
                found = start(library, python, work)
                runs[library].append(found)
                speed = f"{found['documents_per_second']:.1f} documents/s"
                print(f"run {turn + 1}: {library} {speed}", file=sys.stderr, flush=True)
        table = {library: medians(found) for library, found in runs.items()}
        differences = agreement(work, list(pythons))
        measured = {}
        if args.quality:
            measured = quality(args.data, args.checkpoint, args.quality.split(","), work)
    print(report(table))
    print("largest difference of an embedding's value from ours in float32:", differences)
    for name, row in measured.items():
        print(f"nDCG@10 of {name}:", ", ".join(f"{kind} {v:.4f}" for kind, v in row.items()))
    if args.output:
        peers = "".join(f" --peer {peer.partition('=')[0]}=PYTHON" for peer in args.peer)
        about = {
            "command": f"python benchmarks/encode.py DATA --checkpoint {Path(args.checkpoint).name}"
            f" --documents {args.documents} --queries {args.queries} --repeat {args.repeat}"
            f"{peers}{' --int8' * args.int8}",
            "machine": machine(),
            "versions": {library: found[0]["versions"] for library, found in runs.items()},
            "medians": table,
            "first_seconds": {
                library: [round(run["first_seconds"], 2) for run in found]
                for library, found in runs.items()
            },
            "difference_from_ours": differences,
            "nDCG@10": measured,
        }
        args.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
