"""Measures against hand-worked values."""

import math

import pytest

from colbert_jax import Hit
from colbert_jax.evaluation import evaluate_ranking, write_run

pytest.importorskip("ir_measures", reason="ir-measures (the extra eval) is not installed")


def test_by_hand():
    qrels = {"1": {"a": 2, "b": 1, "z": 0}, "2": {"c": 1}, "3": {"d": 1}}
    ranking = {
        "1": ["x", "b", "a", "y"],  # nDCG: linear gains, 1/log2(3) + 2/log2(4)
        "2": ["p", "q", "r", "s", "t", "c"],  # found at rank 6
        "unjudged": ["a"],
    }  # query 3 was not answered and counts as 0
    values = evaluate_ranking(ranking, qrels)
    ideal = 2 + 1 / math.log2(3)
    ndcg = (1 / math.log2(3) + 2 / math.log2(4)) / ideal, 1 / math.log2(7), 0
    assert values["nDCG@10"] == pytest.approx(sum(ndcg) / 3)
    assert values["MRR@10"] == pytest.approx((1 / 2 + 1 / 6 + 0) / 3)
    assert values["Recall@100"] == pytest.approx(2 / 3)
    assert values["Success@5"] == pytest.approx(1 / 3)


def test_the_order_given_is_the_order_measured():
    """Not re-sorted by name, as trec_eval does with equal scores."""
    for first, expected in (("a", 1.0), ("b", 0.5)):
        order = sorted("ab", key=lambda d: d != first)
        assert evaluate_ranking({"1": order}, {"1": {"a": 1}})["MRR@10"] == expected


def test_nothing_judged():
    with pytest.raises(ValueError, match="none of the queries has a judgement"):
        evaluate_ranking({"1": ["a"]}, {"2": {"a": 1}})


def test_run_file(tmp_path):
    hits = [Hit("one", 2.5, None, 1), Hit("zero", 1.0, None, 0)]
    write_run(tmp_path / "run.tsv", {"q": hits})
    assert (tmp_path / "run.tsv").read_text() == "q\tone\t1\t2.500000\nq\tzero\t2\t1.000000\n"
