"""What an explanation says of a hand-made matrix of similarities."""

import numpy as np
import pytest

from colbert_jax import Explanation

SIMILARITY = np.array([[0.1, 0.9, 0.2], [0.5, 0.25, 0.4], [0.3, 0.2, -0.5]], np.float32)
BY_HAND = Explanation(["[CLS]", "cats", "$5"], ["dog", "[SEP]", "cat"], SIMILARITY)


def test_score_and_matches():
    assert BY_HAND.score == pytest.approx(0.9 + 0.5 + 0.3)
    words = [("[CLS]", "[SEP]"), ("cats", "dog"), ("$5", "dog")]
    assert [match[:2] for match in BY_HAND.matches] == words
    assert BY_HAND.strongest(1) == [("cats", "dog", 0.5)]


def test_as_text():
    lines = str(BY_HAND).splitlines()
    assert lines[1].split() == ["cats", "dog", "0.50", "#" * 10]
    assert lines[-1] == "score 1.7000" and len(lines) == 4


def test_a_document_without_tokens():
    empty = Explanation(["a"], [], np.zeros((1, 0), np.float32))
    assert empty.matches == [] and empty.score == -np.inf and str(empty) == "score -inf"


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = BY_HAND.plot()
    axes.figure.canvas.draw()  # labels are laid out, so none is read as a formula
    assert [label.get_text() for label in axes.get_xticklabels()] == BY_HAND.document
    np.testing.assert_array_equal(np.ma.getdata(axes.images[0].get_array()), SIMILARITY)
    assert axes.collections[0].get_offsets().tolist() == [[1, 0], [0, 1], [0, 2]]
    _, mine = plt.subplots()
    assert BY_HAND.plot(mine) is mine
    plt.close("all")


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"colbert-jax\[plot\]"):
        BY_HAND.plot()
