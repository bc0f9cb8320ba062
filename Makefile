# Two commands do everything: `make serve` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := configs/constraints.txt
# Installed is what this stamp is newer than; nothing is reinstalled while it is.
STAMP := $(VENV)/.installed

.PHONY: setup serve test lint types fuzz bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

serve: $(STAMP)
	$(BIN)/quire serve $(MODEL) $(ARGS)

test: lint types
	$(BIN)/pytest

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

fuzz: $(STAMP)
	QUIRE_FUZZ_EXAMPLES=2000 $(BIN)/pytest tests/server/test_fuzz.py --timeout=0

bench: $(STAMP)
	$(BIN)/python -P benchmarks/memory.py
	$(BIN)/python -P benchmarks/scheduling.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
