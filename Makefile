# One command for everything: `make check` does what CI does. Needs only python3 (3.11 or newer) and make.

PYTHON ?= python3
WORKERS ?= 2
MINUTES ?= 10
BIN := .venv/bin
STAMP := .venv/.hansa-installed
# Each test worker keeps to one thread, so that workers do not fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all soak check lint types layers doctest docs format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install hansa with every extra, once

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hansa needs Python 3.11 or newer, found %d.%d; try: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing hansa and its tools into .venv (some minutes, once)"
	@$(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

demo: setup ## four hospitals learn one model together, over mutual TLS
	$(BIN)/hansa demo

# Many tests keep real deadlines of tenths of a second, which a busy machine may break: what fails beside others is run
# once more, alone, and must pass then.
test: setup ## the fast tests; any warning is an error
	$(PYTEST) -n $(WORKERS) || { test $$? -eq 1 && $(PYTEST) --last-failed --last-failed-no-failures none; }

test-all: setup ## the slow tests too
	$(PYTEST) -n $(WORKERS) -m "" --durations=10

soak: setup ## kill coordinators and clients at random, for MINUTES=10
	$(BIN)/python scripts/soak.py --minutes $(MINUTES)

check: lint types layers docs doctest ## all that CI does; the tests come last
	@$(MAKE) --no-print-directory test

lint: setup ## format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup ## strict types
	$(BIN)/mypy

layers: setup ## imports point down
	$(BIN)/lint-imports --no-logo

doctest: setup ## the examples in docstrings
	$(PYTEST) -q --doctest-modules src scripts

docs: setup ## the site, in build/docs; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup ## rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

clean: ## remove what was built (but not .venv)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests examples benchmarks scripts -name __pycache__ -type d -exec rm -rf {} + 2>/dev/null || true
