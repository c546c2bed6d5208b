# Everything a newcomer needs: `make test`, `make run`, `make lint`, `make real`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help test lint run real clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable . --group dev
	touch $(READY)

test: $(READY) lint ## lint, then every test that takes minutes, not hours
	$(BIN)/pytest

lint: $(READY) ## ruff, mypy --strict and the arrow of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

run: $(READY) ## the broker in front of the services of config/consumers.yaml
	$(BIN)/mgpu serve --config config/consumers.yaml

real: $(READY) ## the broker in front of real speech services, on this machine's processor
	$(BIN)/python tests/real/run.py

clean: ## what the other targets made
	rm -rf $(VENV) .venv-real .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
