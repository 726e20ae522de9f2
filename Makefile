# make test   sets up and runs the tests and the linters     make bench   sets up and runs the benchmark
# make build  only sets up                                   make lint    only the linters
# make gpu    sets up and runs the tests on a GPU            (bench/GPU_TODO.md: what else is to be run on one)
#
# Uses the Python in use if it has torch, else makes .venv and installs into it.
# Variables: PYTHON, TORCH (requirement to install where torch is missing), FULL=1 (bench), ARGS (for pytest, bench).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))

HAS_TORCH := $(shell $(PYTHON) -c "import importlib.util as u; print(int(u.find_spec('torch') is not None))" 2>/dev/null)
ifeq ($(HAS_TORCH),1)
PY := $(PYTHON)
else
PY := $(ROOT)/.venv/bin/python
endif
SOURCES := $(shell find $(ROOT)/csrc $(ROOT)/build_support -type f ! -name "*.pyc")
# One stamp per interpreter: another environment is another installation.
STAMP := $(ROOT)/build/installed-$(shell echo "$(PY) $$($(PYTHON) -c 'import sys; print(sys.prefix)')" | cksum | cut -d' ' -f1)

.PHONY: test bench build lint gpu
# A process for each core; their threads do not spin while they wait for each other.
test: build
	cd $(ROOT) && OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --dist loadfile $(ARGS)
	$(MAKE) -f $(ROOT)/Makefile --no-print-directory lint

bench: build
	cd $(ROOT) && $(PY) -m bench $(if $(filter 1,$(FULL)),--full) $(ARGS)

gpu: build
	cd $(ROOT) && $(PY) -m perexample
	cd $(ROOT) && for part in tests ops layers; do $(PY) -m bench.gpu $$part; done

lint: build
	cd $(ROOT) && $(PY) -m ruff check .
	cd $(ROOT) && $(PY) -m ruff format --check .
	cd $(ROOT) && $(PY) -m mypy
	cd $(ROOT) && find csrc -type f | xargs "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/clang-format" --dry-run -Werror

build: $(STAMP)

$(STAMP): $(if $(filter 1,$(HAS_TORCH)),,$(ROOT)/.venv/ready) $(ROOT)/setup.py $(ROOT)/pyproject.toml $(SOURCES)
	cd $(ROOT) && $(PY) -m pip install --quiet 'setuptools>=77' ninja 'pybind11>=2.13'
	cd $(ROOT) && $(PY) -m pip install --quiet --no-build-isolation -e '.[test,bench,dev]'
	mkdir -p $(@D) && touch $@

$(ROOT)/.venv/ready:
	$(PYTHON) -m venv $(ROOT)/.venv
	$(PY) -m pip install --quiet "$(TORCH)"
	touch $@
