"""What is a positive of a query is never a negative of it: in a batch, a source, over devices."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import jax
import numpy as np
import pytest
from coordination import Service
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from colbert_jax import ColBERT, processes
from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.config import TextConfig, TrainingConfig
from colbert_jax.data.examples import Check, concatenate, pair_examples, stanford_examples
from colbert_jax.processes import Group
from colbert_jax.text import TextTokenizer
from colbert_jax.training.batch import Passages
from colbert_jax.training.loader import Loader
from colbert_jax.training.step import no_negatives, score_loss
from colbert_jax.training.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]

B, W = 8, 3
SETTINGS = TrainingConfig(
    loss="contrastive",
    nway=1,
    use_ib_negatives=False,
    bsize=4,
    lr=1e-3,
    warmup=None,
    maxsteps=6,
    log_every=1,
    dropout=0.0,
    length_groups=1,
)
TEXTS = ["heat flow in metals", "rivers carry sand", "light bends in glass", "birds fly south"]


@pytest.fixture(scope="module")
def tokenizer(plain_folder):
    return TextTokenizer(read_tokenizer(plain_folder), TextConfig(query_maxlen=16, doc_maxlen=40))


def write_pairs(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pairs(file, *rows, **fields):
    names = ("query", "positive", "negatives")
    records = [dict(zip(names, row, strict=False)) for row in rows]
    negatives = "negatives" if "negatives" in records[0] else None
    return pair_examples(write_pairs(file, records), negatives=negatives, **fields)


# ---- the mask and the losses, beside a definition


def random_passages(seed=0):
    """Few different texts, so that many are the same."""
    rng = np.random.default_rng(seed)

    def halves(x):  # either half alone tells nothing
        return np.stack([x % 3, x // 3], -1).astype(np.int32)

    labelled = halves(rng.integers(0, 12, (B, 2)))
    return Passages(halves(rng.integers(0, 5, B)), halves(rng.integers(0, 12, B * W)), labelled)


def definition(passages):
    queries, documents, labelled = (
        [[tuple(x) for x in row] if np.ndim(row) > 1 else tuple(row) for row in part.tolist()]
        for part in passages
    )
    mask = np.zeros((B, B * W), bool)
    for b in range(B):
        positives = set(labelled[b])
        positives |= {documents[c * W] for c in range(B) if queries[c] == queries[b]}
        for n in range(B * W):
            mask[b, n] = documents[n] in positives and n != b * W
    return mask


def contrast(scores, kept, positive):
    logits = scores[kept].astype(np.float64)
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - scores[positive]


def expected_loss(name, pairs, mask):
    """Softmaxes over what is there and not masked; Stanford's in-batch loss leaves the query's own
    other documents out."""
    losses = []
    for b in range(B):
        own = np.arange(B * W) // W == b
        seen = {"contrastive": own | True, "cross-entropy": own, "in_batch": ~own}[name].copy()
        seen[b * W] = True
        losses.append(contrast(pairs[b], seen & ~mask[b], b * W))
    return np.mean(losses)


@pytest.mark.parametrize("devices", [1, 8])
def test_masked_as_defined(devices, eight_devices):
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=eight_devices[:devices])
    rows = NamedSharding(mesh, P("data"))
    for seed in range(3):
        passages = random_passages(seed)
        mask = definition(passages)
        assert 10 < mask.sum() < B * B * W - B
        got = jax.jit(no_negatives)(jax.device_put(passages, rows))
        np.testing.assert_array_equal(got, mask)


@pytest.mark.parametrize("name", ["contrastive", "cross-entropy", "in_batch"])
@pytest.mark.parametrize("devices", [1, 8])
def test_losses_without_what_is_masked(name, devices, eight_devices):
    """Values; and no gradient pushes a masked document away."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=eight_devices[:devices])
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(B, 4, 6)).astype(np.float32)
    documents = rng.normal(size=(B * W, 5, 6)).astype(np.float32)
    there = np.ones((B * W, 5), bool)
    scores = np.einsum("bqd,nkd->bnqk", queries, documents).max(-1).sum(-1)
    loss = "distillation" if name == "in_batch" else name
    config = TrainingConfig(
        loss=loss, nway=W, use_ib_negatives=name == "in_batch", bsize=B, warmup=None
    )
    passages = random_passages()
    teacher = np.zeros((B, W), np.float32)
    data = jax.device_put(
        (queries, documents, there, teacher, passages), NamedSharding(mesh, P("data"))
    )

    @jax.jit
    def parts(q, d, there, teacher, passages):
        return score_loss(config, q, d, there, teacher, mesh, None, no_negatives(passages))[1]

    got = parts(*data)[name]
    wanted = expected_loss(name, scores, definition(passages))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    unmasked = expected_loss(name, scores, np.zeros((B, B * W), bool))
    assert wanted < unmasked - 0.1


def test_batches_without_repeats_are_bit_equal():
    rng = np.random.default_rng(2)
    queries = rng.normal(size=(B, 4, 6)).astype(np.float32)
    documents = rng.normal(size=(B * W, 5, 6)).astype(np.float32)
    there = np.ones((B * W, 5), bool)
    numbers = np.arange(B * W * 2, dtype=np.int32).reshape(-1, 2)
    passages = Passages(numbers[:B], numbers, numbers.reshape(B, W, 2)[:, :1])
    for loss, ib in (("contrastive", False), ("distillation", True), ("cross-entropy", True)):
        config = TrainingConfig(
            loss=loss, nway=W, use_ib_negatives=ib, bsize=B, warmup=None, temperature=0.5
        )

        @jax.jit
        def plain(q, d, alike, config=config):
            def total(q, d):
                return score_loss(config, q, d, there, np.zeros((B, W)), alike=alike)[0]

            return jax.value_and_grad(total, (0, 1))(q, d)

        got = plain(queries, documents, no_negatives(passages))
        wanted = plain(queries, documents, None)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b)


# ---- training


def last_loss(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


@pytest.fixture
def learn(shallow_folder, tmp_path):
    def run(source, name="run", devices=1, **changes):
        chosen = jax.devices()[:devices]
        model = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=chosen[:1])
        config = dataclasses.replace(SETTINGS, **changes)
        train(model, source, tmp_path / name, config, devices=chosen, progress=False)
        return last_loss(tmp_path / name)

    return run


@pytest.mark.parametrize("changes", [{}, {"chunk": 2}, {"bsize": 8, "accumsteps": 2}])
def test_repeated_passages_learn(changes, learn, tmp_path):
    """Four queries of one passage; with that of another beside them the loss is not ln 4 either."""
    same = [(query, "metals conduct heat") for query in TEXTS]
    assert learn(pairs(tmp_path / "same.jsonl", *same), "same", **changes) < 0.1
    one = pairs(tmp_path / "one.jsonl", (TEXTS[0], "metals conduct heat"))
    assert learn(one, "one", **changes) < 0.1


def test_devices_and_repeats(learn, tmp_path, eight_devices):
    """Two passages of eight queries, and a query with both: eight devices give what one gives."""
    rows = [(f"{TEXTS[i % 4]} {i}", TEXTS[i % 2], TEXTS[2 + i % 2]) for i in range(7)]
    source = pairs(tmp_path / "p.jsonl", *rows, (rows[0][0], TEXTS[1], TEXTS[3]))
    settings = dict(bsize=8, nway=2, maxsteps=2)
    one = learn(source, "one", **settings)
    assert learn(source, "eight", 8, **settings) == pytest.approx(one, rel=2e-4)
    assert learn(source, "chunks", 8, chunk=1, **settings) == pytest.approx(one, rel=2e-4)


def test_nothing_to_tell_apart(learn, tmp_path):
    source = pairs(tmp_path / "p.jsonl", (TEXTS[0], TEXTS[1]))
    with pytest.raises(ValueError, match="leave one query in a micro-batch, and nway is 1"):
        learn(source, bsize=4, accumsteps=4)


# ---- the loader


def first_batches(source, tokenizer, count, **settings):
    """The passages of the first step, of all processes."""
    service = Service()
    processes._POLL = 0.02

    def work(index):
        group = Group(index, count, service, "job")
        with Loader(source, tokenizer, seed=3, group=group, **settings) as loader:
            return next(islice(loader, 1)).batches[0].passages

    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(work, range(count)))
    return Passages(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def mask_of(passages):
    return np.asarray(no_negatives(passages))


def test_processes_agree(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_POLL", 0.02)
    rows = [(f"query {i % 3}", TEXTS[i % 2], [TEXTS[2], f"other {i}"]) for i in range(8)]
    source = pairs(tmp_path / "p.jsonl", *rows)
    settings = dict(bsize=8, nway=3)
    one, two = (first_batches(source, tokenizer, count, **settings) for count in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a.dtype == np.int32
        np.testing.assert_array_equal(a, b)
    assert mask_of(one)[:, ::3].sum() == 7 * 8  # every query has both positives


def test_what_the_model_reads_alike_is_the_same(tokenizer, tmp_path):
    """White space, capitals, and what `doc_maxlen` cuts off."""
    long = "river " * 50
    rows = [("a", "The river"), ("b", " the  RIVER "), ("c", long + "sand"), ("d", long + "heat")]
    source = pairs(tmp_path / "p.jsonl", *rows)
    with Loader(source, tokenizer, bsize=4, seed=0, shuffle=False) as loader:
        mask = mask_of(next(loader).batches[0].passages)
    expected = np.kron(np.eye(2), np.ones((2, 2))) - np.eye(4)
    np.testing.assert_array_equal(mask, expected.astype(bool))


def test_positives_in_other_batches(tokenizer, tmp_path):
    """The query's second positive comes in a later batch, and as a negative, now."""
    rows = [
        ("what", "yes", "no"),
        ("who", "maybe", "never"),
        ("what", "maybe", "yes"),
        ("why", "no", "x"),
    ]
    source = pairs(tmp_path / "p.jsonl", *rows)
    assert source.positives("what") == ("yes", "maybe") and source.positives("who") == ()
    settings = dict(bsize=2, seed=0, shuffle=False)
    with Loader(source, tokenizer, **settings) as loader:
        masks = [mask_of(step.batches[0].passages) for step in islice(loader, 2)]
    np.testing.assert_array_equal(masks[0], [[0, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(masks[1], [[0, 1, 0, 0], [0, 0, 0, 0]])

    parts = [pairs(tmp_path / f"{i}.jsonl", *rows[2 * i : 2 * i + 2]) for i in range(2)]
    assert [part.most_positives for part in parts] == [1, 1]
    both = concatenate(parts)
    assert both.positives("what") == ("yes", "maybe") and both.most_positives == 2
    with Loader(both, tokenizer, **settings) as loader:
        np.testing.assert_array_equal(mask_of(next(loader).batches[0].passages), masks[0])


def test_positives_of_ids(tokenizer, tmp_path):
    (tmp_path / "q.tsv").write_text("1\twhat\n2\twho\n")
    (tmp_path / "c.tsv").write_text("".join(f"{i}\ttext {i}\n" for i in range(6)))
    (tmp_path / "e.jsonl").write_text("[1, 0, 1]\n[2, 3, 4]\n[1, 0, 5]\n[1, 3, 0]\n")
    source = stanford_examples(*(tmp_path / name for name in ("e.jsonl", "q.tsv", "c.tsv")))
    assert (source.positives("what"), source.most_positives) == (("text 0", "text 3"), 2)
    with Loader(source, tokenizer, bsize=2, seed=0, shuffle=False) as loader:
        first, second = (mask_of(step.batches[0].passages) for step in islice(loader, 2))
    np.testing.assert_array_equal(first, [[0, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(second, [[0, 0, 1, 1], [1, 0, 0, 1]])


def test_many_positives(tmp_path):
    """Only the first so many are looked for; memory and batches stay small."""
    rows = [("what", f"text {i}") for i in range(40)] * 2
    source = pairs(tmp_path / "p.jsonl", *rows)
    assert source.most_positives == 16
    assert source.positives("what") == tuple(f"text {i}" for i in range(16))


# ---- an example whose positive is its negative


def test_named_when_read(tmp_path):
    rows = [("a", "x", ["y", "z"]), ("b", "y", ["x", "y"]), ("c", "z", ["z", "x"])]
    message = (
        r"p\.jsonl, line 2: negative 2 is the positive again: contrast leaves it out, so take "
        r"it out .* So it is in 1 more of the examples\."
    )
    with pytest.warns(UserWarning, match=message) as warned:
        pairs(tmp_path / "p.jsonl", *rows)
    assert warned[0].filename == __file__ and len(warned) == 1
    assert len(pairs(tmp_path / "p.jsonl", *rows[:1])) == 1

    (tmp_path / "q.tsv").write_text("1\twhat\n")
    (tmp_path / "c.tsv").write_text("0\tone\n1\ttwo\n2\tone\n")
    files = [tmp_path / name for name in ("e.tsv", "q.tsv", "c.tsv")]
    files[0].write_text("1\t0\t1\n1\t1\t1\n")
    with pytest.warns(UserWarning, match=r"e\.tsv, line 2: negative 1 is the positive again"):
        stanford_examples(*files)


def test_named_when_it_comes_too_late(tmp_path):
    """Beyond what is checked, and the same text under another id."""
    rows = [("a", "x", ["y"]), ("b", "y", ["y"]), ("c", "z", ["z"])]
    source = pairs(tmp_path / "p.jsonl", *rows, check=Check(whole=1, first=1))
    with pytest.warns(UserWarning, match=r"line 3: negative 1 is .* Later ones are not named"):
        source[2]
    source[1]
    (tmp_path / "q.tsv").write_text("1\twhat\n")
    (tmp_path / "c.tsv").write_text("0\tone\n1\ttwo\n2\tone\n")
    files = [tmp_path / name for name in ("e.tsv", "q.tsv", "c.tsv")]
    files[0].write_text("1\t0\t2\n")
    source = stanford_examples(*files)
    with pytest.warns(UserWarning, match=r"e\.tsv, line 1: negative 1 is the positive again"):
        source[0]
    # A teacher's scores say what a passage is worth, whichever id it has.
    (tmp_path / "s.jsonl").write_text("[1, [0, 2.0], [2, 2.0]]\n")
    assert stanford_examples(tmp_path / "s.jsonl", *files[1:])[0].documents == ("one", "one")
