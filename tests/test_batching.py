import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colbert_jax.batching import LADDER, ladder_length, next_power_of_two, pad_rows, plan_batches


@given(
    st.lists(st.integers(1, 900), max_size=200),
    st.sampled_from([512, 2048, 65536]),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 2, 5]),
)
def test_every_row_once_in_a_shape_that_holds_it(lengths, budget, multiple, parallel):
    lengths = np.array(lengths, np.int64)
    seen = []
    for rows, size, length in plan_batches(
        lengths, budget, multiple=multiple, longest=900, parallel=parallel
    ):
        seen += rows.tolist()
        assert len(rows) <= size and size % multiple == 0
        assert lengths[rows].max() <= length <= 900
        assert size * length <= max(budget, length) + multiple * length
    assert sorted(seen) == list(range(len(lengths)))


def test_a_large_run_has_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 513, 20_000)
    shapes = {(b.size, b.length) for b in plan_batches(lengths, 1 << 14)}
    assert len(shapes) <= len(LADDER) + 4


def test_a_large_run_is_hardly_padded():
    lengths = np.random.default_rng(0).gamma(4, 24, 4_000).astype(int).clip(3, 180)
    padded = sum(b.size * b.length for b in plan_batches(lengths, 1 << 10, parallel=2))
    assert padded < 1.09 * lengths.sum()


def test_a_few_rows_are_one_batch_and_some_more_are_shared():
    few, more = np.full(9, 32), np.full(33, 32)
    assert [b.size for b in plan_batches(few, 1 << 10, parallel=2)] == [16]
    assert [b.size for b in plan_batches(more, 1 << 12, parallel=1)] == [32, 1]
    assert [b.size for b in plan_batches(more, 1 << 12, parallel=2)] == [16, 8, 16]


@pytest.mark.parametrize(("length", "step"), [(1, 16), (16, 16), (17, 32), (181, 208), (513, 1024)])
def test_ladder(length, step):
    assert ladder_length(length) == step


def test_ladder_never_passes_the_positions():
    assert ladder_length(35, longest=40) == 40


def test_next_power_of_two():
    assert [next_power_of_two(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


def test_pad_rows():
    rows = [np.array([1, 2], np.int32), np.array([3], np.int32)]
    assert pad_rows(rows, 3, 3, 9).tolist() == [[1, 2, 9], [3, 9, 9], [9, 9, 9]]
