# demo, test, bench, lint, ...: run in .venv, which is made on first use
# gpu: uses the installed Python and torch, downloads nothing
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo demo-all test bench lint format gpu asan ubsan new-op build wheel clean

# the first Python 3.11 or newer
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$p" && break; done)
# appended to the command: make demo ARGS="--epochs 3", make test ARGS="-k coupling"
ARGS ?=
# test processes; 0 runs the tests in one process
WORKERS ?= auto
OUT ?= benchmarks/results

# waiting threads sleep instead of spinning, since several processes share the cores
WORKING := OMP_WAIT_POLICY=passive

BIN := .venv/bin
READY := .venv/.ready
BUILT := .venv/.built

help:
	@echo 'make demo   trains a flow on real digits and draws samples'
	@echo 'make demo-all  runs every demo and puts pictures and figures on one page (quickly: ARGS=--quick)'
	@echo 'make test   runs every test'
	@echo 'make bench  runs the benchmarks'
	@echo 'make docs   builds the documentation site in build/docs and checks its links'
	@echo 'make lint   checks the source: ruff, clang-format, mypy; make format rewrites what ruff and clang-format can'
	@echo 'make asan   tests the C++ kernels under the address sanitizer; make ubsan for undefined behaviour'
	@echo 'make new-op NAME=my_op  lays the files of a new family of operations, with an example that works'
	@echo 'make gpu    on a machine with a GPU: builds with CUDA, tests and measures in eight minutes, with the installed torch'
	@echo 'make wheel  builds the wheel of a release in dist, for every Python and every torch from 2.11; OUT=folder'
	@echo 'make build  makes .venv and builds the native modules; make clean removes build products'

demo: $(BUILT)
	$(BIN)/python -m pyflow demo nice $(ARGS)

demo-all: $(BUILT)
	$(BIN)/python -m pyflow demo all $(ARGS)

test: $(BUILT)
	$(WORKING) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

bench: $(BUILT)
	$(BIN)/python -m pyflow bench $(ARGS)

# there is a folder of this name
.PHONY: docs
docs: $(READY)
	@$(BIN)/python .ci/docs.py

# the C++ and CUDA files; their style is in .clang-format
CXX_FILES = $(shell find csrc tests docs -name '*.h' -o -name '*.cpp' -o -name '*.cu')

lint: $(READY)
	@for tool in ruff clang-format mypy; do test -x $(BIN)/$$tool || { echo "pyflow: $$tool is not in .venv:" \
	  'get it with .venv/bin/python -m pip install -r requirements.txt' >&2; exit 1; }; done
	@# all four run, so that one failure does not hide the others
	@failed=0; for check in 'ruff check' 'ruff format --check' 'clang-format --dry-run -Werror $(CXX_FILES)' mypy; do \
	  echo "$$check" | cut -c -60; $(BIN)/$$check || failed=1; done; exit $$failed

format: $(READY)
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# Tests under one of gcc's sanitizers, in a copy of the tree, so that the checkout keeps its release libraries. The first
# finding ends the tests and is kept in build/asan/found.*. libasan must be loaded before anything allocates, and needs
# libstdc++ beside it to see exceptions.
SANITIZED ?= tests/ops tests/hsic tests/cpu -k 'not compiles and not opcheck'
asan ubsan: $(READY)
	@mkdir -p build/$@/tree && rm -f build/$@/found.*
	@tar c --exclude=./build --exclude=./.venv --exclude=./.git --exclude='*.so' . | tar x -C build/$@/tree
	@cd build/$@/tree && PYFLOW_BUILD=$@ PYFLOW_NATIVE=1 PYFLOW_CUDA=0 $(CURDIR)/$(BIN)/python setup.py native >/dev/null
	cd build/$@/tree && found=$(CURDIR)/build/$@/found; \
	  PYTHONPATH=$$PWD $(WORKING) ASAN_OPTIONS=detect_leaks=0:log_path=$$found UBSAN_OPTIONS=print_stacktrace=1:log_path=$$found \
	  LD_PRELOAD="$(if $(filter asan,$@),$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so))" \
	  $(CURDIR)/$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -p no:cacheprovider $(SANITIZED) $(ARGS) || \
	  { cat $$found.* 2>/dev/null; exit 1; }

# NAME is in the environment of the recipe, which needs no quotes for it
new-op:
	@test -n '$(PYTHON)' || { echo 'pyflow: Python 3.11 or newer is not on PATH; make new-op PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) .ci/new_op.py "$${NAME-}"

build: $(BUILT)

wheel: OUT = dist
wheel: $(READY)
	@$(BIN)/python .ci/wheel.py '$(OUT)'

$(READY): requirements.txt requirements-torch.txt .ci/environment.py
	@test -n '$(PYTHON)' || { echo 'pyflow: Python 3.11 or newer is not on PATH; make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) .ci/environment.py .venv
	@touch $@

$(BUILT): $(READY) pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@echo building the native modules
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
	@# without a compiler everything runs on plain torch, and the next make tries again
	@PYFLOW_NATIVE=1 $(BIN)/python -W ignore setup.py --quiet --version >/dev/null && touch $@ && echo 'built; what runs here: $(BIN)/pyflow info' || echo 'pyflow: going on with plain torch' >&2

# For machines with a GPU for a short time: every stage has a time limit and writes its file before the next one starts.
# Eight minutes at most, nothing downloaded. STAGE=test or bench: the build and that stage; quick: the build, the tests of
# two families and the cases without torch.compile.
STAGE ?=
ask_gpu = $(shell nvidia-smi --query-gpu=$(1) --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z ' 'a-z-')
CARD = $(call ask_gpu,name)
ARCH = $(subst .,,$(call ask_gpu,compute_cap))
GPU_WORKERS ?= 14
GPU_TESTS = $(if $(filter quick,$(STAGE)),tests/triton/gpu/test_coupling.py tests/triton/gpu/test_hsic.py,tests/triton/gpu)
GPU_CASES = --gpu $(if $(filter quick,$(STAGE)),--quick --no-compile)
GPU_OUT = $(OUT)/$(CARD)$(if $(filter quick,$(STAGE)),-quick)

gpu:
	@case '$(STAGE)' in ''|test|bench|quick) ;; \
	  *) echo "pyflow: STAGE must be test, bench or quick, got '$(STAGE)'" >&2; exit 1 ;; esac
	@test -n '$(PYTHON)' || { echo 'pyflow: Python 3.11 or newer is not on PATH; make gpu PYTHON=/path/to/python' >&2; exit 1; }
	@test -n '$(CARD)' || { echo 'pyflow: nvidia-smi finds no GPU' >&2; exit 1; }
	mkdir -p $(GPU_OUT)
	PYFLOW_NATIVE=1 PYFLOW_CUDA=1 CUDAARCHS=$(ARCH)-real timeout 130 $(PYTHON) setup.py native 2>&1 | tee $(GPU_OUT)/build.txt
	$(PYTHON) -m pyflow info 2>&1 | tee $(GPU_OUT)/info.txt
	failed=0; \
	test '$(STAGE)' = bench || timeout -s INT -k 15 170 $(PYTHON) -m pytest -n $(GPU_WORKERS) --dist worksteal \
	  -p no:cacheprovider --tb=short --durations=15 $(GPU_TESTS) 2>&1 | tee $(GPU_OUT)/tests.txt || failed=$$?; \
	test '$(STAGE)' = test || timeout -k 15 150 $(PYTHON) -m pyflow bench $(GPU_CASES) --timeout 110 --out $(GPU_OUT) $(ARGS) 2>&1 \
	  | tee $(GPU_OUT)/bench.txt || failed=$$?; exit $$failed

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .benchmarks $(BUILT) pyflow/*.so
	find pyflow triton_kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
