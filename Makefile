# `make` prints this list. PYTHON= chooses the interpreter that .venv is made with, VENV= another folder for it.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo_output
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := arm_hf modeling training hub_cards tests setup.py
USER_READY := $(VENV)/.ready-user
DEV_READY := $(VENV)/.ready-dev

.DEFAULT_GOAL := help
.PHONY: help demo install test test-slow check style types bench wheel card clean

help: ## Print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(USER_READY) ## Segment two photos with words and say where the pictures are
	$(PY) -m arm_hf.demo --out $(OUT)

install: $(DEV_READY) ## Make .venv with the package (editable) and all that tests and checks need

test: $(DEV_READY) ## Run the default tests
	$(PY) -m pytest

test-slow: $(DEV_READY) ## Run the tests that the default leaves out
	$(PY) -m pytest -m slow

check: $(DEV_READY) types ## Lint, check the format, check the types
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	cd build/types && $(abspath $(PY)) -m mypy --config-file ../../pyproject.toml -p arm_hf

style: $(DEV_READY) ## Mend what lint can mend and format the code
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

bench: $(USER_READY) ## Measure every method against a plain CLIP forward
	$(PY) -m arm_hf.cli benchmark --out bench_output

wheel: $(DEV_READY) ## Build the wheel into dist/
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

card: $(DEV_READY) ## Write cards and the README's tables anew from hub_cards/results
	$(PY) -m arm_hf.hub_cards.build_card
	$(PY) -m arm_hf.hub_cards.readme_tables

clean: ## Remove what builds, tests and the demo left (the .venv stays)
	rm -rf build dist demo_output bench_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find arm_hf modeling training hub_cards tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The layout of an installed copy as links: type checkers do not read the folder mapping of setup.py.
types:
	@rm -rf build/types && mkdir -p build/types/arm_hf
	@ln -s $(CURDIR)/arm_hf/* $(CURDIR)/modeling $(CURDIR)/training $(CURDIR)/hub_cards build/types/arm_hf/

$(PY):
	$(PYTHON) -m venv $(VENV)

$(USER_READY): setup.py pyproject.toml | $(PY)
	@echo "Installing the package and what it needs into $(VENV) (the first time takes some minutes) ..."
	$(PIP) install --quiet --editable '.[demo]'
	@touch $@

$(DEV_READY): setup.py pyproject.toml | $(PY)
	@echo "Installing the package and what tests and checks need into $(VENV) (the first time takes some minutes) ..."
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(USER_READY)
