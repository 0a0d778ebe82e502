# Every target sets up what it needs; a fresh Linux machine with Python 3.11 and make will do.
#
# torch comes first, in a pip command of its own, and as the one release the exporter is written
# for. On a machine with a GPU, install the build of torch that fits its driver into .venv before
# the first `make`: pip then finds the requirement satisfied and leaves it alone.

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH  := torch==2.13.0
RTX    := .[tensorrt-rtx]
.DEFAULT_GOAL := help
.PHONY: help demo test lint types layers wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

# Stamps: made again when pyproject.toml changes.
$(VENV)/torch.stamp: pyproject.toml
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH)"
	@$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/run.stamp: $(VENV)/torch.stamp
	@echo "installing lcexport"
	@$(PIP) install -e .
	@touch $@

# The demo can do without: no stamp where it cannot be installed, so the next run tries again.
$(VENV)/rtx.stamp: $(VENV)/run.stamp
	@echo "installing TensorRT for RTX"
	@$(PIP) install -e "$(RTX)" >$(VENV)/rtx.log 2>&1 && mv $(VENV)/rtx.log $@ || true

$(VENV)/dev.stamp: $(VENV)/torch.stamp
	@echo "installing lcexport and the tools its tests need"
	@$(PIP) install -e ".[dev]"
	@touch $(VENV)/run.stamp $@

demo: $(VENV)/run.stamp $(VENV)/rtx.stamp  ## a trained checkpoint, its bundles, and videos, in demo/
	@bash tools/demo.sh $(BIN) $(VENV)/rtx.log

# A process for each processor, and one thread in each: more would only wait for each other.
test: $(VENV)/dev.stamp  ## all tests that need no GPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu"

lint: $(VENV)/dev.stamp  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp  ## pyright, with stubs made from TensorRT's bindings
	@$(BIN)/python tools/make_trt_stubs.py
	@$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(VENV)/dev.stamp  ## import-linter: arrows point one way
	@$(BIN)/lint-imports

wheel: $(VENV)/dev.stamp  ## dist/*.whl, with its contents checked
	@rm -rf dist build
	@$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	@rm -rf build
	@$(BIN)/python tools/inspect_wheel.py dist/*.whl

clean:  ## remove what make made, but not .venv
	@rm -rf demo dist build .pytest_cache .ruff_cache .import_linter_cache .hypothesis
