"""The machine: compilation cache, default dtype, host threads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh


def warn(message: str) -> None:
    """Warn whoever called into this library, from however deep in it."""
    frame, level = sys._getframe(1), 2
    here = ("colbert_jax", "contextlib")  # whose decorators are between
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in here:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def cache_folder() -> Path:
    """The folder where this library keeps files between runs; it may not exist yet.

    Raises OSError where there is none, for a user without a home.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(f"no cache folder: set XDG_CACHE_HOME ({error})") from None
    return Path(cache, "colbert_jax")


def enable_compilation_cache(folder: str | Path | None = None) -> Path:
    """Keep compiled programs on disk, so that a second run compiles nothing.

    Args:
      folder: If None, `$JAX_COMPILATION_CACHE_DIR`, else `~/.cache/colbert_jax/xla`.

    Returns:
      the folder.

    Raises:
      OSError: it cannot be made, or not written.
    """
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() / "xla"
    path = Path(folder or default)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):  # JAX would warn for every program
        raise PermissionError(f"{path}: can't be written")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return path


_jax_process: int | None = None  # where this library first used JAX


def _note_process() -> bool:
    """Note where JAX is used first; whether that is this process."""
    global _jax_process
    _jax_process = _jax_process or os.getpid()
    return _jax_process == os.getpid()


def check_process() -> None:
    """Raise RuntimeError in a process that was forked after this library had used JAX.

    JAX's threads stay behind in the parent, and a program that waits for them waits for ever.
    """
    if not _note_process():
        raise RuntimeError(
            "this process was forked after JAX had been used, and JAX does not work in it: start "
            'processes with multiprocessing.get_context("spawn") or "forkserver", or load models '
            "in each process and none before the fork"
        )


def on_cpu() -> bool:
    """Whether JAX's default devices are CPUs."""
    _note_process()
    return jax.default_backend() == "cpu"


def compute_dtype() -> jnp.dtype:
    """bfloat16 on accelerators; float32 on a CPU, where bfloat16 gains nothing."""
    return jnp.dtype(jnp.float32 if on_cpu() else jnp.bfloat16)


_NO_MESH = Mesh(np.empty((), object), ())


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Run programs as if the caller had not set a mesh (`jax.set_mesh`).

    Programs here name their own devices, and JAX refuses that under another mesh of Explicit axes.
    Also a decorator.
    """
    with jax.set_mesh(_NO_MESH):
        yield


@functools.cache
def multiplies_int8() -> bool:
    """Whether JAX runs on an x86 CPU with VNNI, instructions that add products of int8."""
    if not on_cpu() or not _has_numba():
        return False
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512vnni", "avxvnni"))


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def use_cpu_kernels() -> bool:
    """Whether numba's kernels run the ragged loops: on a CPU, where numba is installed.

    `COLBERT_JAX_CPU_KERNELS=0` leaves all work to XLA.
    """
    return on_cpu() and os.environ.get("COLBERT_JAX_CPU_KERNELS", "1") != "0" and _has_numba()


def use_gpu_kernels() -> bool:
    """Whether search on a GPU scores by the fused kernel, which is for Hopper (H100, H200) only.

    No, unless `COLBERT_JAX_GPU_KERNELS=1`: it has been compiled and simulated, but not run on a
    GPU. A program keeps to what was set when it was first compiled.
    """
    return os.environ.get("COLBERT_JAX_GPU_KERNELS", "0") == "1"


# glibc's numbers for mallopt, and what it has them at.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 1 << 16}


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Keep memory that is freed in the process until the end; on a CPU, with glibc.

    XLA allocates a step's arrays anew every time. From pages that the system has to give and to
    clear first, they take a third of a training step's time.
    """
    if not on_cpu() or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    libc.mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        for name, value in _DEFAULTS.items():
            libc.mallopt(name, value)
        libc.malloc_trim(ctypes.c_size_t(0))


@functools.cache
def num_threads() -> int:
    """The number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def spread(worker: Callable[[int], None], threads: int) -> None:
    """Run worker(0), ..., worker(threads - 1) side by side, the last one in the calling thread."""
    others = [_pool().submit(worker, lane) for lane in range(threads - 1)]
    try:
        worker(threads - 1)
    finally:
        for other in others:
            other.result()


def spread_evenly(work: Callable[[int, int], None], ends: np.ndarray) -> None:
    """Run work(start, stop) over parts of some items, one for each thread, of about equal size.

    Args:
      ends: [n], ascending, the sizes of the items added up.
    """
    threads = num_threads()
    total = ends[-1] if len(ends) else 0
    cuts = np.searchsorted(ends, np.linspace(0, total, threads + 1)[1:-1])
    bounds = [0, *cuts.tolist(), len(ends)]
    spread(lambda lane: work(bounds[lane], bounds[lane + 1]), threads)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="colbert_jax")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
