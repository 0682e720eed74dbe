# Two commands: `make sweep` and `make test`. The rest is listed by `make help`.
PYTHON ?= python3
SWEEP  ?= sweeps/quickstart.yaml
PORT   ?= 5000
# More words for pip, such as PIP_ARGS="--index-url https://…" for another build of torch.
PIP_ARGS ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup sweep report ui test lint check clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo "  SWEEP=path chooses the spec (now $(SWEEP))"

setup: $(VENV)/.runtime ## Install lorasweep into .venv

sweep: $(VENV)/.runtime ## Run SWEEP to its report; again = go on where it stopped
	@$(BIN)/lorasweep run $(SWEEP)

report: $(VENV)/.runtime ## Write SWEEP's report again
	@$(BIN)/lorasweep report $(SWEEP)

ui: $(VENV)/.runtime ## Open the MLflow UI on SWEEP's store (PORT=5000)
	@$(BIN)/lorasweep ui $(SWEEP) --port $(PORT)

test: $(VENV)/.test ## Install what tests need, then run them
	@$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.dev ## Style, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: lint test ## All that CI asks, but for the quickstart

clean: ## Remove the virtual environment and caches; never mlruns/
	rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# Stamps: an install is done again when what it depends on has changed.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes, once)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(PIP) -e '.[dev,test]'
	@touch $@
