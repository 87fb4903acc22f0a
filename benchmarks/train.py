"""Distillation steps beside a plain torch loop of the same step, on the same machine.

    python benchmarks/train.py DATA --checkpoint CHECKPOINT [--bsize 4] [--nway 16] [--steps 6] \
        [--doc-maxlen 180] [--device cpu] [--backbone bert-base --layers 2] \
        [--output benchmarks/results/train_cpu.json]

DATA holds `examples_64way.jsonl`, `queries.tsv` and `collection.tsv.gz` (or .tsv). The torch loop
is what Stanford's and PyLate's trainers do in a step: tokens padded to the longest document of the
batch, scaled-dot-product attention, einsum and maximum, KL divergence and in-batch negatives,
AdamW. `torch_groups` is the same with our groups of documents by length, each padded to its own
longest. All take the same examples in turn in one process that keeps freed memory, as our trainer
does; dropout 0.1, float32 on a CPU and bfloat16 (torch: autocast) on a GPU. Neither tokenising nor
compiling is timed. Reported are the medians over steps of queries a second, and the memory that
scoring takes beyond its inputs. With `--backbone` the checkpoint gives the tokenizer only: weights
are random, in the published widths.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from colbert_jax import ColBERT
from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import stanford_examples
from colbert_jax.runtime import compute_dtype, enable_compilation_cache, memory_kept
from colbert_jax.scoring.gradient import all_pairs_scores
from colbert_jax.scoring.maxsim import maxsim_all_pairs
from colbert_jax.training.batch import ExampleBatch, TokenBatch
from colbert_jax.training.loader import Loader
from colbert_jax.training.step import init_state, make_gradients, make_update, parameter_sharding

# By what backbones.py calls each, and what is dropped in training where a configuration has none.
BACKBONES: dict[str, tuple[str, dict[str, float]]] = {
    "bert-base": ("bert-base", {}),
    "modernbert-base": (
        "GTE-ModernColBERT-v1",
        {"embedding_dropout": 0.1, "attention_dropout": 0.1, "mlp_dropout": 0.1},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", required=True, help="a plain BERT encoder")
    parser.add_argument("--bsize", type=int, default=4)
    parser.add_argument("--nway", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--doc-maxlen", type=int, default=180)
    parser.add_argument("--length-groups", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--backbone", choices=sorted(BACKBONES), help="with random weights")
    parser.add_argument("--layers", type=int, help="of the backbone; if None, as published")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    enable_compilation_cache()
    model: Any = ColBERT.from_pretrained(args.checkpoint, dim=128, doc_maxlen=args.doc_maxlen)
    collection = next(args.data.glob("collection.tsv*"))
    source = stanford_examples(
        args.data / "examples_64way.jsonl", args.data / "queries.tsv", collection, nway=args.nway
    )
    config = TrainingConfig(
        nway=args.nway, bsize=args.bsize, warmup=None, length_groups=args.length_groups,
        normalize_teacher=True, dtype=None if args.device == "gpu" else "float32",
    )  # fmt: skip
    if args.backbone:
        model = random_model(model, args.backbone, args.layers)
    ours, theirs = Ours(model, source, config), Torch(args.checkpoint, model, config, args.device)
    loader = Loader(
        source, model.tokenizer, bsize=config.batch_size, seed=config.seed, length_groups=1
    )
    sides = {"colbert_jax": ours.step, "torch": theirs.step, "torch_groups": theirs.step}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    with memory_kept(), loader:
        for number, step in zip(range(args.steps + 1), loader, strict=False):
            grouped = ours.prepare(number)
            for name, run in sides.items():
                batch = step.batches[0] if name == "torch" else grouped
                start, processor_start = time.perf_counter(), time.process_time()
                run(number, batch)
                if number:
                    seconds[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - processor_start)
    rates = {n: args.bsize / statistics.median(s) for n, s in seconds.items()}
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "versions": {n: version(n) for n in ("jax", "flax", "torch", "transformers")},
        "command": "python benchmarks/train.py DATA --checkpoint CHECKPOINT "
        f"--bsize {args.bsize} --nway {args.nway} --steps {args.steps} "
        f"--doc-maxlen {args.doc_maxlen} --length-groups {args.length_groups} "
        f"--device {args.device}"
        + (f" --backbone {args.backbone}" if args.backbone else "")
        + (f" --layers {args.layers}" if args.layers else ""),
        "queries_per_second": rates,
        "ratio": rates["colbert_jax"] / rates["torch"],
        "ratio_to_groups": rates["colbert_jax"] / rates["torch_groups"],
        "seconds": seconds,
        "processor_seconds": processor,
        "scoring_memory_mb": scoring_memory(args.bsize, args.nway, args.doc_maxlen),
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


class Ours:
    """The library's step, from texts on: its loader, gradients and update."""

    def __init__(self, model: Any, source: Any, config: TrainingConfig):
        dtype = compute_dtype() if config.dtype is None else config.dtype
        self._source, self._config, self._tokenizer = source, config, model.tokenizer
        self._batch: Any = None
        self._compiled: set[Any] = set()
        mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        shapes = jax.eval_shape(lambda params: init_state(config, params), model.params)
        shardings = parameter_sharding(mesh, shapes, fsdp=config.fsdp)
        state = init_state(config, jax.tree.map(np.asarray, model.params))
        self._state: dict[str, Any] = jax.device_put(state, shardings)
        self._gradients = make_gradients(
            model.encoder_config, config, dtype, mesh, shardings["params"]
        )
        self._update = make_update(config, shardings)

    def prepare(self, number: int) -> ExampleBatch:
        """The batch of a step, and the program for its lengths: a long run has them all."""
        config = self._config
        with Loader(
            self._source, self._tokenizer, bsize=config.batch_size, seed=config.seed, start=number,
            length_groups=config.length_groups, devices=jax.device_count(),
        ) as loader:  # fmt: skip
            batch = next(iter(loader)).batches[0]
        self._batch = jax.device_put(batch, self._rows)
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            self._compiled.add(shapes)
            jax.block_until_ready(self._backward(number))
        return batch

    def _backward(self, number: int) -> Any:
        params, trained = self._state["params"], ("backbone", "head")
        return self._gradients(params, self._batch, np.int32(number), np.int32(0), trained=trained)

    def step(self, number: int, _: ExampleBatch) -> None:
        gradients, logged = self._backward(number)
        self._state = self._update(self._state, gradients)[0]
        jax.block_until_ready((self._state, logged))


class Torch:
    """The same step in torch, from token ids on."""

    def __init__(self, checkpoint: str, model: Any, config: TrainingConfig, device: str):
        import torch
        from transformers import AutoConfig, AutoModel

        self._torch, self._config = torch, config
        self._device = torch.device("cuda" if device == "gpu" else "cpu")
        fields = getattr(model, "fields", None)
        if fields is None:
            backbone = AutoModel.from_pretrained(checkpoint)
        else:
            backbone = AutoModel.from_config(AutoConfig.for_model(**fields))
        self._backbone = backbone.to(self._device).train()
        kernel = np.asarray(model.params["head"][0]["linear"]["kernel"])
        self._linear = torch.nn.Linear(kernel.shape[0], kernel.shape[1], bias=False).to(
            self._device
        )
        self._parameters = [*self._backbone.parameters(), *self._linear.parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.lr, weight_decay=0.0)

    def _encode(self, rows: TokenBatch) -> Any:
        torch = self._torch
        length = int(rows.attended.max())  # torch has no shapes to keep
        ids = torch.from_numpy(rows.ids[:, :length]).long().to(self._device)
        attended = torch.from_numpy(rows.attended)[:, None].to(self._device)
        mask = torch.arange(length, device=self._device) < attended
        x = self._linear(self._backbone(ids, attention_mask=mask.long()).last_hidden_state)
        kept = torch.from_numpy(rows.kept[:, :length]).to(self._device)
        return torch.nn.functional.normalize(x * kept[..., None], dim=-1), kept

    def _padded(self, x: Any, length: int) -> Any:
        shape = (x.shape[0], length - x.shape[1], *x.shape[2:])
        return self._torch.cat([x, x.new_zeros(shape)], dim=1)

    def step(self, number: int, batch: ExampleBatch) -> None:
        torch, config = self._torch, self._config
        bf16 = self._device.type == "cuda"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bf16):
            queries, _ = self._encode(batch.queries)
            parts, masks = zip(*map(self._encode, batch.documents), strict=True)
        longest = max(x.shape[1] for x in parts)
        documents, kept = (
            torch.cat([self._padded(x, longest) for x in group]) for group in (parts, masks)
        )
        order = torch.from_numpy(batch.order.astype(np.int64)).to(self._device)
        documents, kept = documents[order].float(), kept[order]
        similarity = torch.einsum("qid,njd->qnij", queries.float(), documents)
        similarity = similarity.masked_fill(~kept[None, :, None], -9999.0)
        pairs = similarity.max(-1).values.sum(-1)
        b, ways = pairs.shape[0], config.nway or 1
        own = torch.stack([pairs[i, i * ways : (i + 1) * ways] for i in range(b)])
        teacher = torch.from_numpy(batch.scores).to(self._device)
        low, high = teacher.amin(1, keepdim=True), teacher.amax(1, keepdim=True)
        target = torch.log_softmax((teacher - low) / (high - low).clamp_min(1e-9), -1)
        loss = torch.nn.functional.kl_div(
            torch.log_softmax(own, -1), target, reduction="batchmean", log_target=True
        )
        rows = []
        for i in range(b):
            rest = [n for n in range(b * ways) if n // ways != i]
            rows.append(pairs[i, [i * ways, *rest]])
        label = torch.zeros(b, dtype=torch.long, device=self._device)
        loss = loss + torch.nn.functional.cross_entropy(torch.stack(rows), label)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm)
        self._optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def random_model(tokens: ColBERT, name: str, layers: int | None) -> SimpleNamespace:
    """What both sides take of a model: a published width with random weights."""
    from backbones import encoder_of, fields_of, random_params

    published, dropout = BACKBONES[name]
    vocabulary = tokens.encoder_config.backbone.vocab_size
    fields = fields_of(published, layers) | dropout | {"vocab_size": vocabulary}
    encoder = encoder_of(fields)
    return SimpleNamespace(
        tokenizer=tokens.tokenizer,
        encoder_config=encoder,
        params=random_params(encoder),
        fields=fields,
    )


def scoring_memory(bsize: int, nway: int, length: int) -> dict[str, float]:
    """MB that a scoring's forward and backward pass take beyond inputs and outputs, as compiled:
    with the gradient of `scoring.gradient`, and with XLA's own of the plain definition."""
    shapes = [
        jax.ShapeDtypeStruct((bsize, 32, 128), jnp.float32),
        jax.ShapeDtypeStruct((bsize * nway, length, 128), jnp.float32),
        jax.ShapeDtypeStruct((bsize * nway, length), jnp.bool_),
    ]
    out = {}
    for name, score in (("colbert_jax", all_pairs_scores), ("plain", maxsim_all_pairs)):

        def loss(queries, documents, mask, score=score):
            return jax.nn.logsumexp(score(queries, documents, mask), axis=1).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        analysis: Any = compiled.memory_analysis()
        out[name] = analysis.temp_size_in_bytes / 1e6
    return out


if __name__ == "__main__":
    main()
