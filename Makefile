# `make demo`, `make test` and `make test-kernels` each create a virtual environment with all requirements.
SHELL := /bin/bash

VENV ?= .venv
DEMO_VENV ?= .venv-demo
KERNEL_VENVS ?= .venv-kernels
DOCS_VENV ?= .venv-docs
# Candidates; the first that runs and is new enough is used. Override: `make test PYTHON=/path/to/python`.
PYTHONS := $(or $(PYTHON),python3.11 python3 python3.13 python3.12 python3.14 python)
# The parity tests compare with PyTorch on the CPU. On Linux the plain name may install gigabytes of CUDA, so
# the CPU build is requested by its full version.
TORCH ?= torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
# uv installs faster than pip and is used where available; `make test UV=` disables it.
UV ?= $(shell command -v uv)
# Extra arguments for pytest: make test PYTEST_ARGS="-k generation"
PYTEST_ARGS ?=

help:
	@echo "make demo           the model inside the package writes Python"
	@echo "make test           run the tests"
	@echo "make test-kernels   run the tests of the GPU kernels, which need no GPU but Python >= 3.12"
	@echo "make gpu            on a machine with an NVIDIA GPU: test the kernels there, then time them and whole models"
	@echo "make lint           ruff and pyright"
	@echo "make docs           build the pages into build/site; make docs-serve shows them while they are written"
	@echo "make clean          remove the virtual environments and what tools left"

demo: $(DEMO_VENV)/.installed
	@echo "==> mamba2-jax generate: a few seconds of compiling, then Python"
	@$(DEMO_VENV)/bin/mamba2-jax generate --echo --max-new-tokens 100 \
		--temperature 0.8 --top-p 0.9 --repetition-penalty 1.15 --seed 2 \
		$$'class Queue:\n    """A queue of items."""\n\n    def __init__(self'

test: $(VENV)/.installed
	@echo "==> pytest: what XLA itself does"  # exit status 5: no test selected
	@$(PYTEST) --dist load -m xla_habits $(HABITS) $(PYTEST_ARGS) || [ $$? -eq 5 ]
	@echo "==> pytest"
	@$(PYTEST) --no-loadscope-reorder --ignore tests/kernels -m "not slow and not gpu and not xla_habits" $(PYTEST_ARGS)

PYTEST = $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile
# Run in separate processes, because they test XLA's optimizations, which are turned off in the other tests.
HABITS = $(shell grep -l xla_habits tests/test_*.py)

install: $(VENV)/.installed

test-kernels:
	@PYTHON="$(PYTHON)" UV="$(UV)" .ci/test-kernels $(KERNEL_VENVS)

# Uses an existing Python with jax for CUDA, pytest and jaxtyping, and optionally the peers to compare with.
# Needs no network. make gpu PYTHON=/path/to/python PARTS="tests scan" PYTEST_ARGS="-n 8" BENCHMARK_ARGS=...
gpu:
	@PYTHON="$(PYTHON)" PYTEST_ARGS="$(PYTEST_ARGS)" BENCHMARK_ARGS="$(BENCHMARK_ARGS)" .ci/gpu $(PARTS)

lint: $(VENV)/.installed
	@echo "==> ruff, pyright"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The pages show docstrings that griffe reads without importing them: the environment has no JAX.
docs: $(DOCS_VENV)/.installed
	@echo "==> mkdocs build"
	@$(MKDOCS) build --strict

docs-serve: $(DOCS_VENV)/.installed
	@$(MKDOCS) serve

MKDOCS = NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs
DOCS_EXTRA = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(KERNEL_VENVS) $(DOCS_VENV) build dist *.egg-info .pytest_cache .ruff_cache .coverage

.PHONY: help demo install test test-kernels gpu lint docs docs-serve clean

$(DEMO_VENV)/.installed: pyproject.toml
	$(call make-venv,$(DEMO_VENV))
	@echo "==> installing the package (JAX, Flax, transformers): a minute or two"
	@$(call fetch,$(DEMO_VENV),-e .)
	@touch $@

$(VENV)/.installed: pyproject.toml
	$(call make-venv,$(VENV))
	@echo "==> installing the package and the tools of the tests: a few minutes"
	@$(call fetch,$(VENV),-e '.[dev]')
	@echo "==> installing $(TORCH), and PEFT, which would bring another"
	@$(VENV)/bin/pip install --no-compile --disable-pip-version-check '$(TORCH)' \
		&& $(VENV)/bin/pip install --no-compile --disable-pip-version-check 'peft>=0.17' || { \
		echo "==> $(TORCH) or peft is not to be had here: the tests that compare with them will be skipped."; \
		echo "    To run them, install a CPU build of PyTorch, then peft, into $(VENV) and repeat make test."; }
	@touch $@

$(DOCS_VENV)/.installed: pyproject.toml
	$(call make-venv,$(DOCS_VENV))
	@echo "==> installing mkdocs"
	@$(DOCS_VENV)/bin/python -c '$(DOCS_EXTRA)' >$(DOCS_VENV)/requirements.txt
	@$(call fetch,$(DOCS_VENV),-r $(DOCS_VENV)/requirements.txt)
	@touch $@

# $(call fetch,FOLDER,ARGUMENTS): `pip install` in FOLDER, by uv where available. PyTorch is installed by pip:
# the index with its CPU build may be known only to pip's configuration.
define fetch
{ [ -n "$(UV)" ] && $(UV) pip install --quiet --python "$(1)/bin/python" $(2); } || $(1)/bin/pip install --disable-pip-version-check $(2)
endef

# $(call make-venv,FOLDER): create a virtual environment in FOLDER, unless it has one, by the first usable Python.
define make-venv
@if [ -x "$(1)/bin/pip" ]; then exit 0; fi; \
tried=""; \
for python in $(PYTHONS); do \
	version=$$("$$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		tried="$$tried; $$python is $$version, too old"; continue; fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
		tried="$$tried; $$python $$version lacks venv (on Debian: apt install python3-venv)"; continue; fi; \
	echo "==> $(1): a new virtual environment from $$python $$version"; \
	"$$python" -m venv --clear "$(1)" && exit 0; \
done; \
echo "error: Python 3.11 or newer is needed, and none of these will do: $(PYTHONS)$$tried." >&2; \
echo "       Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
exit 1
endef
