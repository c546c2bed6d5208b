# Everything a newcomer needs: `make test`, `make run`, `make lint`, `make real`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help test lint run real bench deploy rollback try-deploy clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

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

# HOST, SSH, PREFIX, CONFIG and PYTHON, given on the command line, are in the script's environment.
deploy: ## the commit that is checked out, on HOST=[USER@]NAME: built, checked, started, or undone
	@sh systemd/deploy.sh install

rollback: ## HOST=[USER@]NAME goes back to the release that ran before
	@sh systemd/deploy.sh rollback

try-deploy: ## deploy and rollback against a system of its own (root; Debian with systemd-container)
	tests/deploy/try.sh

bench: $(READY) ## what a step costs and what the broker adds to a request, as tables
	$(BIN)/mgpu bench

clean: ## what the other targets made
	rm -rf $(VENV) .venv-real .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
