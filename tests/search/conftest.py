import jax
import pytest


@pytest.fixture(scope="module")
def fast_compilation():
    """Programs that run a few times on small arrays: optimising them would be most of a test."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
