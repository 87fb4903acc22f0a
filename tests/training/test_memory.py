"""What does not fit into memory is refused before a step; what is named instead fits."""

import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import support

from colbert_jax import ColBERT
from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import pair_examples
from colbert_jax.training import memory
from colbert_jax.training.memory import available_memory, free_memory, resized
from colbert_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_length")
SETTINGS = TrainingConfig(
    loss="contrastive", nway=1, use_ib_negatives=False, bsize=256, warmup=None, maxsteps=1
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "p.jsonl"
    rows = [{"query": f"heat {i}", "positive": f"metals of {i} rivers"} for i in range(64)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pair_examples(file)


@pytest.fixture
def learn(shallow_folder, source, tmp_path, monkeypatch):
    """Train where so much memory is free; returns what the first steps took at most."""

    def run(free, name, devices=1, doc_maxlen=48, **changes):
        taken, measure = [], memory.step_memory

        def measuring(*args, **settings):
            taken.append(measure(*args, **settings))
            return taken[-1]

        monkeypatch.setattr(memory, "available_memory", lambda: free)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "step_memory", measuring)
            model = ColBERT.from_pretrained(
                shallow_folder, dtype="float32", devices=jax.devices()[:1], doc_maxlen=doc_maxlen
            )
            config = dataclasses.replace(SETTINGS, **changes)
            train(model, source, tmp_path / name, config, devices=jax.devices()[:devices])
        return max(taken, default=0)

    return run


@pytest.mark.skipif(not os.environ.get("COLBERT_JAX_LONG"), reason=support.LONG)
@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_named_fits(devices, learn, tmp_path, eight_devices):
    least = learn(1 << 40, "small", devices, bsize=64)
    free = int(1.2 * least)
    with pytest.raises(ValueError, match="a step of bsize 256 takes about") as refused:
        learn(free, "large", devices)
    assert (
        not list((tmp_path / "large").glob("metrics.jsonl"))
        or not (tmp_path / "large" / "metrics.jsonl").read_text()
    )
    message = str(refused.value)
    found = re.search(
        r": bsize (\d+) fits, and this one does with chunk (\d+), which changes nothing else or "
        r"accumsteps (\d+)$",
        message,
    )
    assert found, message
    bsize, chunk, accumsteps = map(int, found.groups())
    assert 64 <= bsize < 128 and accumsteps == 4 and bsize % devices == 0
    for number, changes in enumerate(
        ({"bsize": bsize}, {"chunk": chunk}, {"accumsteps": accumsteps})
    ):
        assert learn(free, f"named{number}", devices, **changes) <= free


@pytest.mark.usefixtures("shared_programs")
def test_longer_texts_may_come(learn):
    """The first batch is refused only by what it takes; a longer one is warned of."""
    short = learn(1 << 40, "short", bsize=16, maxsteps=2)
    assert learn(short * 5, "longest", bsize=16) == short  # all are as long as any can be
    with pytest.warns(UserWarning, match="documents of 96 tokens would take") as warned:
        learn(short * 1.2, "warned", bsize=16, doc_maxlen=96)
    assert len(warned) == 1 and Path(warned[0].filename).name == Path(__file__).name
    assert learn(short * 30, "room", bsize=16, doc_maxlen=96) == short
    with pytest.raises(ValueError, match=r"a step of bsize 16 takes") as refused:
        learn(short * 0.99, "refused", bsize=16, doc_maxlen=96)
    named = int(re.search(r": bsize (\d+) fits", str(refused.value))[1])
    assert named < 16
    assert learn(short * 0.99, "named", bsize=named, doc_maxlen=96) <= short * 0.9


LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


def test_it_compiles_nothing_more(learn):
    """The step finds the program that was asked, and runs that were warned of nothing ask no other.

    Lowered and compiled, be it with the help of the cache on the disk."""
    counts = []
    for free in (1 << 40, None):
        lowered = Counter()

        def count(event, *_, lowered=lowered, **__):
            lowered[event] += 1

        jax.clear_caches()
        jax.monitoring.register_event_duration_secs_listener(count)
        try:
            learn(free, f"run{free}", bsize=8, doc_maxlen=96, maxsteps=3)
        finally:
            jax.monitoring.unregister_event_duration_listener(count)
        # Not traces, one of which is another's, nor hits of the cache.
        counts.append({event: lowered[event] for event in (LOWERED, COMPILED)})
    assert counts[0] == counts[1] and min(counts[0].values()) > 2


def test_nothing_fits(learn):
    with pytest.raises(ValueError, match=r"and 0 MB of memory are free: not even bsize 2 fits$"):
        learn(10_000, "run", bsize=4, accumsteps=2)


def test_nobody_says_what_is_free(learn, source, shallow_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    monkeypatch.setattr(memory, "step_memory", None)  # is not asked
    model = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=jax.devices()[:1])
    config = dataclasses.replace(SETTINGS, bsize=8)
    train(model, source, tmp_path / "run", config, devices=jax.devices()[:1])


def test_the_largest_size_is_found():
    """Of sizes that take a part that is fixed, a linear and a square one."""
    for free in (150, 500, 2_000, 9_000):
        for multiple in (1, 8):

            def needed(n):
                return 100 + 10 * n + n * n // 100

            found = memory._largest(1024, multiple, free, needed)
            wanted = max((n for n in range(0, 1024, multiple) if needed(n) <= free), default=0)
            assert found % multiple == 0 and found <= wanted
            assert found >= 0.6 * wanted - multiple
    assert memory._largest(1024, 8, 90, lambda n: 100 + n) == 0


def test_what_the_system_says(tmp_path, monkeypatch):
    """Linux's files; the least of what they leave counts."""

    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    monkeypatch.setattr(memory, "_address_limit", lambda: None)
    assert available_memory(tmp_path) is None
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert available_memory(tmp_path) == 5000 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", "700000\n")
    assert available_memory(tmp_path) == 5000 * 1024
    write("sys/fs/cgroup/memory.max", "1000000\n")
    write("sys/fs/cgroup/memory.stat", "anon 5\ninactive_file 50000\n")
    assert available_memory(tmp_path) == 350_000
    (tmp_path / "sys/fs/cgroup/memory.max").unlink()
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "900000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "700000\n")
    assert available_memory(tmp_path) == 200_000
    write("proc/self/statm", "10 5 3\n")
    monkeypatch.setattr(memory, "_address_limit", lambda: 10 * memory._page() + 1234)
    assert available_memory(tmp_path) == 1234
    monkeypatch.undo()
    here = available_memory()
    assert here is None or here > 1 << 20


def test_what_devices_say():
    def device(**stats):
        return SimpleNamespace(platform="gpu", process_index=0, memory_stats=lambda: stats or None)

    one, two = (device(bytes_limit=100, bytes_in_use=n) for n in (30, 60))
    other = SimpleNamespace(platform="gpu", process_index=1)
    assert free_memory([one, two, other]) == 40
    assert free_memory([device()]) is None


def test_shapes_of_another_size(eight_devices):
    """Groups are those that the loader makes of so many rows on so many devices."""
    mesh = jax.make_mesh((2,), ("data",), devices=eight_devices[:2])
    rows = jax.NamedSharding(mesh, jax.P("data"))

    def shapes(batch):
        return [x.shape for x in jax.tree.leaves(batch)]

    def tokens(n, length):
        return memory.TokenBatch(
            np.zeros((n, length), np.int32), np.zeros(n, np.int32), np.zeros((n, length), bool)
        )

    batch = jax.device_put(
        memory.ExampleBatch(
            tokens(16, 16), (tokens(32, 48), tokens(32, 32)), np.zeros(64, np.int32), None
        ),
        rows,
    )
    assert shapes(resized(batch, 16, (16, 48))) == [
        *((16, 16), (16,), (16, 16)),
        *((32, 48), (32,), (32, 48), (32, 48), (32,), (32, 48)),
        (64,),
    ]
    half = resized(batch, 8, (20, 64))
    assert [group.ids.shape for group in half.documents] == [(16, 64), (16, 64)]
    assert half.queries.kept.shape == (8, 20)
    assert half.queries.ids.sharding == rows
    batch = batch._replace(documents=batch.documents + (batch.documents[1],))
    assert [group.ids.shape for group in resized(batch, 8, (16, 48)).documents] == [(16, 48)] * 2
    few = resized(batch, 4, (16, 48))  # less than eight rows of a group on a device
    assert [group.ids.shape for group in few.documents] == [(16, 48)]
