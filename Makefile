# make demo and make test set up what they need; everything lives in $(VENV).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Without an NVIDIA GPU a CPU build of torch is enough: the constraints pin the release that pip offers one for.
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),,--constraint .ci/cpu-constraints.txt)

.PHONY: demo test lint format bench clean

demo: $(INSTALLED)  ## run FrameFusion on the two shipped clips and draw what it did
	$(BIN)/fftriton run --compare --out fftriton-out

test: $(INSTALLED)  ## the whole suite; without a GPU the kernels run in Triton's interpreter
	$(BIN)/pytest

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info fftriton-out

$(INSTALLED): setup.py .ci/cpu-constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info, "fftriton needs Python 3.10 or newer: make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@
