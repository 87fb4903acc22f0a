"""What a GPU does: encoding, training, search and the kernel that scores, on data made on the spot.

    bash benchmarks/gpu.sh OUT [full|toy]

which calls this once for each stage, with a limit of time, so that nothing that fails or hangs
costs the others:

    python benchmarks/gpu.py STAGE OUT [--size full|toy]

encode: passages a second by BERT-base in bfloat16, and the share of the peak that its products are;
    the peak is what one large product reaches, in the same process.
data: token embeddings for the two stages after it.
search: an index of these, and queries a second at each batch size, in each mode, with overlap@10.
fast-plaid: the same of fast-plaid, if it is installed. (`search.py` compares on real data.)
train: `benchmarks/train.py` on random texts: queries a second beside a plain torch loop.
kernel: scoring of residuals by the fused kernel beside XLA's program: agreement and time.
fused: search again, by the kernel; only if it agreed.

Each stage writes OUT/STAGE.json, one of many figures after each of them. Weights, texts and
embeddings are random: figures are of speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SIZES: dict[str, dict[str, Any]] = {
    "full": dict(
        layers=12, hidden=768, heads=12, batch=512, length=180, product=8192,
        passages=100_000, tokens=80, dim=128, queries=1024, rows=32, nbits=4,
        batches=(64, 1024, 1), seconds=2.0, bsize=32, nway=16, steps=8, kernel=(32, 512, 32),
    ),
    "toy": dict(
        layers=1, hidden=32, heads=4, batch=4, length=32, product=64,
        passages=200, tokens=10, dim=16, queries=8, rows=8, nbits=4,
        batches=(1, 4), seconds=0.1, bsize=2, nway=2, steps=2, kernel=(1, 2, 32),
    ),
}  # fmt: skip
WORDS = ("who", "wrote", "the", "book", "heat", "flow", "wing", "river", "bank", "light", "study")


def encode(size: dict[str, Any], out: Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from colbert_jax import ColBERT

    model = ColBERT.from_pretrained(checkpoint(size, out), dim=128, dtype=jnp.dtype(jnp.bfloat16))
    batch, length = size["batch"], size["length"]
    ids = np.random.default_rng(0).integers(5, 100, (batch, length)).astype(np.int32)
    texts = jax.device_put((ids, np.full(batch, length, np.int32), np.ones(ids.shape, bool)))
    seconds = timed(lambda: model.encode_ids(model.params, *texts), size["seconds"])
    hidden, layers = size["hidden"], size["layers"]
    # Of a token: the four projections, the two of the unit, and both products of attention.
    products = layers * (2 * 12 * hidden * hidden + 4 * length * hidden) + 2 * hidden * 128
    n = size["product"]
    side = jnp.ones((n, n), jnp.bfloat16)
    peak = 2 * n**3 / timed(partial(jax.jit(jnp.matmul), side, side), size["seconds"])
    rate = batch * length * products / seconds
    return {
        "passages_per_second": batch / seconds,
        "tflops": rate / 1e12,
        "peak_tflops": peak / 1e12,
        "share_of_peak": rate / peak,
    }


def data(size: dict[str, Any], out: Path) -> dict[str, Any]:
    """Documents around random topics; queries are noisy tokens of some documents."""
    import jax
    import jax.numpy as jnp

    dim, topics = size["dim"], 1 << 14
    parts: Any = jax.random.split(jax.random.key(0), 6)

    def unit(values: Any) -> Any:
        return values / jnp.linalg.norm(values, axis=-1, keepdims=True)

    centres = unit(jax.random.normal(parts[0], (topics, dim)))

    @jax.jit
    def block(key: Any) -> Any:
        one, two = jax.random.split(key)
        chosen = jax.random.randint(one, (1 << 16,), 0, topics)
        return unit(centres[chosen] + 0.6 * jax.random.normal(two, (1 << 16, dim)) / dim**0.5)

    total = size["passages"] * size["tokens"]
    values = np.lib.format.open_memmap(
        out / "values.npy", mode="w+", dtype=np.float16, shape=(total, dim)
    )
    for number, start in enumerate(range(0, total, 1 << 16)):
        some = np.asarray(block(jax.random.fold_in(parts[1], number)), np.float16)
        values[start : start + (1 << 16)] = some[: total - start]
    rng = np.random.default_rng(0)
    places = rng.integers(0, size["passages"], (size["queries"], 1)) * size["tokens"]
    places = places + rng.integers(0, size["tokens"], (size["queries"], size["rows"]))
    queries = values[places].astype(np.float32)
    queries += rng.normal(size=queries.shape).astype(np.float32) * 0.5 / dim**0.5
    np.save(out / "queries.npy", queries / np.linalg.norm(queries, axis=-1, keepdims=True))
    return {"tokens": total, "megabytes": values.nbytes / 1e6}


def search(size: dict[str, Any], out: Path) -> dict[str, Any]:
    from colbert_jax import Index

    values, queries = np.load(out / "values.npy", mmap_mode="r"), np.load(out / "queries.npy")
    lengths = np.full(size["passages"], size["tokens"])
    path, start = out / "ours.index", time.perf_counter()
    if not path.exists():
        Index.build(path, embeddings=values, lengths=lengths, nbits=size["nbits"], progress=False)
    build = time.perf_counter() - start
    index = Index.open(path)
    few = queries[:64]  # of exact search: it goes through all documents
    best = index.search(few, 10, mode="exact").positions
    rows: list[dict[str, Any]] = []
    for mode in ("fast", "accurate", "exact"):
        found = index.search(few, 10, mode=mode).positions
        row: dict[str, Any] = {"mode": mode, "overlap@10": overlap(found, best)}
        for batch in size["batches"]:
            if mode == "exact" and batch > len(few):
                continue
            some = queries[:batch]
            seconds = timed(partial(index.search, some, 10, mode=mode), size["seconds"])
            row[f"queries_per_second, batch {batch}"] = len(some) / seconds
            note(out, {"build_seconds": build, "rows": [*rows, row], "results": best.tolist()})
        rows.append(row)
    return {"build_seconds": build, "rows": rows, "results": best.tolist()}


def fast_plaid(size: dict[str, Any], out: Path) -> dict[str, Any]:
    if importlib.util.find_spec("fast_plaid") is None:
        return {"missing": "fast-plaid is not installed here"}
    sys.path.insert(0, str(HERE / "peers"))
    import fast_plaid_ as peer

    values, queries = np.load(out / "values.npy"), np.load(out / "queries.npy")
    lengths = np.full(size["passages"], size["tokens"])
    (out / "fast_plaid").mkdir(exist_ok=True)
    start = time.perf_counter()
    peer.build(out / "fast_plaid", values, lengths, size["nbits"])
    build = time.perf_counter() - start
    opened, best = peer.open(out / "fast_plaid"), read(out, "search").get("results")
    rows: list[dict[str, Any]] = []
    for settings in peer.settings(10)[:2]:
        few = peer.search(opened, peer.prepare(list(queries[:64])), 10, settings)
        row: dict[str, Any] = {"settings": settings}
        if best is not None:
            row["overlap@10"] = overlap(peer.ids(few), best)
        for batch in size["batches"]:
            some = peer.prepare(list(queries[:batch]))
            seconds = timed(partial(peer.search, opened, some, 10, settings), size["seconds"])
            row[f"queries_per_second, batch {batch}"] = len(queries[:batch]) / seconds
            note(out, {"build_seconds": build, "rows": [*rows, row]})
        rows.append(row)
    return {"build_seconds": build, "rows": rows}


def train(size: dict[str, Any], out: Path) -> dict[str, Any]:
    missing = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
    if missing:
        return {"missing": f"not installed here: {', '.join(missing)}"}
    folder, nway = out / "train", size["nway"]
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    count = size["bsize"] * (size["steps"] + 2)

    def texts(n: int, most: int) -> list[str]:
        return [" ".join(rng.choice(WORDS, rng.integers(most // 4, most + 1))) for _ in range(n)]

    lines = "".join(f"{i}\t{text}\n" for i, text in enumerate(texts(count, 20)))
    (folder / "queries.tsv").write_text(lines)
    lines = "".join(f"{i}\t{t}\n" for i, t in enumerate(texts(4 * nway, size["length"])))
    (folder / "collection.tsv").write_text(lines)
    with (folder / "examples_64way.jsonl").open("w") as file:
        for i in range(count):
            chosen = rng.choice(4 * nway, nway, replace=False)
            pairs = [[int(pid), float(-place)] for place, pid in enumerate(chosen)]
            file.write(json.dumps([i, *pairs]) + "\n")
    device = "cpu" if platform_of() == "cpu" else "gpu"
    command = [sys.executable, HERE / "train.py", folder, "--checkpoint", checkpoint(size, out)]
    command += ["--bsize", size["bsize"], "--nway", nway, "--steps", size["steps"]]
    command += [
        "--doc-maxlen",
        size["length"],
        "--length-groups",
        1,
        "--device",
        device,
        "--output",
        out / "steps.json",
    ]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    found = json.loads((out / "steps.json").read_text())
    return {name: found[name] for name in ("queries_per_second", "ratio", "scoring_memory_mb")}


def kernel(size: dict[str, Any], out: Path) -> dict[str, Any]:
    """Of the shapes in which PLAID calls it: documents by 32 tokens."""
    import jax
    import jax.numpy as jnp

    from colbert_jax.scoring.residual import token_maxima

    batch, n, length = size["kernel"]
    rows, options = size["rows"], {}
    simulated = platform_of() == "cpu"  # then only a few
    if simulated:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        from colbert_jax.scoring import residual_gpu

        fused = jax.jit(partial(residual_gpu.token_maxima, interpret=InterpretGPUParams()))
        options = {"nbits": (4,), "dims": (16,)}
    else:
        fused = jax.jit(partial(token_maxima, kernel="mosaic_gpu"))
    plain, found = jax.jit(partial(token_maxima, kernel="xla")), []
    rng = np.random.default_rng(0)
    for nbits in options.get("nbits", (1, 2, 4, 8)):
        for dim in options.get("dims", (64, 96, 128)):
            shape = batch, n, length
            given = (
                rng.normal(size=(batch, rows, dim)), rng.normal(size=(*shape, rows)),
                rng.integers(0, 256, (*shape, dim * nbits // 8), np.uint8),
                rng.uniform(0.5, 1, shape) * (rng.random(shape) < 0.9),
                np.sort(rng.normal(size=1 << nbits)),
            )  # fmt: skip
            on_device = [
                jnp.asarray(x if x.dtype == np.uint8 else x.astype(np.float32)) for x in given
            ]
            row: dict[str, Any] = {"nbits": nbits, "dim": dim}
            try:
                expected, scores = (np.asarray(f(*on_device)) for f in (plain, fused))
                # By the largest score: they are sums of either sign.
                row["largest_error"] = float(abs(scores - expected).max() / abs(expected).max())
                row["agrees"] = row["largest_error"] < 1e-5
                for name, function in (("xla", plain), ("fused", fused)):
                    seconds = timed(partial(function, *on_device), size["seconds"] / 6)
                    row[f"{name}_microseconds"] = 1e6 * seconds
            except Exception as error:
                row |= {"agrees": False, "error": f"{type(error).__name__}: {error}"[:500]}
            found.append(row)
            note(out, {"rows": found})
    return {"simulated": simulated, "agrees": all(row["agrees"] for row in found), "rows": found}


def fused(size: dict[str, Any], out: Path) -> dict[str, Any]:
    if not read(out, "kernel").get("agrees"):
        return {"left_out": "the kernel did not agree with XLA's program, or was not tried"}
    os.environ["COLBERT_JAX_GPU_KERNELS"] = "1"
    return search(size, out)


STAGES: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "encode": encode, "data": data, "search": search, "fast-plaid": fast_plaid, "train": train,
    "kernel": kernel, "fused": fused,
}  # fmt: skip


def timed(function: Callable[[], Any], seconds: float) -> float:
    """The median of calls, of at least three, after one that may compile."""
    import jax

    jax.block_until_ready(function())
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(function())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def note(out: Path, result: dict[str, Any]) -> None:
    """Write what a stage has found so far, for when its time runs out."""
    about: dict[str, Any] = {"unfinished": True}
    (out / f"{sys.argv[1]}.json").write_text(json.dumps(about | result, indent=1) + "\n")


def overlap(found: Any, best: Any) -> float:
    pairs = zip(found, best, strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


def platform_of() -> str:
    import jax

    return jax.default_backend()


def read(out: Path, stage: str) -> dict[str, Any]:
    """What a stage wrote, or nothing."""
    file = out / f"{stage}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def checkpoint(size: dict[str, Any], out: Path) -> Path:
    """A BERT of these sizes with random weights, which transformers loads too."""
    from safetensors.numpy import save_file

    folder, rng = out / "checkpoint", np.random.default_rng(0)
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(exist_ok=True)
    hidden, wide = size["hidden"], 4 * size["hidden"]
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]
    words = [*special, *WORDS]
    words += [f"[extra{n}]" for n in range((30_522 if hidden > 32 else 100) - len(words))]
    config = dict(
        model_type="bert", vocab_size=len(words), hidden_size=hidden, intermediate_size=wide,
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], hidden_act="gelu",
        max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12, pad_token_id=0,
        initializer_range=0.02, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(words), hidden),
        "embeddings.position_embeddings.weight": (512, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "pooler.dense.weight": (hidden, hidden),
        "pooler.dense.bias": (hidden,),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(size["layers"]):
        name = f"encoder.layer.{layer}."
        norms += [f"{name}attention.output.LayerNorm", f"{name}output.LayerNorm"]
        dense = dict.fromkeys(
            (
                f"{name}attention.{one}"
                for one in ("self.query", "self.key", "self.value", "output.dense")
            ),
            (hidden, hidden),
        )
        dense |= {
            f"{name}intermediate.dense": (wide, hidden),
            f"{name}output.dense": (hidden, wide),
        }
        for one, (rows, columns) in dense.items():
            shapes |= {f"{one}.weight": (rows, columns), f"{one}.bias": (rows,)}
    tensors = {n: rng.normal(0, 0.02, s).astype(np.float32) for n, s in shapes.items()}
    for norm in norms:
        tensors[f"{norm}.weight"] = np.ones(hidden, np.float32)
        tensors[f"{norm}.bias"] = np.zeros(hidden, np.float32)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers", "fast-plaid"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result = STAGES[args.stage](SIZES[args.size], args.out)
    about: dict[str, Any] = {"stage": args.stage, "size": args.size, "versions": versions()}
    if args.stage != "fast-plaid":
        import jax

        about["device"] = jax.devices()[0].device_kind
    about["seconds"] = round(time.perf_counter() - start, 1)
    result = about | result
    (args.out / f"{args.stage}.json").write_text(json.dumps(result, indent=1) + "\n")
    result.pop("results", None)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
