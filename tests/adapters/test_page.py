"""The snippets of docs/adapters.md, each where its package is installed."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import support

from colbert_jax.checkpoints import hub

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


PACKAGES = [
    *("dspy", "haystack", "langchain_core", "llama_index"),
    *("mcp", "mteb", "pyterrier", "rerankers"),
]


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PACKAGES)), reason="no adapter's package is installed"
)
@pytest.mark.filterwarnings("ignore")
def test_snippets(tmp_path, monkeypatch, one_device):
    folder = support.write_stanford(tmp_path / "checkpoint")
    original = hub.resolve
    monkeypatch.setattr(
        hub,
        "resolve",
        lambda name, **given: folder if "colbertv2.0" in str(name) else original(name, **given),
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(SNIPPETS[0], names)
    assert len(names["retriever"]) == 2
    run = []
    for snippet in SNIPPETS[1:]:
        (name,) = re.findall(r"^from colbert_jax\.adapters\.(\w+) import", snippet, re.MULTILINE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                exec(snippet, names)
            except ModuleNotFoundError as error:
                assert not str(error.name).startswith("colbert_jax")
                continue
        run.append(name)
    assert run
