# make setup | engines | test | check | bench | serve | clean
# Every target works on a fresh machine with python3 (with venv) and make, with no step before it.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What `make engines` builds: Hydra overrides, sweeps, and + between sets.
FLEET  ?= models=zoo-demo quant=none hardware=cpu,a100-80g + models=zoo-demo quant=fp8 hardware=l40s,rtx-4090,rtx-5090
REF    ?= zoo-demo
PORT   ?= 8000

.PHONY: setup engines test check bench serve clean help
help:
	@sed -n '1,2p' Makefile

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON) (3.11 to 3.13); on Debian or Ubuntu: apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "missing: Python 3.11 to 3.13; found $$($(PYTHON) --version); set PYTHON=python3.12 or so" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "missing: the venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.engines: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on --use-pep517 --editable '.[build,cpu,rtx,serve]'
	@touch $@

$(VENV)/.test: $(VENV)/.engines
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on --use-pep517 --editable '.[build,cpu,rtx,serve,test]'
	@touch $@

setup: $(VENV)/.engines

engines: setup
	$(BIN)/zoo engines -m $(FLEET)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: setup
	$(BIN)/zoo engines models=$(REF) hardware=cpu
	$(BIN)/zoo bench $(REF)

serve: setup
	$(BIN)/zoo engines models=$(REF) hardware=cpu
	$(BIN)/zoo serve $(REF) --port $(PORT)

clean:
	rm -rf $(VENV) build dist outputs multirun .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
