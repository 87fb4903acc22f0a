import pytest
import support


@pytest.fixture(autouse=True, scope="module")
def quickly(quick_compilation):
    """Compiling is most of the time that training tests take."""


@pytest.fixture(scope="module")
def one_length():
    """Documents of all batches padded alike: one program a run. `test_loader.py` has the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("colbert_jax.training.loader._LADDER", (48, 512))
        yield


@pytest.fixture(scope="session")
def shallow_folder(tmp_path_factory):
    """A Stanford checkpoint of one layer."""
    return support.write_stanford(tmp_path_factory.mktemp("shallow"), {"num_hidden_layers": 1})
