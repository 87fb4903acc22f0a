"""Every backbone at its published widths: speed beside torch's, and memory of a long document.

    python benchmarks/backbones.py [NAME ...] [--layers 4] [--rounds 5] [--output FILE]
    python benchmarks/backbones.py [NAME ...] --memory [--tokens 8192] [--output FILE]

Weights are random, of the widths that a model's published configuration has; of its layers only
the first --layers, which is said in the result, and a small vocabulary: neither changes how the
libraries compare. The first form encodes 32 texts of 180 tokens in float32 with this library and
with transformers' model of the same weights (its default attention), in turns within one process,
and reports the medians of --rounds, wall and CPU time, and the largest difference of a unit-length
embedding. The second runs each in a process of its own and reports how far its memory rises above
that of the loaded weights while one document of --tokens is encoded, compilation included. Needs
torch and transformers for the first. Models that transformers has as causal ones only are run as
these there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from encode import machine

TEXTS, TOKENS, WIDTH, VOCABULARY = 32, 180, 128, 1000

LARGE = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24)
BASE = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
# What the published configurations say of the architecture, beside the vocabulary.
PUBLISHED: dict[str, dict[str, Any]] = {
    "bert-base": BASE | dict(model_type="bert", max_position_embeddings=512),
    "GTE-ModernColBERT-v1": BASE
    | dict(
        model_type="modernbert",
        max_position_embeddings=8192,
        intermediate_size=1152,
        num_hidden_layers=22,
        pad_token_id=0,
    ),
    "bge-m3": LARGE
    | dict(model_type="xlm-roberta", max_position_embeddings=8194, type_vocab_size=1),
    "jina-colbert-v2": LARGE
    | dict(model_type="jina_embeddings_v3", max_position_embeddings=8194, rope_theta=10_000.0),
    "LFM2-ColBERT-350M": LARGE
    | dict(
        model_type="lfm2",
        max_position_embeddings=128_000,
        intermediate_size=6656,
        num_key_value_heads=8,
        num_hidden_layers=16,
        layer_types=["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
    ),
    "pplx-embed-v1-late-0.6b": LARGE
    | dict(
        model_type="qwen3",
        max_position_embeddings=32_768,
        intermediate_size=3072,
        num_key_value_heads=8,
        head_dim=128,
        num_hidden_layers=28,
        rope_theta=1_000_000.0,
    ),
    "EuroBERT-210m": BASE
    | dict(model_type="eurobert", max_position_embeddings=8192, pad_token_id=0),
    "colbert-xm": BASE
    | dict(
        model_type="xmod",
        max_position_embeddings=514,
        type_vocab_size=1,
        languages=["en_XX"],
        default_language="en_XX",
    ),
    "gte-multilingual-base": BASE | dict(model_type="gte", max_position_embeddings=8192),
    "nomic-embed-text-v1.5": BASE | dict(model_type="nomic_bert", max_position_embeddings=8192),
}


def fields_of(name: str, layers: int | None) -> dict[str, Any]:
    """The configuration of the first layers; LFM2's from its second on, which has both kinds."""
    fields = PUBLISHED[name] | {"vocab_size": VOCABULARY}
    if layers is not None and layers < fields["num_hidden_layers"]:
        fields["num_hidden_layers"] = layers
        if "layer_types" in fields:
            fields["layer_types"] = fields["layer_types"][1 : layers + 1]
    return fields


def encoder_of(fields: dict[str, Any]) -> Any:
    from colbert_jax.models.backbones import config_from_huggingface
    from colbert_jax.models.colbert import EncoderConfig

    return EncoderConfig.projecting(config_from_huggingface(fields), WIDTH)


def random_params(encoder: Any) -> dict:
    """Parameters of the encoder, normalisations at 1."""
    from colbert_jax.checkpoints.common import set_path
    from colbert_jax.models.colbert import param_shapes

    params: dict = {}
    rng = np.random.default_rng(0)
    for path, shape in param_shapes(encoder).items():
        array = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        set_path(params, path, array + (path[-1] == "scale"))
    return params


def ours(encoder: Any, params: dict) -> Callable[[np.ndarray], np.ndarray]:
    """Texts' ids int32[N, L] to embeddings [N, L, D], in the batches of `ColBERT`."""
    import jax.numpy as jnp

    from colbert_jax.batching import Batch, BatchRunner, pad_rows
    from colbert_jax.models.colbert import make_encoder

    runner = BatchRunner(None, encoder.backbone.max_length)
    placed = runner.put(params)

    def forward(params, *batch):
        return make_encoder(encoder, params, dtype=jnp.float32)(*batch)

    program = runner.program(forward, 3)

    def encode(ids: np.ndarray) -> np.ndarray:
        out = np.empty((*ids.shape, WIDTH), np.float32)
        length = ids.shape[1]

        def run(batch: Batch) -> None:
            rows = pad_rows([ids[i] for i in batch.rows], batch.size, batch.length, 0)
            count = np.zeros(batch.size, np.int32)
            count[: len(batch.rows)] = length
            kept = np.arange(batch.length) < count[:, None]
            found = runner.run(program, placed, rows, count, kept)
            for i, row in zip(batch.rows, found, strict=False):
                out[i] = row[:length]

        runner.for_each(np.full(len(ids), length), run)
        return out

    return encode


def theirs(encoder: Any, params: dict) -> Callable[[Any], np.ndarray]:
    """The same by torch, in one batch."""
    import torch
    import transformers

    from colbert_jax.checkpoints.common import backbone_paths, tensors_of
    from colbert_jax.models.backbones import to_huggingface

    config = transformers.AutoConfig.for_model(**to_huggingface(encoder.backbone))
    config.use_cache = False  # what language models keep for the next token
    model = transformers.AutoModel.from_config(config).eval()
    tensors = tensors_of(params, backbone_paths(encoder.backbone, ""))
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    absent = set(state) - set(model.state_dict())
    if absent:
        sys.exit(f"transformers' model has no {', '.join(sorted(absent)[:3])}")
    model.load_state_dict(state, strict=False)
    kernel = torch.from_numpy(params["head"][0]["linear"]["kernel"])

    def encode(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            inputs = torch.from_numpy(ids).long()
            hidden = model(inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state
            return torch.nn.functional.normalize(hidden @ kernel, dim=-1).numpy()

    return encode


def speed(name: str, layers: int, rounds: int) -> dict[str, Any]:
    """Both in turns."""
    fields = fields_of(name, layers)
    encoder = encoder_of(fields)
    params = random_params(encoder)
    ids = np.random.default_rng(1).integers(5, VOCABULARY, (TEXTS, TOKENS), dtype=np.int32)
    libraries = {"colbert_jax": ours(encoder, params), "torch": theirs(encoder, params)}
    found = {library: encode(ids) for library, encode in libraries.items()}
    wall: dict[str, list[float]] = {library: [] for library in libraries}
    cpu: dict[str, list[float]] = {library: [] for library in libraries}
    for _ in range(rounds):
        for library, encode in libraries.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            encode(ids)
            wall[library].append(time.perf_counter() - start)
            cpu[library].append(time.process_time() - cpu_start)
    medians = {library: statistics.median(values) for library, values in wall.items()}
    return {
        "layers": fields["num_hidden_layers"],
        "of_layers": PUBLISHED[name]["num_hidden_layers"],
        "texts_per_second": {library: round(TEXTS / s, 2) for library, s in medians.items()},
        "cpu_seconds": {library: round(statistics.median(s), 2) for library, s in cpu.items()},
        "ours_over_torch": round(medians["torch"] / medians["colbert_jax"], 2),
        "largest_difference": float(np.abs(found["colbert_jax"] - found["torch"]).max()),
    }


def memory(name: str, layers: int, tokens: int) -> dict[str, Any]:
    """How far memory rises above that of the loaded weights; in this process."""
    fields = fields_of(name, layers)
    encoder = encoder_of(fields)
    params = random_params(encoder)
    weights = sum(array.nbytes for array in _leaves(params))
    encode = ours(encoder, params)
    ids = np.random.default_rng(1).integers(5, VOCABULARY, (1, tokens), dtype=np.int32)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # so that the peak is that of what follows
    start = time.perf_counter()
    encode(ids)
    return {
        "layers": fields["num_hidden_layers"],
        "of_layers": PUBLISHED[name]["num_hidden_layers"],
        "tokens": tokens,
        "weights_mb": round(weights / 1e6),
        "rise_mb": round((_status("VmHWM") - before) / 1e6),
        "seconds_with_compilation": round(time.perf_counter() - start, 1),
    }


def _leaves(tree: dict) -> list[np.ndarray]:
    import jax

    return jax.tree.leaves(tree)


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(found.split()[1]) * 1024


def start(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, name, "--worker", "--layers", str(args.layers)]
    command += ["--rounds", str(args.rounds), "--tokens", str(args.tokens)]
    command += ["--memory"] * args.memory
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{name}:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(table: dict[str, dict[str, Any]], of_memory: bool) -> str:
    """A table in Markdown."""
    if of_memory:
        lines = ["| | layers | weights, MB | rise, MB |", "|---|---|---|---|"]
        cells = [
            (name, f"{row['layers']} of {row['of_layers']}", row["weights_mb"], row["rise_mb"])
            for name, row in table.items()
        ]
    else:
        lines = ["| | layers | ours, texts/s | torch, texts/s | ours / torch |", "|---" * 5 + "|"]
        cells = [
            (
                name,
                f"{row['layers']} of {row['of_layers']}",
                *row["texts_per_second"].values(),
                row["ours_over_torch"],
            )
            for name, row in table.items()
        ]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in cells)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*PUBLISHED, []], metavar="NAME")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        (name,) = args.names
        if args.memory:
            print(json.dumps(memory(name, args.layers, args.tokens)))
        else:
            print(json.dumps(speed(name, args.layers, args.rounds)))
        return
    table: dict[str, dict[str, Any]] = {}
    for name in args.names or PUBLISHED:
        if args.memory and PUBLISHED[name]["max_position_embeddings"] < args.tokens:
            continue
        table[name] = start(name, args)
        print(f"{name}: {table[name]}", file=sys.stderr, flush=True)
    print(report(table, args.memory))
    if args.output:
        packages = ("jax", "jaxlib", "flax", "torch", "transformers")
        about = {
            "command": " ".join(["python benchmarks/backbones.py", *args.names])
            + (f" --memory --tokens {args.tokens}" if args.memory else f" --rounds {args.rounds}")
            + f" --layers {args.layers}",
            "machine": machine(),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in packages},
            "models": table,
        }
        args.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
