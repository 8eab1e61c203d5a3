# make demo | demo-all | test | bench: in .venv, which they make; a second run re-uses what the first made
# make gpu: with the Python that is there and its torch, downloading nothing
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo demo-all test bench gpu build clean

# the first Python 3.11 or newer
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$p" && break; done)
# more words for the command: make demo ARGS="--epochs 3", make test ARGS="-k coupling"
ARGS ?=
# processes that test; 0 is this one
WORKERS ?= auto
OUT ?= benchmarks/results

# threads that wait do not spin: several processes share the cores
WORKING := OMP_WAIT_POLICY=passive

BIN := .venv/bin
READY := .venv/.ready
BUILT := .venv/.built

help:
	@echo 'make demo   trains a flow on real digits and draws samples'
	@echo 'make demo-all  runs every demo and puts pictures and figures on one page (quickly: ARGS=--quick)'
	@echo 'make test   runs every test'
	@echo 'make bench  runs the benchmarks'
	@echo 'make gpu    builds with CUDA, tests and measures, with the Python and torch that are there'
	@echo 'make build  makes .venv and builds the extension; make clean removes what was built'

demo: $(BUILT)
	$(BIN)/python -m pyflow demo nice $(ARGS)

demo-all: $(BUILT)
	$(BIN)/python -m pyflow demo all $(ARGS)

test: $(BUILT)
	$(WORKING) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

bench: $(BUILT)
	$(BIN)/python -m pyflow bench $(ARGS)

build: $(BUILT)

$(READY): requirements.txt requirements-torch.txt .ci/environment.py
	@test -n '$(PYTHON)' || { echo 'pyflow: Python 3.11 or newer is not on PATH; make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) .ci/environment.py .venv
	@touch $@

$(BUILT): $(READY) pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@echo building the native modules
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
	@# without a compiler everything runs on plain torch, and the next make looks again
	@PYFLOW_NATIVE=1 $(BIN)/python -W ignore setup.py --quiet --version >/dev/null && touch $@ || echo 'pyflow: going on with plain torch' >&2

gpu:
	@test -n '$(PYTHON)' || { echo 'pyflow: Python 3.11 or newer is not on PATH; make gpu PYTHON=/path/to/python' >&2; exit 1; }
	PYFLOW_NATIVE=1 PYFLOW_CUDA=1 CUDAARCHS=native $(PYTHON) setup.py --quiet build_ext --inplace
	mkdir -p $(OUT)
	$(PYTHON) -m pyflow info | tee $(OUT)/gpu-info.txt
	tests=0; $(PYTHON) -m pytest --doctest-ignore-import-errors 2>&1 | tee $(OUT)/gpu-tests.txt || tests=$$?; \
	  $(PYTHON) -m pyflow bench --device cuda --out $(OUT) $(ARGS) 2>&1 | tee $(OUT)/gpu-bench.txt; exit $$tests

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .benchmarks $(BUILT) pyflow/*.so
	find pyflow triton_kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
