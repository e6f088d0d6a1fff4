# Everything here starts from Python >= 3.10 (with venv), g++ and make; `make help` lists the targets.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
OLD_TRANSFORMERS ?= transformers==4.57.6
VENV ?= .venv
DEMO_OUT ?= build/demo
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
CXX ?= g++
GPU_PYTHON ?= python3
OUT ?= build/gpu

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(abspath $(VENV))/bin
# Python compiles what it imports, and keeps it unless told not to; pip would compile everything, which takes longer than
# the rest of an installation.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
NATIVE_SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
SANITIZED := build/sanitize

# torch looks for ninja on PATH. `make gpu` takes the python of whoever calls it.
GPU_PATH := $(PATH)
export PATH := $(BIN):$(PATH)

.PHONY: help demo test test-old-transformers lint bench gpu sanitize clean

help:
	@echo "make demo      train baseline, +AL, +RE and +REAL on a small text and write a report   DEMO_ARGS=... DEMO_OUT=$(DEMO_OUT)"
	@echo "make test      the tests                                                               TEST_ARGS='-k name'"
	@echo "make test-old-transformers      the tests of the transformers integration with $(OLD_TRANSFORMERS)"
	@echo "make lint      ruff and mypy"
	@echo "make bench     CPU benchmark                                                           BENCH_ARGS=..."
	@echo "make gpu       tests, accuracy and speed on this machine's GPU, with the python that is there    OUT=$(OUT)"
	@echo "make sanitize  the native tests with address and undefined-behaviour sanitizers"
	@echo "make clean     remove builds, caches and $(VENV)"
	@echo
	@echo "Each but gpu makes its own environment in $(VENV) with $(TORCH) and $(TRITON); PYTHON=$(PYTHON), TORCH, TRITON, VENV can be set."
	@echo "Without a GPU, take PyTorch's CPU build and save gigabytes of download:"
	@echo "    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"

# The environment, torch and what a build needs: made once. PyTorch's CPU build brings no triton, whose interpreter and
# compiler the tests use; an empty TRITON leaves it out.
$(VENV)/.torch-stamp:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "tiedkl needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)" "setuptools>=77" wheel ninja
	[[ -z "$(TRITON)" || "$$(uname -sm)" != "Linux x86_64" ]] || $(INSTALL) "$(TRITON)"
	@touch $@

# The library, in place: Python files need no reinstall, native ones and the metadata do.
$(VENV)/.install-stamp: $(VENV)/.torch-stamp $(NATIVE_SOURCES)
	$(INSTALL) --no-build-isolation -e ".[compare,test]"
	@compgen -G "tiedkl/_C*.so" >/dev/null || echo "note: tiedkl._C is not built; '$(INSTALL) -v --no-build-isolation -e .' shows why"
	@touch $@

# What the tests use beyond the library itself: the frameworks it integrates with, and what the older transformers
# asks of them. pip finds tiedkl installed.
$(VENV)/.test-stamp: $(VENV)/.install-stamp
	$(INSTALL) "$(TORCH)" "tiedkl[integrations,tune]" requests httpx
	@touch $@

# transformers' older major version with what it needs in other versions, in a folder in front of the environment's own.
$(VENV)/.old-transformers-stamp: $(VENV)/.torch-stamp
	$(INSTALL) --no-deps --target $(VENV)/old-transformers "$(OLD_TRANSFORMERS)" "huggingface-hub<1" "tokenizers<0.23" "datasets<4.5"
	@touch $@

$(VENV)/.lint-stamp: $(VENV)/.install-stamp
	$(INSTALL) ruff mypy types-tqdm
	@touch $@

demo: $(VENV)/.install-stamp
	$(BIN)/tiedkl compare --out "$(DEMO_OUT)" $(DEMO_ARGS)
	@echo "The report: file://$(abspath $(DEMO_OUT))/report.html"

test: $(VENV)/.test-stamp
	$(BIN)/pytest $(TEST_ARGS)

test-old-transformers: $(VENV)/.test-stamp $(VENV)/.old-transformers-stamp
	PYTHONPATH="$(abspath $(VENV))/old-transformers" $(BIN)/pytest tests/integrations/test_transformers.py tests/integrations/test_trainer.py $(TEST_ARGS)

lint: $(VENV)/.lint-stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.install-stamp
	$(BIN)/python benchmarks/bench_cpu.py $(BENCH_ARGS)

gpu:
	PATH="$(GPU_PATH)" GPU_PYTHON="$(GPU_PYTHON)" .ci/gpu "$(OUT)"

# A second copy of the library in build/, which PYTHONPATH puts before the editable one. Leaks are not looked for:
# the interpreter's own would drown ours. libstdc++ is preloaded because libasan has to find __cxa_throw at start.
sanitize: $(VENV)/.install-stamp
	rm -rf $(SANITIZED) build/lib* build/bdist*
	TIEDKL_SANITIZE=address,undefined TIEDKL_FORCE_BUILD=1 \
	    $(INSTALL) --no-build-isolation --no-deps --target $(SANITIZED) .
	rm -rf build/lib* build/bdist*
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$(abspath $(SANITIZED))"; \
	(cd $(SANITIZED) && $(BIN)/python -c 'import torch, tiedkl._C as c; print(c.__file__, c.build_info())'); \
	if compgen -G "tests/native/test_*.py" >/dev/null; then $(BIN)/pytest tests/native; else echo "no tests/native: only the import was tried"; fi

clean:
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks tiedkl/_C*.so
	find tiedkl kernels tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
