# SPDX-License-Identifier: Apache-2.0
# Every target makes what it needs: a virtual environment in .venv, with the package installed from this tree and the
# versions of constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NEWEST := build/newest
# The one place that pins ruff is pyproject.toml; a test holds the pre-commit hook to it.
RUFF   := $(shell sed -n 's/.*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test test-newest constraints bench gpu lint clean

demo: $(VENV)/.installed  ## train on the rendered data set, from nothing to a report
	$(BIN)/fastreid-u train synthetic

test: $(VENV)/.installed  ## the whole test suite; no GPU needed
	$(BIN)/python -m pytest

# What depends most on other people's releases: Triton, the compilers, pip. Always in an environment made anew.
test-newest: newest  ## the tests of kernels and packaging with the newest versions of everything
	$(NEWEST)/bin/python -m pytest tests/kernels tests/csrc tests/house/test_packaging.py

constraints: newest  ## the whole suite with the newest versions of everything; if it passes, they are the tested ones
	$(NEWEST)/bin/python -m pytest
	$(NEWEST)/bin/python -m pip freeze --exclude-editable > $(NEWEST)/freeze
	sed "/^[^#]/d; 1s/: .*/: $$(date +%F), $$($(NEWEST)/bin/python -V)/" constraints.txt > $(NEWEST)/constraints.txt
	grep -Ev '^(nvidia|cuda)-' $(NEWEST)/freeze >> $(NEWEST)/constraints.txt
	mv $(NEWEST)/constraints.txt constraints.txt

bench: $(VENV)/.installed  ## the benchmarks on a CPU: equality first, then the clock; JSON, and tables
	$(BIN)/python benchmarks/on_cpu.py

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
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

# A build folder of its own: .venv may be of the same Python.
.PHONY: newest
newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet -C build-dir=$(NEWEST)/build -e ".[test]"

$(VENV)/.linter: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(RUFF)"
	touch $@
