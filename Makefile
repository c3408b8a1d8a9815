# `make demo` and `make test` set everything up: a virtual environment in .venv, torch, and the rest.
#   PYTHON       the interpreter to make the environment with (3.10 or newer)
#   TORCH_INDEX  a package index to install torch from, for a build other than the default one
#   ARGS         what to hand on, for example: make demo ARGS=--quick
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test bench docs lint clean

help:
	@echo "make demo    train real models with each optimizer and compare (ARGS=--quick: under a minute)"
	@echo "make test    run the test suite"
	@echo "make bench   time a step beside torch's AdamW"
	@echo "make docs    build the documentation's site: site/index.html"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove the virtual environment"

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "emonavi needs Python 3.10 or newer: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): torch and its companions, once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/ready
	@$(BIN)/emonavi demo $(ARGS)

test: $(VENV)/ready
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/ready
	@$(BIN)/emonavi bench step $(ARGS)

docs: $(VENV)/ready
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

lint: $(VENV)/ready
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

clean:
	rm -rf $(VENV)
