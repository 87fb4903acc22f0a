"""Compiled loops are those of the source, and are there where nothing can be written."""

import ast
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from colbert_jax.compression import compiled as module
from colbert_jax.compression.compiled import compiled
from colbert_jax.search import cpu_kernels, plaid

PACKAGE = Path(module.__file__).parents[1]
HOLD_LOOPS = (
    "compression/cpu_kernels.py",
    "compression/fixed_tiles.py",
    "compression/pooling_kernels.py",
    "compression/tiles.py",
    "search/cpu_kernels.py",
)


def test_loops_need_nothing_that_the_cache_does_not_see():
    """All files that compile, and all that they import from this library, are looked at."""
    using = [
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if "@compiled" in file.read_text("utf-8")
    ]
    assert sorted(using) == sorted(HOLD_LOOPS)
    seen = {name.removesuffix(".py").replace("/", ".") for name in module._SOURCES}
    for name in HOLD_LOOPS:
        tree = ast.parse((PACKAGE / name).read_text("utf-8"))
        imported = {
            node.module.removeprefix("colbert_jax.")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module.startswith("colbert_jax")
        }
        assert imported <= seen
    assert cpu_kernels.PRUNED == plaid.PRUNED


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not warned yet, and its cache folder."""
    monkeypatch.setattr(module.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module._told.clear()
    yield tmp_path / "cache"
    module._told.clear()


def twice(x):
    return 2 * x


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nb?"))


def test_code_of_other_versions_is_deleted_after_a_while(fresh):
    """Only folders that are ours by name, and that nothing was added to for a month."""
    base = module._base()
    stale, recent, current = "colbert_jax-" + "0" * 16, "colbert_jax-" + "1" * 16, module._content()
    others = ["colbert_jax-notes", "colbert_jax-" + "2" * 15, "somebody"]
    for name in (stale, recent, f"colbert_jax-{current}", *others):
        place = base / name / "m"
        place.mkdir(parents=True)
        (place / "f.nbi").touch()
        if name != recent:
            for old in (place / "f.nbi", place, place.parent):
                os.utime(old, (0, 0))
    (base / ("colbert_jax-" + "3" * 16)).symlink_to(base / "somebody")
    module._delete_old.cache_clear()
    assert compiled(twice)(3) == 6
    assert not (base / stale).exists()
    for name in (recent, f"colbert_jax-{current}", *others, "colbert_jax-" + "3" * 16):
        assert (base / name / "m" / "f.nbi").exists() or name == f"colbert_jax-{current}", name
    assert files(base / f"colbert_jax-{current}")


def test_code_is_kept_in_the_cache_folder(fresh):
    assert compiled(twice)(np.float32(3)) == 6
    assert len(files(fresh)) == 2
    again = compiled(twice)
    assert again(np.float32(3)) == 6 and sum(again.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04K\x01."])
def test_damaged_files_are_written_again(fresh, content):
    compiled(twice)(np.float32(3))
    for file in files(fresh):
        file.write_bytes(content)
        assert compiled(twice)(np.float32(3)) == 6
        again = compiled(twice)
        assert again(np.float32(3)) == 6 and sum(again.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("why", ["a file in its place", "no home", "a full disk"])
def test_without_a_cache_folder_it_says_so_once(fresh, monkeypatch, why):
    if why == "a file in its place":
        fresh.write_text("")
    elif why == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.FunctionCache, "save_overload", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert compiled(twice)(np.float32(3)) == 6
    (said,) = caught
    assert "compiled loops can't be kept" in str(said.message)
    assert "set XDG_CACHE_HOME to a folder" in str(said.message)


LARGE = np.arange(200_000)


def looked_up(n):
    return LARGE[n]


def test_what_cannot_be_kept_runs_all_the_same(fresh):
    """Loops too, where NUMBA_OPT is 0."""
    with pytest.warns(Warning, match="looked_up.*dynamic globals"):
        assert compiled(looked_up)(3) == 3
    assert not files(fresh)


USE = """
import numpy as np
from colbert_jax.compression.tiles import LANES, ROWS, packed
from colbert_jax.search.cpu_kernels import update_best
best, tokens = np.zeros(LANES, np.float32), np.ones((ROWS, 8), np.float32)
columns = packed(np.ones((4, 8), np.float32))
update_best(tokens, np.ones(1, np.float32), 1, columns, best)
print(best[:4].tolist(), sum(update_best.stats.cache_hits.values()))
"""


QUICK = {"NUMBA_OPT": "1"}  # two thirds of the time to compile: what is compiled matters here


def run(code: str, package: Path, **env: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    env = kept | {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"} | env
    where = dict(env=env, cwd=package.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def package(tmp_path):
    """A copy of the library, to be changed."""
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(PACKAGE, tmp_path / "site" / "colbert_jax", ignore=ignored)


@pytest.mark.slow
def test_a_changed_inner_loop_is_compiled_again(package, tmp_path):
    """`raise_best` is in another file than `update_best`, which calls it."""
    cache = str(tmp_path / "cache")
    file = package / "compression" / "tiles.py"
    before = file.read_text("utf-8")
    for text, wanted in [
        (before, f"{[8.0] * 4} 0"),
        (before, f"{[8.0] * 4} 1"),
        (before.replace("fadd(known, product", "fadd(product, product"), f"{[2.0] * 4} 0"),
        (before.replace("[0.0] * LANES", "[1.0] * LANES"), f"{[9.0] * 4} 0"),
        (before, f"{[8.0] * 4} 1"),
    ]:
        file.write_text(text, "utf-8")
        os.utime(file, (0, 0))  # an installer may set any time
        assert run(USE, package, XDG_CACHE_HOME=cache, **QUICK).stdout.strip() == wanted


SEARCH = """
import sys, numpy as np
from colbert_jax import Index
rng = np.random.default_rng(0)
print(Index.open(sys.argv[1]).search(rng.normal(size=(1, 4, 16)), k=3).positions.tolist())
"""


@pytest.mark.slow
def test_search_where_nothing_can_be_written(package, index):
    """A container's user: a library that is not his, and no home."""
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").write_text("")
    code = SEARCH.replace("sys.argv[1]", repr(str(index.path)))
    done = run(code, package, HOME="/dev/null", **QUICK)
    wanted = run(code, package, NUMBA_CACHE_DIR=module.config.CACHE_DIR).stdout
    assert done.stdout == wanted
    assert done.stderr.count("compiled loops can't be kept") == 1
