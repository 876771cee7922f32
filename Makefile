# The two commands: `make quickstart` and `make test`. PYTHON chooses the interpreter (3.11 or later), VENV where it is set up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint requirements.lock

.PHONY: quickstart test lint

quickstart: $(VENV)/run.stamp
	$(BIN)/python -m sea_jax.sft --config=configs/quickstart_sft.py
	$(BIN)/python -m sea_jax.train --config=configs/quickstart.py $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sea_jax configs benchmarks tests

$(VENV)/run.stamp: requirements.txt requirements.lock
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or later is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt
	touch $@

$(VENV)/test.stamp: requirements-test.txt $(VENV)/run.stamp
	$(PIP) --requirement requirements-test.txt
	touch $@
