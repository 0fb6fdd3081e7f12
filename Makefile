# What a person or a CI runs here. `make help` lists it.

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS   += --no-print-directory

# The interpreter that builds the environment: `make env PYTHON=/opt/python3.13/bin/python3`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV  ?= .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# Seconds for each fuzz target, minutes for the soak, parallel workers of the suite.
SECONDS := 60
WORKERS := 2
KILLS   := 200

# Branch coverage: these tests alone must reach these packages.
COVERED := stp/core stpd/store
COVER   := tests/core tests/faults tests/store
FLOOR   := 95

.PHONY: help env check test coverage demo soak fuzz bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(STAMP)  ## build .venv and install the project into it (PYTHON=…)

$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "make env: no Python 3.11 or newer on the PATH." >&2; \
		echo "  install one, or name it: make env PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if ! command -v "$(PYTHON)" >/dev/null; then echo "make env: there is no $(PYTHON)." >&2; exit 1; fi
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "make env: $(PYTHON) is $$("$(PYTHON)" -V 2>&1); stpd needs Python 3.11 or newer." >&2; exit 1; fi
	@if [ ! -x $(BIN)/python ] && ! "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null; then \
		echo "make env: $(PYTHON) cannot make virtual environments." >&2; \
		echo "  Debian, Ubuntu, Raspberry Pi OS: apt-get install python3-venv" >&2; exit 1; fi
	@[ -x $(BIN)/python ] || { echo "building $(VENV) with $$("$(PYTHON)" -V)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing what pyproject.toml names"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev,bench]'
	@touch $@

check: env  ## ruff, mypy --strict, the floor plan, branch coverage
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/pytest tests/test_floors.py
	@$(MAKE) coverage

coverage: env
	@rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -m "not slow and not real and not many" $(COVER)
	@$(BIN)/coverage combine --quiet
	@for package in $(COVERED); do echo "branch coverage of $$package (at least $(FLOOR) %):"; \
		$(BIN)/coverage report --include="$$package/*" --skip-covered --show-missing --fail-under=$(FLOOR); done

test: env  ## the whole suite but for the long campaigns
	$(BIN)/pytest -n $(WORKERS) -m "not many" --durations=5

demo: env  ## hub, gateway, devices on this machine, with a hub that dies in the middle (KEEP=1 stays up)
	@$(BIN)/python -m bench.demo $(if $(KEEP),--keep)

soak: env  ## the long campaigns: hundreds of seeds, thousands of crashes, KILLS=200 kill -9
	$(BIN)/pytest -n $(WORKERS) -m many
	STPD_KILLS=$(KILLS) $(BIN)/pytest -s tests/real/test_kill.py

fuzz: env  ## every parser, SECONDS=60 each
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

bench: env  ## the figures in the README, measured on this machine
	@for bench in transport idle store relay latency; do $(BIN)/python -m bench.$$bench; done
	@if [ "$$(id -u)" = 0 ]; then $(BIN)/python -m bench.link; \
		else echo "bench.link needs root: sudo $(BIN)/python -m bench.link" >&2; fi

clean:  ## remove the environment and every cache
	rm -rf $(VENV) build dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
