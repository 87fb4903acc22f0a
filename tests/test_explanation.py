"""What an explanation says of a hand-made matrix of similarities."""

import numpy as np
import pytest

from colbert_jax import Explanation
from colbert_jax.explanation import Picture

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


IMAGE = Explanation(
    ["cats", "[image 1]", *(f"[patch {n // 3 + 1},{n % 3 + 1}]" for n in range(6))],
    ["$dog", "cat"],
    np.array([[0.2, 0.9], [0.1, 0.3], *([0.5, 0.1], [1.0, 0.0]) * 2, [0.0, 0.7], [-1, -0.5]], "f4"),
    Picture(np.full((20, 30, 3), 7, np.uint8), 1, 2, (2, 3)),
)


def test_rows_of_an_image_are_counted():
    table = [line.split() for line in str(IMAGE).splitlines()]
    assert table[0][:3] == ["cats", "cat", "0.90"]
    assert table[1][:5] == ["[image]", "x", "1", "cat", "0.30"]
    assert table[2][:5] == ["[patch]", "x", "4", "$dog", "0.75"]
    assert table[3][:5] == ["[patch]", "x", "2", "cat", "0.10"]
    assert IMAGE.text.query == ["cats"] and BY_HAND.text is BY_HAND
    assert IMAGE.strongest() == [("cats", "cat", pytest.approx(0.9))]


def test_plot_of_an_image():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = IMAGE.plot()
    axes.figure.canvas.draw()
    shown, tint = (np.asarray(image.get_array()) for image in axes.images)
    np.testing.assert_array_equal(shown, IMAGE.picture.pixels)
    assert tint.shape == (2, 3, 4)
    dog, cat = tint[0, 0, :3], tint[1, 1, :3]
    assert (tint[0, :, :3] == dog).all() and (tint[1, 2, :3] == cat).all() and (dog != cat).any()
    assert tint[0, 1, 3] > tint[0, 0, 3] > tint[1, 2, 3] > 0
    assert [text.get_text() for text in axes.texts] == [r"\$dog"] * 4 + ["cat"] * 2
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == [r"\$dog: 4, 0.75", "cat: 2, 0.10"]
    _, mine = plt.subplots()
    assert IMAGE.plot(mine) is mine
    plt.close("all")


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"colbert-jax\[plot\]"):
        BY_HAND.plot()
