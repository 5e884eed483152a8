# SPDX-License-Identifier: Apache-2.0
# Every target makes what it needs: a virtual environment in .venv, with the package installed from this tree.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The one place that pins ruff is pyproject.toml; a test holds the pre-commit hook to it.
RUFF   := $(shell sed -n 's/.*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test bench gpu lint clean

demo: $(VENV)/.installed  ## train on the rendered data set, from nothing to a report
	$(BIN)/fastreid-u train synthetic

test: $(VENV)/.installed  ## the whole test suite; no GPU needed
	$(BIN)/python -m pytest

bench: $(VENV)/.installed  ## the benchmarks: equality first, then the clock
	$(BIN)/python -m pytest --benchmark-only

# On a machine without network: uses the environment of $(PYTHON), and installs this tree into it.
gpu:  ## on a CUDA machine: build, GPU tests, sanitizer, ceilings, kernels, a training run; JSON, and a table
	$(PYTHON) benchmarks/gpu

gpu-%:  ## one stage of it: gpu-build, gpu-test, gpu-sanitizer, gpu-ceilings, gpu-kernels, gpu-train
	$(PYTHON) benchmarks/gpu $*

lint: $(VENV)/.linter  ## what the pre-commit hook and CI check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove everything that a target made
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable: Python sources are read from the tree, so only what is compiled or declared makes this step run again.
$(VENV)/.installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

$(VENV)/.linter: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(RUFF)"
	touch $@
