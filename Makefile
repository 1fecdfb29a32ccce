# The one door: every command of the README and of CI goes through here.
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-train test lint types unit bench sim clean

help: ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): setup.cfg constraints.txt pyproject.toml
	@echo "==> Installing peerd into $(VENV) (first time: a few minutes, PyTorch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "peerd needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP) ## Create .venv and install peerd into it

demo: $(STAMP) ## Four daemons on loopback, a streamed answer, a killed server
	$(BIN)/peerd demo

demo-train: $(STAMP) ## An adapter trained through the same swarm, and a server killed meanwhile
	$(BIN)/python -m peerd.demo_train

lint: $(STAMP) ## Style rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Strict types
	$(BIN)/mypy

unit: $(STAMP) ## Tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: lint types unit ## Lint, strict types and tests

bench: $(STAMP) ## Ratios to a local loop and milliseconds per hop, from one run
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

sim: $(STAMP) ## Every scenario in virtual time, 20 seeds of some of them twice, and the simulator's own speed (within an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m netsim bench
	OMP_NUM_THREADS=1 $(BIN)/python -m netsim all --jobs 2 --repeat session-loss --repeat smoke --repeat stream-churn --within 3600 --table build/sim-table.md

clean: ## Remove the environment and build output
	rm -rf $(VENV) build dist *.egg-info
