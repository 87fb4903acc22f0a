"""How many programs a server compiles, whatever it is asked: what docs/serving.md says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plaid_reference import random_index

from colbert_jax import ColBERT, Retriever
from colbert_jax.batching import (
    _TOKENS_PER_ACCELERATOR,
    LADDER,
    ladder_length,
    next_power_of_two,
    plan_batches,
)
from colbert_jax.config import SearchConfig, TextConfig
from colbert_jax.search import plaid
from colbert_jax.search.backend import DeviceBackend
from colbert_jax.serving.indexes import ServedIndex
from colbert_jax.serving.limits import Limits
from colbert_jax.serving.work import Search, search_batch

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
LIMITS, TEXT = Limits(), TextConfig()
MODES = ("accurate", "fast")


def stated() -> dict[str, int]:
    """The figures of the page, by the first word of their lines."""
    section = PAGE.read_text().split("## What it compiles")[1].split("\n## ")[0]
    return {name: int(n) for name, n in re.findall(r"^\| (\w+).*\| (\d+) \|$", section, re.M)}


def classes(settings_of) -> set:
    """The sizes of programs of search for every k that a request may ask for."""
    found = set()
    for k in range(1, LIMITS.k + 1):
        ndocs, size, counts = plaid.sizes_of(settings_of(k), k)
        found.add((settings_of(k).ncells, ndocs, size, counts is None))
    return found


def batches(most: int) -> list[int]:
    return sorted({next_power_of_two(n) for n in range(1, most + 1)})


def test_the_page_has_what_the_settings_make():
    sizes = len(batches(LIMITS.batch))
    kinds = sum(len(classes(lambda k, m=mode: SearchConfig().resolve(k, m))) for mode in MODES)
    assert stated()["search"] == sizes * kinds
    lengths = [n for n in LADDER if n <= TEXT.doc_maxlen]
    shapes = set()
    for length in lengths:
        full = min(_TOKENS_PER_ACCELERATOR // length, next_power_of_two(LIMITS.documents))
        shapes |= {(min(size, full), length) for size in batches(full)}
    assert stated()["encoder"] == len(shapes)
    assert stated()["filtered"] == 4 * stated()["search"]


def test_texts_of_random_requests_have_the_shapes_that_are_counted():
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(2000):
        many = 1 << rng.integers(1, 11)
        lengths = rng.integers(
            1, 1 << rng.integers(1, 9), min(rng.integers(1, many + 1), LIMITS.documents)
        )
        lengths = np.minimum(lengths, TEXT.doc_maxlen)
        for batch in plan_batches(lengths, _TOKENS_PER_ACCELERATOR, longest=512):
            shapes.add((batch.size, batch.length))
    assert 50 < len(shapes) <= stated()["encoder"]
    # A query with expansion has the length of one step, which documents have too.
    assert ladder_length(TEXT.query_maxlen) == TEXT.query_maxlen


@pytest.mark.parametrize("name", ["search", "filtered"])
def test_random_searches_share_the_programs_that_are_counted(monkeypatch, name):
    """What is compiled anew is what JAX tells programs apart by: shapes and static arguments."""
    programs = set()

    def recorded(arrays, queries, threshold, *static):
        *static, counts, allowed, given = (*static, None, None, None)[:8]
        programs.add((queries.shape, *static, counts is None, allowed is None, np.shape(given)))
        size = len(queries), static[2]
        return plaid.SearchResult(jnp.zeros(size, jnp.int32), jnp.ones(size), jnp.int32(0))

    monkeypatch.setattr(plaid, "_search_batch", recorded)
    rng = np.random.default_rng(1)
    arrays, _ = random_index(rng, lengths=np.ones(3000, int))
    backend = DeviceBackend(arrays)
    for _ in range(600):
        k = int(rng.integers(1, 10 ** rng.integers(1, 4) + 1))
        queries = rng.normal(size=(rng.integers(1, LIMITS.batch + 1), 32, 16)).astype(np.float32)
        allowed = None
        if name == "filtered":
            allowed = rng.random(3000) < rng.choice([0.9, 0.2, 0.05, 0.01])
            k = min(k, int(allowed.sum()))
        settings = SearchConfig().resolve(k, MODES[rng.integers(2)])
        assert backend.plaid(queries, k, settings, allowed).positions.shape == (len(queries), k)
    assert 0.4 * stated()[name] < len(programs) <= stated()[name]


@pytest.mark.slow
def test_compilations_of_random_requests(shallow_folder, texts, tmp_path, monkeypatch):
    """Of a small server, from its first request to the last."""
    monkeypatch.setenv("COLBERT_JAX_CPU_KERNELS", "0")
    model = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=jax.devices()[:1])
    served = ServedIndex("books", Retriever.build(tmp_path / "i", model, texts[:60]))
    model.encode_ids.clear_cache()
    compiled, rng = [], np.random.default_rng(2)

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    def ask(times):
        for _ in range(times):
            settings = {"k": int(rng.integers(1, 11))}
            asked = [texts[i][:40] for i in rng.integers(0, 60, rng.integers(1, 5))]
            for found in search_batch([Search(served, query, settings) for query in asked]):
                assert not isinstance(found, Exception)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        ask(40)
        first = len(compiled)
        ask(40)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # Batches of 1, 2 and 4 queries: each is encoded and searched; and what is no program of
    # either, such as placing the index.
    assert 6 <= first <= 10
    assert len(compiled) == first
