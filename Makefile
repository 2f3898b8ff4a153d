# `make` prints this list. PYTHON= chooses the interpreter that .venv is made with, VENV= another folder for it.
# TESTS= are further words for pytest, such as TESTS="tests/modeling -x" or TESTS="--durations=15 --cov".
#
# The default tests take about 8 minutes on two cores. Those marked slow are left out of them because each takes from ten
# seconds to minutes: trainings and evaluations in several processes that are killed and go on, publishing and loading in
# fresh interpreters, exports to ONNX and torch.export, the benchmark, big synthetic inputs, notebooks, the page in a
# browser. `make quickstart` and `make test-app` make virtual environments of their own (some minutes and GB each).

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo_output
TESTS ?=
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := arm_hf modeling training hub_cards tests setup.py
USER_READY := $(VENV)/.ready-user
DEV_READY := $(VENV)/.ready-dev
APP_VENV ?= $(VENV)-app
APP_PY := $(APP_VENV)/bin/python
APP_READY := $(APP_VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo install test test-slow app-ready test-app quickstart check style types bench wheel card clean

help: ## Print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(USER_READY) ## Segment two photos with words and say where the pictures are
	$(PY) -m arm_hf.demo --out $(OUT)

install: $(DEV_READY) ## Make .venv with the package (editable) and all that tests and checks need

test: $(DEV_READY) ## Run the default tests
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(TESTS)

test-slow: $(DEV_READY) ## Run the tests that the default leaves out
	$(PY) -m pytest -m slow $(TESTS)

app-ready: $(APP_READY) ## Make the environment of the page's tests

test-app: $(APP_READY) ## Run the page's tests, in a browser too if chromium is there
	$(APP_PY) -m pytest -m 'slow or not slow' tests/arm_hf/test_app.py

quickstart: $(DEV_READY) ## Install the wheel into an empty environment and run the README's quick start there
	$(PY) tests/packaging/quick_start.py

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

# A second one, because gradio needs an older pillow than all the other tests run with.
$(APP_READY): setup.py pyproject.toml
	@echo "Installing the package and what the page's tests need into $(APP_VENV) (takes some minutes) ..."
	$(PYTHON) -m venv $(APP_VENV)
	$(APP_PY) -m pip --disable-pip-version-check install --quiet --no-compile --editable '.[app,test-app]'
	@touch $@

$(DEV_READY): setup.py pyproject.toml | $(PY)
	@echo "Installing the package and what tests and checks need into $(VENV) (the first time takes some minutes) ..."
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(USER_READY)
