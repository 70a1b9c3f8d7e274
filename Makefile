# Everything from a bare machine with make and Python 3.11 or newer. `make help` lists the targets.

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
# Another index for torch's builds, for example https://download.pytorch.org/whl/cpu: without it
# pip's own configuration decides, and the public index gives Linux the large CUDA build.
TORCH_INDEX ?=
MODEL       ?= smollm2
# Processes that share the tests, file by file; 0 runs them in one, for a debugger.
TEST_JOBS   ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
# More arguments for pytest, polyadapt serve or the benchmark.
ARGS        ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	-c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Some shells export HOST; only an argument of make itself may choose what the server binds.
SERVE_FLAGS := $(if $(filter command line,$(origin HOST)),--host $(HOST)) \
	$(if $(filter command line,$(origin PORT)),--port $(PORT))

# The demo adapters are of the default model; on another one the server would refuse them.
DEMO := $(if $(filter smollm2,$(MODEL)),--demo)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help docs install serve model test check kubernetes-tools kubernetes-base test-crashes test-rolling test-ray test-image bench bench-families bench-gpu bench-mark-served bench-overhead bench-peers bench-residency bench-text-marks simulate experiments clean

help: ## List these targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON VENV MODEL HOST PORT TEST_JOBS ARGS, and TORCH_INDEX=URL for a CPU build of torch"

install: $(VENV)/.dev ## Install the package and the development tools into .venv

serve: $(VENV)/.runtime ## Run the server on 127.0.0.1:8000 with SmolLM2 and its demo adapters
	@exec $(BIN)/polyadapt serve --model $(MODEL) $(DEMO) $(SERVE_FLAGS) $(ARGS)

model: $(VENV)/.runtime ## Fetch the default model into the home (serve and test do this too)
	@$(BIN)/polyadapt model fetch smollm2

test: $(VENV)/.dev $(if $(POLYADAPT_TEST_MODEL),,model) kubernetes-tools ## Run every test (once fetched, no network)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder \
		-m "not slow" $(ARGS)

test-crashes: $(VENV)/.dev ## Kill 200 uploads at every step, on PostgreSQL and S3 (minutes)
	POLYADAPT_TEST_CRASH_TRIALS=200 $(BIN)/python -m pytest --timeout 3600 -s \
		tests/polyadapt_store/test_crashes.py -k whenever_one_is_killed $(ARGS)

check: $(VENV)/.dev ## Check the format, the lint rules and the types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

docs: $(VENV)/.dev ## Build the documentation as a site into site/, without the network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

test-rolling: $(VENV)/.dev ## Restart two servers one by one under load (minutes)
	$(BIN)/python -m pytest -m slow tests/deploy/test_rolling_restart.py $(ARGS)

test-ray: $(VENV)/.dev ## Serve from three simulated nodes of a Ray cluster (minutes; installs Ray)
	$(PIP_INSTALL) -e '.[ray]'
	$(BIN)/python -m pytest -m slow tests/ray_serve $(ARGS)

test-image: $(VENV)/.dev model ## Build the image and run it: buildah, podman, runc, debootstrap, as root (minutes)
	$(BIN)/python -m tools.image_trial $(ARGS)

kubernetes-tools: $(VENV)/.dev ## Fetch helm and kubectl into the home (37 MiB; test does this too)
	@$(BIN)/python -m tools.kubernetes_tools

kubernetes-base: $(VENV)/.dev ## Write deploy/kubernetes from the chart
	$(BIN)/python -m tools.kubernetes_base

bench: $(VENV)/.dev model ## Measure the server beside PEFT and transformers (about 15 minutes)
	$(BIN)/python -m bench.run $(ARGS)

bench-families: $(VENV)/.dev model ## Measure what each family costs beside plain LoRA (some minutes)
	$(BIN)/python -m bench.families $(ARGS)

bench-gpu: $(VENV)/.dev ## Check and measure a CUDA device (at most 8 minutes)
	$(BIN)/python -m bench.gpu $(ARGS)

bench-mark-served: $(VENV)/.dev model ## Train a mark of SmolLM2, serve it, compare with offline (minutes)
	$(BIN)/python -m bench.mark_lm_served $(ARGS)

bench-overhead: $(VENV)/.dev model ## Measure what a step and a token cost beside the model
	$(BIN)/python -m bench.overhead $(ARGS)

bench-peers: $(VENV)/.dev model ## Install llama.cpp, mistral.rs and vLLM, and measure beside them
	$(BIN)/python -m bench.compare $(ARGS)

bench-residency: $(VENV)/.dev model ## Measure what loading and evicting costs (some minutes)
	$(BIN)/python -m bench.residency $(ARGS)

bench-text-marks: $(VENV)/.dev model ## Measure marks in texts: cost, errors, power (half an hour)
	$(BIN)/python -m bench.text_marks $(ARGS)

simulate: $(VENV)/.dev ## Simulate the router on 1,000 devices, held to two real engines first
	$(BIN)/python -m bench.simulate $(ARGS)

experiments: $(VENV)/.dev ## Train tiny models to see the papers' effects (slow: about 30 minutes)
	$(BIN)/python -m bench.experiments $(ARGS)

clean: ## Remove the environment, caches and build results (not the home with its models)
	rm -rf $(VENV) dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than what they were made from; a failed install leaves none.
$(VENV)/.runtime: pyproject.toml $(CONSTRAINTS) $(BIN)/python
	@echo "Installing polyadapt into $(VENV) (downloads torch and transformers the first time) ..."
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing the development tools into $(VENV) ..."
	@$(PIP_INSTALL) -e ".[dev]"
	@touch $@

# Order matters in the messages: the interpreter first, then the module that makes environments.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: $(PYTHON) was not found; install Python 3.11 or newer," \
			"or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Polyadapt needs Python 3.11 or newer," \
			"name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments (no venv or ensurepip);" \
			"on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
