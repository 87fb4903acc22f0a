"""Where nothing can be kept between runs."""

import os
from pathlib import Path

import pytest

from colbert_jax.runtime import cache_folder, enable_compilation_cache


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
