# Everything a newcomer needs: `make demo`, `make test`, `make run`, `make lint`, `make real`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
MUTATION := $(VENV)/.mutation
PAGE := $(VENV)/.page
POLICIES := $(VENV)/policies
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint fuzz planted mutants run real page bench policies picture examples deploy rollback try-deploy clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip
	$(PIP) --editable .
	touch $(INSTALLED)

$(READY): $(INSTALLED)
	$(PIP) --group dev
	touch $(READY)

$(MUTATION): $(READY)
	$(PIP) --group mutation
	touch $(MUTATION)

$(PAGE): $(READY)
	$(PIP) --group page
	touch $(PAGE)

demo: $(INSTALLED) ## the broker at work on a simulated card, then the same without it
	$(BIN)/mgpu demo

test: $(READY) lint ## lint, then every test that takes minutes, not hours
	$(BIN)/pytest

lint: $(READY) ## ruff, mypy --strict and the arrow of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: $(INSTALLED) ## the properties with fresh seeds, for SECONDS=60, or once more with SEED=N
	$(BIN)/mgpu fuzz --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED))

planted: $(READY) ## each planted bug of the core, and which property catches it, as a table
	$(BIN)/python -m tests.planted.run

mutants: $(MUTATION) ## small changes everywhere in the core, and which no test notices (an hour)
	$(BIN)/python -m tests.planted.mutants

run: $(INSTALLED) ## the broker in front of the services of config/consumers.yaml
	$(BIN)/mgpu serve --config config/consumers.yaml

real: $(READY) ## the broker in front of real services, on this machine's processor (first a C++ compiler's work)
	$(BIN)/python tests/real/run.py

page: $(PAGE) ## ComfyUI's own page in a headless Chromium, through the broker (Debian: chromium)
	$(BIN)/python -m tests.page.run $(if $(PICTURE),--picture "$(PICTURE)")

# HOST, SSH, PREFIX, CONFIG and PYTHON, given on the command line, are in the script's environment.
deploy: ## the commit that is checked out, on HOST=[USER@]NAME: built, checked, started, or undone
	@sh systemd/deploy.sh install

rollback: ## HOST=[USER@]NAME goes back to the release that ran before
	@sh systemd/deploy.sh rollback

try-deploy: ## deploy and rollback against a system of its own (root; Debian with systemd-container)
	tests/deploy/try.sh

bench: $(INSTALLED) ## what a step costs, what the broker adds to a request, how policies compare, as tables
	$(BIN)/mgpu bench

policies: $(INSTALLED) ## docs/schedule.svg and its tables: policies on drawn arrivals, and with TRACE=DIR on recorded ones (an hour)
	mkdir -p $(POLICIES)
	$(BIN)/mgpu bench schedule --json > $(POLICIES)/services.json
	for slots in $(if $(TRACE),1 2 3 4); do \
		$(BIN)/mgpu bench schedule --trace "$(TRACE)" --slots $$slots --json \
			> $(POLICIES)/slots-$$slots.json || exit 1; \
	done
	$(BIN)/python docs/draw_schedule.py $(POLICIES)

picture: $(INSTALLED) ## docs/demo.svg anew, from a demo, and docs/timeline.svg, from a log
	$(BIN)/python docs/draw_demo.py
	$(BIN)/python docs/draw_timeline.py

examples: $(READY) ## the logs of the incidents in docs/debugging.md recorded anew, and what is shown of them
	$(BIN)/python -m tests.incidents.record

clean: ## what the other targets made
	rm -rf $(VENV) .venv-real .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
