"""Time and memory of loading a checkpoint: ours beside torch's, each in a process of its own.

    python benchmarks/load.py FOLDER [--repeat 5] [--output FILE]

FOLDER is a checkpoint that `transformers.AutoModel` loads as well, such as a Stanford ColBERT or a
plain BERT folder. transformers maps the file and reads a weight when it is first used, so torch is
timed twice: until the model is there, and until every weight has been read once. Ours is timed with
the tokenizer, until the weights are on the device. Imports and the start of the runtimes are left
out of the time; memory is the growth of the peak resident size. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("colbert_jax", "torch")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load_colbert_jax(folder: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from colbert_jax import ColBERT

    jax.devices()
    before, start = peak_mb(), time.perf_counter()
    model = ColBERT.from_pretrained(folder, dtype=jnp.dtype("float32"), devices=jax.devices()[:1])
    jax.block_until_ready(model.params)
    return {"seconds": time.perf_counter() - start, "memory_mb": peak_mb() - before}


def load_torch(folder: str) -> dict[str, float]:
    import torch
    from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer

    model_class: Any = MODEL_MAPPING[type(AutoConfig.from_pretrained(folder))]
    AutoTokenizer.from_pretrained(folder)  # what both import
    before, start = peak_mb(), time.perf_counter()
    model = model_class.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        sum(float(parameter.sum()) for parameter in model.parameters())
    return {
        "seconds": seconds,
        "seconds_read": time.perf_counter() - start,
        "memory_mb": peak_mb() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", help="write the table as JSON")
    parser.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        print(json.dumps(globals()[f"load_{args.library}"](args.folder)))
        return
    runs: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for _ in range(args.repeat + 1):  # the first of each warms the disk's cache
        for library in LIBRARIES:
            command = [sys.executable, __file__, args.folder, "--library", library]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{library}: {done.stderr.strip().splitlines()[-1]}")
            runs[library].append(json.loads(done.stdout.strip().splitlines()[-1]))
    size = sum(f.stat().st_size for f in Path(args.folder).iterdir() if f.is_file()) / 2**20
    table = {
        library: {
            name: round(statistics.median(run[name] for run in found[1:]), 3) for name in found[0]
        }
        for library, found in runs.items()
    }
    ours, theirs = table["colbert_jax"], table["torch"]
    print(f"weights {size:.0f} MB, medians of {args.repeat}")
    for library, row in table.items():
        print(f"{library:12}", "  ".join(f"{name} {value}" for name, value in row.items()))
    print(
        f"time: {ours['seconds'] / theirs['seconds']:.2f} x torch's lazy loading, "
        f"{ours['seconds'] / theirs['seconds_read']:.2f} x torch's with every weight read; "
        f"memory: {ours['memory_mb'] / size:.2f} x the file"
    )
    if args.output:
        about = {
            "command": f"python benchmarks/load.py FOLDER --repeat {args.repeat}",
            "machine": f"{platform.machine()}, {platform.system()}",
            "versions": {name: version(name) for name in ("jax", "flax", "torch", "transformers")},
            "weights_mb": round(size),
        }
        Path(args.output).write_text(json.dumps(about | {"medians": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
