# Everything lives in .venv, made on first use and reused until setup.cfg changes. `make help` lists the targets.
#
# torch is installed first and by itself, so that the line below alone decides which build it is:
#   make demo TORCH=torch                                                        a machine with a GPU
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"     the small CPU build, from PyTorch

VENV := .venv
BIN := $(VENV)/bin
# -qq: errors only; pip warns at length where a machine has local package directories.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
PYTHON ?= python3

# $(VENV)/.torch remembers what was asked for: left out, TORCH means "as before"; a different one installs anew.
TORCH_BEFORE := $(shell cat $(VENV)/.torch 2>/dev/null)
TORCH ?= $(or $(TORCH_BEFORE),torch==2.13.0)
ifneq ($(TORCH),$(TORCH_BEFORE))
.PHONY: $(VENV)/.torch
endif

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo demo-tnt demo-w2s demo-codeclm test test-slow test-all bench lint format docs clean

help:
	@echo "make demo       train SmolLM2-135M to follow written principles, and write a report (CPU, about twenty minutes)"
	@echo "make demo-tnt   take a stock phrase out of the same model, and show what else changed (about six minutes)"
	@echo "make demo-w2s   train the same model on the labels of its own first layers, and show what it recovered (two minutes)"
	@echo "make demo-codeclm  make instruction data with the same model, train it on that, and compare (under ten minutes)"
	@echo "make test       the tests, without those that need the real model"
	@echo "make test-slow  only those that need the real model; make test-all: both"
	@echo "make bench      speed beside the plain path and TRL: tables and a figure in runs/speed (an hour; BENCH=--quick: minutes)"
	@echo "make lint       ruff and mypy; make format: fix what ruff can fix"
	@echo "make docs       build the documentation into site/, strictly"
	@echo "make clean      remove .venv and build outputs; the model cache in ~/.cache/trl_extensions stays"

demo: $(VENV)/.demo
	$(BIN)/trl-ext sami run --config recipes/smollm2-135m/sami/config_lora.yaml

demo-tnt: $(VENV)/.demo
	$(BIN)/trl-ext tnt run --config recipes/smollm2-135m/tnt/config_lora.yaml

demo-w2s: $(VENV)/.demo
	$(BIN)/trl-ext w2s run --config recipes/smollm2-135m/w2s/config_probe.yaml

demo-codeclm: $(VENV)/.demo
	$(BIN)/trl-ext codeclm run --config recipes/smollm2-135m/codeclm/config_lora.yaml

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest

# What was measured stays in runs/speed/results.jsonl, and an interrupted run goes on; delete it to measure anew.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.speed $(BENCH)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache

$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@test -x $(BIN)/pip || { echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@if test -e $@; then rm -f $@; $(PIP) uninstall -y torch; fi
	@echo "installing $(TORCH)"
	@$(PIP) install $(TORCH)
	@printf '%s\n' '$(TORCH)' > $@

$(VENV)/.demo: setup.cfg setup.py pyproject.toml $(VENV)/.torch
	@echo "installing trl-extensions and what the demo needs"
	@$(PIP) install -e ".[demo]"
	@touch $@

$(VENV)/.dev: setup.cfg setup.py pyproject.toml $(VENV)/.torch
	@echo "installing trl-extensions and what the tests need"
	@$(PIP) install -e ".[dev,demo]"
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.dev
	@echo "installing what the documentation needs"
	@$(PIP) install -e ".[docs]"
	@touch $@
