# `make demo` and `make test` set up all they need, each in a virtual environment of its own.
SHELL := /bin/bash

VENV ?= .venv
DEMO_VENV ?= .venv-demo
KERNELS_VENV ?= .venv-kernels
GPU_VENV ?= .venv-gpu
# The first of these that works and is new enough; `make test PYTHON=/path/to/python` names another.
PYTHONS := $(or $(PYTHON),python3.11 python3 python3.13 python3.12 python3.14 python)
# The parity tests compare with PyTorch on the CPU. On Linux the plain name may bring gigabytes of CUDA, so
# the CPU build is asked for by its full version.
TORCH ?= torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
# More arguments for pytest: make test PYTEST_ARGS="-k generation"
PYTEST_ARGS ?=

help:
	@echo "make demo    the model inside the package writes Python"
	@echo "make test    run the tests"
	@echo "make test-kernels  the GPU kernels in interpreters and compilers: no GPU, but Python 3.12 or newer"
	@echo "make gpu     on a machine with an NVIDIA GPU: the kernels' tests on it, then the benchmark"
	@echo "make lint    ruff and pyright"
	@echo "make clean   remove the virtual environments and what tools left"

demo: $(DEMO_VENV)/.installed
	@echo "==> mamba2-jax generate: a few seconds of compiling, then Python"
	@$(DEMO_VENV)/bin/mamba2-jax generate --echo --max-new-tokens 160 \
		--temperature 0.6 --top-p 0.9 --repetition-penalty 1.05 --seed 0 \
		$$'class Queue:\n    """A queue of items."""\n\n    def __init__(self'

test: $(VENV)/.installed
	@echo "==> pytest"
	@$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow and not gpu" $(PYTEST_ARGS)

test-kernels:
	@KERNELS_VENV=$(KERNELS_VENV) KERNELS_PYTHON=$(KERNELS_PYTHON) tests/kernels/run $(PYTEST_ARGS)

$(GPU_VENV)/.installed: PYTHONS := $(or $(PYTHON),python3.12 python3.13 python3.14 python3)
gpu: $(GPU_VENV)/.installed
	@$(GPU_VENV)/bin/python benchmarks/ssd.py --check
	@echo "==> pytest: the kernels on this GPU against the float64 recurrence"
	@JAX_PLATFORMS=cuda,cpu $(GPU_VENV)/bin/python -m pytest tests/gpu -m gpu -n 0 --override-ini addopts= -rs $(PYTEST_ARGS)
	@echo "==> benchmarks/ssd.py: medians of device time"
	@$(GPU_VENV)/bin/python benchmarks/ssd.py

lint: $(VENV)/.installed
	@echo "==> ruff, pyright"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(KERNELS_VENV) $(KERNELS_VENV)-next $(GPU_VENV) build dist *.egg-info .pytest_cache .ruff_cache .coverage

.PHONY: help demo test test-kernels gpu lint clean

$(DEMO_VENV)/.installed: pyproject.toml
	$(call make-venv,$(DEMO_VENV))
	@echo "==> installing the package (JAX, Flax, transformers): a minute or two"
	@$(DEMO_VENV)/bin/pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed: pyproject.toml
	$(call make-venv,$(VENV))
	@echo "==> installing the package and the tools of the tests: a few minutes"
	@$(VENV)/bin/pip install --disable-pip-version-check -e '.[dev]'
	@echo "==> installing $(TORCH)"
	@$(VENV)/bin/pip install --disable-pip-version-check '$(TORCH)' || { \
		echo "==> $(TORCH) is not to be had here: the tests that compare with PyTorch will be skipped."; \
		echo "    To run them, install a CPU build of PyTorch into $(VENV) and repeat make test."; }
	@touch $@

# Triton's kernels want these versions together; the rest of the package would take newer ones.
$(GPU_VENV)/.installed: pyproject.toml
	@nvidia-smi -L >/dev/null 2>&1 || { echo "make gpu: needs an NVIDIA GPU; nvidia-smi finds none here" >&2; exit 1; }
	$(call make-venv,$(GPU_VENV))
	@echo "==> installing the package with JAX for CUDA 13: several gigabytes, Python 3.12 or newer"
	@$(GPU_VENV)/bin/pip install --disable-pip-version-check -e '.[cuda]' 'jax[cuda13]==0.11.2' triton==3.6.0 \
		pytest pytest-xdist beartype
	@touch $@

# $(call make-venv,FOLDER): a virtual environment there, unless it has one, from the first Python that will do.
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
