"""Batches: every example once an epoch, the tokenizer's rows, the same shapes in every process."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
from coordination import Service
from hypothesis import given, settings
from hypothesis import strategies as st
from support import passages

from colbert_jax import processes
from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.config import TextConfig
from colbert_jax.data.examples import Example, stanford_examples
from colbert_jax.processes import Group, PeerError
from colbert_jax.text import TextTokenizer
from colbert_jax.training.loader import Loader, padded_length, permutation


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes, "_POLL", 0.02)


@pytest.fixture(scope="module")
def tokenizer(plain_folder):
    return TextTokenizer(read_tokenizer(plain_folder), TextConfig(query_maxlen=16, doc_maxlen=40))


class Source:
    """n examples of random sentences; `failing` can't be read."""

    def __init__(self, n=10, nway=4, scored=True, failing=None, fingerprint="one"):
        self.nway, self.scored, self.fingerprint = nway, scored, fingerprint
        self.texts = passages(n * (nway + 1), seed=3)
        self.n, self.failing, self.read = n, failing, 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read += 1
        if i == self.failing:
            raise ValueError(f"examples.jsonl, line {i + 1}: passage id 99 is not in it")
        query, *documents = self.texts[i * (self.nway + 1) :][: self.nway + 1]
        scores = tuple(float(i + j / 8) for j in range(self.nway)) if self.scored else None
        return Example(query, tuple(documents), scores)


class NoText:
    """A source for tests of the order alone."""

    nway, scored, fingerprint = 1, False, ""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Example("a", ("a",), None)


def steps(source, tokenizer, count, **arguments):
    with Loader(source, tokenizer, **({"seed": 7} | arguments)) as loader:
        return list(islice(loader, count))


def in_processes(work, count):
    """What `work(group)` returns or raises in each of `count` processes, and their service."""
    service = Service()

    def one(index):
        group = Group(index, count, service, "job")
        try:
            result = work(group)
        except Exception as error:
            return error
        group.fail(RuntimeError("done"))  # or one that goes on would wait for ever
        return result

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count))), service


# ---- order


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    share=st.integers(1, 3),
    accumsteps=st.integers(1, 3),
    count=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
    restarts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_every_example_once_an_epoch(
    tokenizer, n, share, accumsteps, count, seed, shuffle, restarts
):
    """Over processes, and with the number of processes changing at each restart."""
    seen, start, bsize = [], 0, 4 * share * accumsteps
    for turn, more in enumerate(restarts):
        now = [1, 2, 4][turn % 3] if turn else count

        def work(group, start=start, more=more):
            return steps(
                NoText(n),
                tokenizer,
                more,
                bsize=bsize,
                accumsteps=accumsteps,
                seed=seed,
                shuffle=shuffle,
                start=start,
                group=group,
            )

        lists, _ = in_processes(work, now)
        for together in zip(*lists, strict=True):
            assert {step.number for step in together} == {start}
            batches = [step.examples.reshape(accumsteps, -1) for step in together]
            seen += np.concatenate(batches, axis=1).ravel().tolist()
            start += 1
    for epoch in range(0, len(seen), n):
        part = seen[epoch : epoch + n]
        assert len(set(part)) == len(part)
        if len(part) == n:
            assert sorted(part) == list(range(n))
        if not shuffle:
            assert part == list(range(len(part)))
    # The order is what the seed says, however the run was cut.
    whole = steps(NoText(n), tokenizer, start, bsize=bsize, seed=seed, shuffle=shuffle)
    assert np.concatenate([step.examples for step in whole]).tolist() == seen


def test_permutations():
    # Of NumPy's Philox, whose raw words do not change between versions.
    assert permutation(10, 12345, 0).tolist() == [6, 5, 7, 8, 0, 2, 3, 1, 4, 9]
    orders = {tuple(permutation(6, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) > 300  # of 720
    places = np.array([permutation(5, 1, epoch) for epoch in range(2000)])
    counts = np.array([(places == i).sum(0) for i in range(5)])
    assert (abs(counts - 400) < 5 * np.sqrt(400 * 0.8)).all()


# ---- contents


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("expansion", [True, False])
def test_batches_hold_the_tokenizers_rows(plain_folder, count, expansion):
    config = TextConfig(query_maxlen=16, doc_maxlen=40, query_expansion=expansion)
    tokenizer = TextTokenizer(read_tokenizer(plain_folder), config)
    source, nway = Source(50, nway=6), 5

    def work(group):
        return steps(source, tokenizer, 3, bsize=32, accumsteps=2, nway=nway, group=group)

    lists, _ = in_processes(work, count)
    for together in zip(*lists, strict=True):
        for m in range(2):
            batches = [step.batches[m] for step in together]
            numbers = np.concatenate([step.examples.reshape(2, -1)[m] for step in together])
            examples = [source[i] for i in numbers]
            # Rows of the groups of all processes, in each group those of process 0 first.
            sizes = [[group.ids.shape for group in batch.documents] for batch in batches]
            assert all(size == sizes[0] for size in sizes)
            assert len(sizes[0]) == {1: 4, 2: 4, 4: 2}[count]  # of 80, 40, 20 rows
            rows = [
                (ids[:length], length, kept[:length], ids[length:], kept[length:])
                for parts in zip(*(batch.documents for batch in batches), strict=True)
                for part in parts
                for ids, length, kept in zip(*part, strict=True)
            ]
            order = np.concatenate([batch.order for batch in batches])
            assert order.dtype == np.int32 and sorted(order) == list(range(16 * nway))
            texts = [text for example in examples for text in example.documents[:nway]]
            for place, ids in zip(order, tokenizer.documents(texts).ids, strict=True):
                found, attended, kept, padding, rest = rows[place]
                assert attended == len(ids)
                np.testing.assert_array_equal(found, ids)
                np.testing.assert_array_equal(kept, tokenizer.kept(ids))
                assert (padding == tokenizer.special.pad).all() and not rest.any()
            queries = tokenizer.queries([example.query for example in examples])
            found = [np.concatenate(part) for part in zip(*(b.queries for b in batches))]  # noqa: B905
            width = found[0].shape[1]
            assert width == 16
            for row, ids in enumerate(queries.ids):
                np.testing.assert_array_equal(found[0][row, : len(ids)], ids)
                assert (found[0][row, len(ids) :] == tokenizer.special.pad).all()
                np.testing.assert_array_equal(found[2][row], np.arange(width) < len(ids))
            np.testing.assert_array_equal(found[1], queries.attended)
            scores = np.concatenate([batch.scores for batch in batches])
            expected = [example.scores[:nway] for example in examples]
            np.testing.assert_array_equal(scores, np.array(expected, np.float32))


def test_dtypes_and_missing_scores(tokenizer):
    (step,) = steps(Source(scored=False), tokenizer, 1, bsize=4)
    (batch,) = step.batches
    assert batch.scores is None
    for rows in (batch.queries, *batch.documents):
        assert [array.dtype for array in rows] == [np.int32, np.int32, bool]


class Sized(NoText):
    """One query with documents of so many words."""

    def __init__(self, sizes):
        super().__init__(1)
        self.sizes, self.nway = sizes, len(sizes)

    def __getitem__(self, i):
        return Example("what is", tuple(" ".join(["river"] * n) for n in self.sizes), None)


def shapes(tokenizer, sizes, **arguments):
    (step,) = steps(Sized(sizes), tokenizer, 1, bsize=1, **arguments)
    return [group.ids.shape for group in step.batches[0].documents]


def test_groups_by_length(tokenizer):
    """[CLS], marker and [SEP] are three tokens more than words."""
    sizes = [*range(1, 17), 29, 30, *range(1, 15)]  # 32 documents
    assert shapes(tokenizer, sizes) == [(8, 40), (8, 16), (8, 16), (8, 16)]
    assert shapes(tokenizer, [29] * 8 + [13] * 8) == [(8, 32), (8, 16)]
    assert shapes(tokenizer, [29] * 8 + [14] * 8) == [(8, 32), (8, 32)]
    assert shapes(tokenizer, [29] * 8 + [13] * 8, length_groups=1) == [(16, 32)]
    assert shapes(tokenizer, [200] * 3) == [(3, 40)]  # cut to doc_maxlen
    assert shapes(tokenizer, [5] * 27) == [(9, 16)] * 3  # four are not equal
    assert shapes(tokenizer, [5] * 26) == [(13, 16)] * 2


def test_groups_divide_among_devices(tokenizer):
    source = Source(20, nway=12)
    for devices, groups in ((1, 4), (2, 3), (4, 1)):  # of 48 rows, 8 a device at least
        (step,) = steps(source, tokenizer, 1, bsize=4, devices=devices)
        assert len(step.batches[0].documents) == groups


def test_the_ladder():
    assert [padded_length(n, 1000) for n in (1, 16, 17, 97, 181, 512)] == [
        16,
        16,
        32,
        128,
        256,
        512,
    ]
    assert [padded_length(n, 4000) for n in (513, 1025, 3900)] == [1024, 2048, 4000]
    assert padded_length(170, 174) == 174


# ---- the thread


def test_the_same_step_stops_all(tokenizer):
    def work(group):
        with Loader(Source(), tokenizer, bsize=4, seed=0, group=group, ahead=2) as loader:
            for step in islice(loader, 20):
                if step.stop:
                    return step.number
                if step.number == 3 and group.index == 1:
                    loader.stop_requested = True

    numbers, service = in_processes(work, 2)
    assert len(set(numbers)) == 1 and 4 <= numbers[0] <= 3 + 2 + 1
    # What the processes told each other does not stay with the service.
    assert len(service.values) <= 4 + 2


def test_the_same_step_saves_all(tokenizer):
    """Once for each time that it is asked for."""

    def work(group):
        saved = []
        with Loader(Source(), tokenizer, bsize=4, seed=0, group=group, ahead=2) as loader:
            for step in islice(loader, 14):
                saved += [step.number] * step.save
                if step.number in (3, 9) and group.index == 0:
                    loader.save_requested = True
        return saved

    (first, second), _ = in_processes(work, 2)
    assert first == second and len(first) == 2
    assert 4 <= first[0] <= 3 + 2 + 1 and 10 <= first[1] <= 9 + 2 + 1


def test_one_process_stops_at_once(tokenizer):
    with Loader(Source(), tokenizer, bsize=2, seed=0) as loader:
        assert not next(loader).stop
        loader.stop_requested = True
        assert next(loader).stop


def test_an_error_comes_in_its_step_with_its_text(tokenizer):
    with Loader(Source(failing=6), tokenizer, bsize=2, seed=0, shuffle=False, ahead=5) as loader:
        assert [next(loader).number for _ in range(3)] == [0, 1, 2]
        for _ in range(2):  # and stays
            with pytest.raises(ValueError, match=r"^examples\.jsonl, line 7: passage id 99 is not"):
                next(loader)


def test_an_error_in_one_process_ends_all_after_the_same_step(tokenizer):
    came = [[], []]

    def work(group):
        source = Source(failing=7 if group.index == 1 else None)
        with Loader(source, tokenizer, bsize=2, seed=0, shuffle=False, group=group) as loader:
            for step in loader:
                came[group.index].append(step.number)

    (first, second), _ = in_processes(work, 2)
    assert came == [[0, 1, 2]] * 2
    assert isinstance(second, ValueError) and "line 8" in str(second)
    assert isinstance(first, PeerError)
    assert str(first) == f"process 1 failed: ValueError: {second}"


def test_processes_with_other_data(tokenizer):
    def work(group):
        return steps(Source(fingerprint=group.index), tokenizer, 1, bsize=2, group=group)

    for error in in_processes(work, 2)[0]:
        assert isinstance(error, (ValueError, PeerError))
        assert "process 1 reads other training data" in str(error)


def test_it_reads_no_further_ahead_than_told(tokenizer):
    source = Source(100)
    with Loader(source, tokenizer, bsize=4, seed=0, ahead=3) as loader:
        for taken in (0, 1, 2, 3):
            until = time.monotonic() + 10
            while source.read < 4 * (taken + 3) and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(0.05)
            assert source.read == 4 * (taken + 3)
            next(loader)


def loaders():
    return [t for t in threading.enumerate() if t.name == "colbert_jax loader"]


def test_the_thread_ends(tokenizer):
    with pytest.raises(ZeroDivisionError), Loader(Source(), tokenizer, bsize=2, seed=0) as loader:
        next(loader)
        assert len(loaders()) == 1
        raise ZeroDivisionError
    assert not loaders()
    assert list(loader) == []  # nothing after the end
    loader.close()
    # Also while it waits for a process that never comes.
    loader = Loader(Source(), tokenizer, bsize=2, seed=0, group=Group(0, 2, Service(), "job"))
    time.sleep(0.05)
    loader.close()
    assert not loaders()


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bsize=0), "bsize must be at least 1, got 0"),
        (dict(start=-1), "start must be at least 0, got -1"),
        (dict(ahead=0), "ahead must be at least 1"),
        (dict(length_groups=0), "length_groups must be at least 1"),
        (dict(accumsteps=0), "accumsteps must be at least 1"),
        (dict(seed=-1), "seed must be at least 0"),
        (
            dict(bsize=12, accumsteps=2, devices=4, group=Group(0, 2, Service(), "job")),
            "bsize 12 must be a multiple of 16: accumsteps 2 x 2 processes x 4 devices each",
        ),
        (dict(nway=5), "nway must be between 1 and 4, the documents of every example, got 5"),
        (dict(nway=0), "nway must be between 1 and 4"),
        (dict(longest=32), "doc_maxlen 40 is more than the model's 32 positions"),
    ],
)
def test_arguments_that_do_not_fit(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(Source(), tokenizer, **(dict(bsize=4, seed=0) | arguments))
    assert not loaders()


def test_the_real_64way_file(shared_data, minilm_folder):
    """Two processes, four devices each: the positive's row is the positive's text."""
    folder = shared_data / "train" / "msmarco_v2_pool"
    files = [folder / name for name in ("examples_64way.jsonl", "queries.tsv", "collection.tsv.gz")]
    source = stanford_examples(*files)
    tokenizer = TextTokenizer(read_tokenizer(minilm_folder), TextConfig(doc_maxlen=180))

    def work(group):
        return steps(source, tokenizer, 1, bsize=8, group=group, devices=4)[0]

    both, _ = in_processes(work, 2)
    groups = list(zip(*(step.batches[0].documents for step in both), strict=True))
    assert [part.ids.shape[0] for part in groups[0]] == [64, 64] and len(groups) == 4
    rows = [row for parts in groups for part in parts for row in part.ids]
    for step in both:
        for b, number in enumerate(step.examples):
            row = rows[step.batches[0].order[b * 64]]
            (ids,) = tokenizer.documents([source[number].documents[0]]).ids
            np.testing.assert_array_equal(row[: len(ids)], ids)
            np.testing.assert_array_equal(
                step.batches[0].scores[b], np.array(source[number].scores, np.float32)
            )
