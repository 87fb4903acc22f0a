"""What is said where an extra is not installed."""

import sys

import pytest

from colbert_jax.cli import main
from colbert_jax.serving.indexes import split_name


@pytest.mark.parametrize(
    ("command", "module", "package"),
    [
        ("serve", "colbert_jax.serving.server", "uvicorn"),
        ("mcp", "colbert_jax.adapters.mcp", "mcp"),
    ],
)
def test_a_missing_extra_is_named(command, module, package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    assert main([command, "nowhere"]) == 2
    assert f'{command} needs pip install "colbert-jax[{command}]"' in capsys.readouterr().err


def test_names_come_from_folders_or_are_given(tmp_path):
    assert split_name("shelf/books.index") == ("books", "shelf/books.index")
    assert split_name("novels=shelf/books.index") == ("novels", "shelf/books.index")
    assert split_name("my books.index") == ("my-books", "my books.index")
    (tmp_path / "a=b").mkdir()
    assert split_name(tmp_path / "a=b") == ("a-b", str(tmp_path / "a=b"))
    with pytest.raises(ValueError, match="cannot be an index's name"):
        split_name("a b=books.index")
