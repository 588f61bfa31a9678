# `make` lists what can be made. The first target that needs it creates .venv and installs Farspan there.

PYTHON ?= python3
PYTEST_FLAGS ?=
# Two at a time: many tests start processes of their own.
PYTEST := .venv/bin/pytest -n 2 --dist worksteal
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-all lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: .venv/installed ## Create .venv and install Farspan with the versions of constraints.txt

quickstart: venv ## Train a small decoder on real text, each sequence split over two processes
	$(BIN)/farspan prepare configs/quickstart.yaml
	$(BIN)/farspan train configs/quickstart.yaml

test: venv ## Run the CPU tests, with samples of the large products
	$(PYTEST) -m "not full" $(PYTEST_FLAGS)

test-all: venv ## Run every test that this machine can run, with the whole products
	$(PYTEST) $(PYTEST_FLAGS)

lint: venv ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=typings $(BIN)/mypy --explicit-package-bases typings/farspan

clean: ## Remove .venv and caches; prepared text and runs stay
	rm -rf .venv build farspan.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last: an installation that was interrupted is taken up again.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Farspan needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another one with `make PYTHON=python3.11`." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
