import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colbert_jax.batching import LADDER, ladder_length, next_power_of_two, pad_rows, plan_batches


@given(
    st.lists(st.integers(1, 900), max_size=200),
    st.sampled_from([512, 2048, 65536]),
    st.sampled_from([1, 3, 8]),
)
def test_every_row_once_in_a_shape_that_holds_it(lengths, budget, multiple):
    lengths = np.array(lengths, np.int64)
    seen = []
    for rows, size, length in plan_batches(lengths, budget, multiple=multiple, longest=900):
        seen += rows.tolist()
        assert len(rows) <= size and size % multiple == 0
        assert lengths[rows].max() <= length <= 900
        assert size * length <= max(budget, length) + multiple * length
    assert sorted(seen) == list(range(len(lengths)))


def test_a_large_run_has_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 513, 20_000)
    shapes = {(b.size, b.length) for b in plan_batches(lengths, 1 << 14)}
    assert len(shapes) <= 2 * len(LADDER)


@pytest.mark.parametrize(("length", "step"), [(1, 16), (16, 16), (17, 32), (181, 256), (513, 1024)])
def test_ladder(length, step):
    assert ladder_length(length) == step


def test_ladder_never_passes_the_positions():
    assert ladder_length(35, longest=40) == 40


def test_next_power_of_two():
    assert [next_power_of_two(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


def test_pad_rows():
    rows = [np.array([1, 2], np.int32), np.array([3], np.int32)]
    assert pad_rows(rows, 3, 3, 9).tolist() == [[1, 2, 9], [3, 9, 9], [9, 9, 9]]
