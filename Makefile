# `make serve` and `make test` are the main commands. Both create .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := configs/constraints.txt
# Packages are installed only if pyproject.toml or the constraints are newer than this file.
STAMP := $(VENV)/.installed

# Clients that cannot share .venv. npm writes NODE_STAMP when it has installed the packages.
CLIENTS := tests/clients
CLIENTS_VENV := .venv-clients
CLIENTS_STAMP := $(CLIENTS_VENV)/.installed
NODE_STAMP := $(CLIENTS)/node_modules/.package-lock.json
WEB := tests/server/web
WEB_STAMP := $(WEB)/node_modules/.package-lock.json

OLDEST_TRITON := build/oldest-triton

.PHONY: setup serve test test-web clients oldest-triton lint types fuzz bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

serve: $(STAMP)
	$(BIN)/quire serve $(MODEL) $(ARGS)

# Two processes share the work by file, so that tests of one file share its servers. Files keep their
# order: by default, xdist would run files with few tests last, and a single long test would keep one
# process busy while the other is idle. The fuzz tests run on their own, since hundreds of generated
# tests have one name, of which xdist would run only one.
FUZZ := tests/server/test_fuzz.py
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore $(FUZZ)
	$(BIN)/pytest $(FUZZ)

# Run every client of docs/api.md against a server. The first half runs in .venv, the second in the
# clients' own environment, whose warnings are not errors. LITELLM_LOCAL_MODEL_COST_MAP keeps LiteLLM
# from downloading a list of models.
clients: $(STAMP) $(CLIENTS_STAMP) $(NODE_STAMP)
	PATH="$(CURDIR)/$(CLIENTS_VENV)/bin:$$PATH" \
		$(BIN)/pytest $(CLIENTS)/test_*.py $(CLIENTS)/check_node.py $(CLIENTS)/check_lm_eval.py
	PATH="$(CURDIR)/$(BIN):$$PATH" LITELLM_LOCAL_MODEL_COST_MAP=True \
		$(CLIENTS_VENV)/bin/pytest -W default \
		$(CLIENTS)/check_openai_2.py $(CLIENTS)/check_langchain.py $(CLIENTS)/check_litellm.py

$(CLIENTS_STAMP): $(CLIENTS)/requirements.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/pip install --quiet --upgrade pip
	$(CLIENTS_VENV)/bin/pip install --quiet --requirement $<
	touch $@

$(NODE_STAMP): $(CLIENTS)/package.json $(CLIENTS)/package-lock.json
	@command -v node && command -v npm || { echo "make clients needs Node.js 20 or newer"; exit 1; }
	npm ci --prefix $(CLIENTS)
	touch $@

# Try the page in Chromium, which must be installed, as Node.js must.
test-web: $(STAMP) $(WEB_STAMP)
	$(BIN)/pytest $(WEB)/check_page.py

$(WEB_STAMP): $(WEB)/package.json $(WEB)/package-lock.json
	npm ci --prefix $(WEB)
	touch $@

# Compile the kernels with the oldest Triton that pyproject.toml allows, since its compiler refuses
# code that later ones accept. .venv has the newest.
oldest-triton: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(OLDEST_TRITON) 'triton==3.6.*'
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/pytest tests/kernels/cuda/test_compile.py

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

fuzz: $(STAMP)
	QUIRE_FUZZ_EXAMPLES=2000 $(BIN)/pytest tests/server/test_fuzz.py --timeout=0

bench: $(STAMP)
	$(BIN)/python -P benchmarks/memory.py
	$(BIN)/python benchmarks/scheduling.py

# Write the tables of flags in docs/api.md and docs/migrating.md from their declarations.
docs: $(STAMP)
	$(BIN)/python -m quire.server.flags_table docs/api.md docs/migrating.md

clean:
	rm -rf $(VENV) $(CLIENTS_VENV) $(CLIENTS)/node_modules $(WEB)/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
