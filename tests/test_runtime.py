"""Where nothing can be kept between runs."""

import os
import platform
import resource
from pathlib import Path

import numpy as np
import pytest

from colbert_jax.runtime import cache_folder, enable_compilation_cache, memory_kept


def test_a_user_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for use in (cache_folder, enable_compilation_cache):
        with pytest.raises(OSError, match="no cache folder: set XDG_CACHE_HOME"):
            use()


def test_a_compilation_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="kept: can't be written"):
        enable_compilation_cache(tmp_path / "kept")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_memory_is_kept_for_the_next_step():
    """The system clears the pages of an array once; without, every time."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(8 << 20, np.int64)  # 64 MB: 16,384 pages, or 32 large ones
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with memory_kept():
        faults()
        assert faults() == 0
    assert faults() > 16
