import pytest


@pytest.fixture(autouse=True, scope="module")
def quickly(quick_compilation):
    """Compiling is most of the time that mining's tests take."""
