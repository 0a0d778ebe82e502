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
# Small, so that a laptop's processor decodes all the demo's videos in a minute.
SIZE   := 96x144x9
DEMO   := --res $(SIZE) --task t2v,i2v,vc,refine --cond-frames 5 --refine-size 128x192
PROMPT := a paper boat drifts down a rainy street at night
define LAST_FRAME
from PIL import Image; from lcexport.runtime.media import read_video; \
Image.fromarray(read_video('demo/text.mp4')[0][-1]).save('demo/image.png')
endef

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
	@$(PIP) install -e "$(RTX)" >$(VENV)/rtx.log 2>&1 && touch $@ || true

$(VENV)/dev.stamp: $(VENV)/torch.stamp
	@echo "installing lcexport and the tools its tests need"
	@$(PIP) install -e ".[dev]"
	@touch $(VENV)/run.stamp $@

demo: $(VENV)/run.stamp $(VENV)/rtx.stamp  ## a small checkpoint, its bundles, and videos, in demo/
	@rm -rf $(addprefix demo/,checkpoint bundle bundle.building bundle-rtx bundle-rtx.building \
	    text.mp4 image.png image.mp4 continuation.mp4 refined.mp4 contact-sheet.png)
	@mkdir -p demo
	@echo "1/5 a small checkpoint with random weights"
	@$(BIN)/lcexport demo-checkpoint demo/checkpoint
	@echo "2/5 from the checkpoint to a bundle for text, images, continuation and refinement"
	@$(BIN)/lcexport build --model demo/checkpoint $(DEMO) -o demo/bundle
	@echo "3/5 the bundle against its golden outputs"
	@$(BIN)/lcexport verify demo/bundle
	@echo "4/5 videos: from a prompt, from an image, from a video, and one refined"
	@$(BIN)/lcexport generate demo/bundle --prompt "$(PROMPT)" --res $(SIZE) --steps 8 --out demo/text.mp4
	@$(BIN)/python -c "$(LAST_FRAME)"
	@$(BIN)/lcexport generate demo/bundle --prompt "$(PROMPT)" --image demo/image.png \
	    --res $(SIZE) --steps 8 --out demo/image.mp4
	@$(BIN)/lcexport generate demo/bundle --prompt "$(PROMPT)" --video demo/text.mp4 \
	    --res $(SIZE) --steps 8 --out demo/continuation.mp4
	@$(BIN)/lcexport refine demo/bundle demo/text.mp4 --prompt "$(PROMPT)" --out demo/refined.mp4
	@$(BIN)/lcexport contact-sheet demo/contact-sheet.png "text to video=demo/text.mp4" \
	    "image to video=demo/image.mp4" "continuation=demo/continuation.mp4" \
	    "refined: larger, twice the frames=demo/refined.mp4"
	@echo "5/5 the same graphs in bf16, compiled for RTX cards on this processor"
	@if [ -e $(VENV)/rtx.stamp ]; then \
	    $(BIN)/lcexport build --model demo/checkpoint $(DEMO) --precision bf16 --only compile \
	        --backend tensorrt-rtx -o demo/bundle-rtx && \
	    $(BIN)/lcexport inspect demo/bundle-rtx; \
	else \
	    echo "    skipped: tensorrt-rtx cannot be installed here, $(VENV)/rtx.log says why"; \
	fi
	@printf '%s\n' "" \
	    "  checkpoint      demo/checkpoint/" \
	    "  bundle          demo/bundle/" \
	    "  RTX bundle      $$(ls -d demo/bundle-rtx 2>/dev/null || echo skipped)" \
	    "  videos          demo/text.mp4, image.mp4, continuation.mp4, refined.mp4" \
	    "  contact sheet   demo/contact-sheet.png" "" \
	    "The weights are random: the videos show that the pieces fit, not what the model can paint." \
	    "Next:" "" \
	    "  $(BIN)/lcexport doctor" \
	    "  $(BIN)/lcexport inspect demo/bundle" \
	    "  $(BIN)/lcexport verify demo/bundle --level video" \
	    "  $(BIN)/lcexport build --res demo --add -o demo/bundle" \
	    "  $(BIN)/lcexport plan --model demo/checkpoint --res 480p,720p --only export"

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
