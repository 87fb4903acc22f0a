"""One of two processes; `test_two_processes.py` starts it and reads what it leaves.

The Python blocks of docs/distributed.md start the job, build an index, search it; then faults are
brought about in process 1, and what both processes see is written to `report.N.json`.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)

import numpy as np  # noqa: E402

from colbert_jax import processes  # noqa: E402
from colbert_jax.checkpoints import hub  # noqa: E402
from colbert_jax.compression.sharding import data_mesh  # noqa: E402
from colbert_jax.config import IndexConfig  # noqa: E402
from colbert_jax.index import build, sources  # noqa: E402
from colbert_jax.index import folder as index_folder  # noqa: E402
from colbert_jax.runtime import enable_compilation_cache  # noqa: E402
from colbert_jax.training import Task, loader, trainer  # noqa: E402
from colbert_jax.training.run import Metrics  # noqa: E402

report: dict = {}


@contextlib.contextmanager
def failing(name: str, function):
    """`build.name` replaced in process 1."""
    original = getattr(build, name)
    if jax.process_index() == 1:
        setattr(build, name, function)
    yield original
    setattr(build, name, original)


def run(name: str, data: dict, path: str | None = None, **changes) -> str:
    """Build from arrays; the error, if there is one."""
    try:
        build.build_index(
            Path(path or name).resolve(),
            lambda: sources.EmbeddingSource(**data),
            IndexConfig(**changes),
            mesh=data_mesh(jax.devices()),
        )
    except Exception as error:
        return repr(error)
    return ""


def fail(*args, **kwargs):
    raise OSError("no space left")


class Terminated(Exception):
    pass


def end(*_):
    raise Terminated


def train(names: dict, folder: str, stop: int | None = None) -> str:
    """Train as the guide does, without dropout, and with a task that has a coupled teacher; process
    1 gets SIGTERM after `stop` steps."""
    signal.signal(signal.SIGTERM, end)
    write = Metrics.write

    def stopping(self, step, values):
        write(self, step, values)
        if step == stop and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Metrics.write = stopping
    changes = dict(dropout=0.0, log_every=1, length_groups=1, maxsteps=12)
    config = dataclasses.replace(names["config"], **changes)
    model, teacher = map(names["ColBERT"].from_pretrained, ("checkpoint", "teacher"))
    settings = dict(loss="contrastive", use_ib_negatives=False, coupled_weight=0.5)
    task = Task("coupled", names["examples"], 0.25, settings)
    try:
        trained = trainer.train(
            model, names["examples"], folder, config, tasks=[task], teacher=teacher
        )
    except Terminated:
        return "terminated"
    finally:
        Metrics.write = write
    return str(trained.step)


def main() -> None:
    enable_compilation_cache()
    # The guide's hub id.
    hub.resolve = lambda name, **kwargs: Path(name if Path(name).is_dir() else "checkpoint")
    processes._POLL, index_folder._VISIBLE = 0.2, 1.0
    sources.CHUNK_TOKENS, loader._LADDER = 256, (48, 512)
    guide = (ROOT / "docs" / "distributed.md").read_text("utf-8")
    names: dict = {}
    for snippet in re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
        exec(compile(snippet, "docs/distributed.md", "exec"), names)
    me = jax.process_index()
    report["guide"] = [len(names["index"]), names["index"].texts[3]]
    report["hits"] = [part.tolist() for part in names["hits"]]

    report["stopped"] = train(names, "runs/stopped", stop=1)
    report["resumed run"] = train(names, "runs/stopped")

    values = np.load("values.npy", mmap_mode="r")
    data = {"values": values, "lengths": np.load("lengths.npy")}
    report["plain"] = run("plain", data, learned_dim=8)

    calls = []

    def second_chunk_fails(*args):
        calls.append(len(args[1]))
        return fail() if len(calls) == 2 else compress(*args)

    with failing("compress", second_chunk_fails) as compress:
        report["failed"] = run("resumed", data)
    state = json.loads(Path("resumed.building", "build.1.json" if me else "build.json").read_text())
    report["committed"] = state.get("documents", 0)
    report["resumed"] = run("resumed", data)

    with failing("train_kmeans", fail):
        report["k-means"] = run("resumed-k-means", data)
    bad = data | {"values": data["values"].copy()}
    if me == 1:
        bad["values"][-1] *= 2
    report["bad row"] = run("bad", bad)
    report["left behind"] = index_folder.building_folder(Path("bad").resolve()).exists()
    report["other settings"] = run("other", data, seed=me)
    report["not shared"] = run("apart", data, path=f"apart-{me}/index")
    report["taken"] = run("plain", data)

    Path(f"report.{me}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
