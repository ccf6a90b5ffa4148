# Everything a fresh machine needs goes into .venv; nothing else is touched.
PYTHON ?= python3
# Without an installed torch, pip would take the newest build with all its CUDA packages. Override to use your own:
#   make quickstart TORCH="torch==2.11.0"
TORCH ?= torch==2.13.0
# The tests also build timm models, and torchvision fits one torch only.
TORCH_FOR_TESTS ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast test-versions style quality docs wheel release clean

help:  ## Lists the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

setup: .venv/.recipes  ## Installs everything into .venv, for runs of your own

quickstart: .venv/.recipes  ## Fine-tunes MiniLM with two asynchronous workers and a server (3 minutes on 2 cores)
	$(BIN)/accelerate launch --config_file recipes/accelerate.yaml recipes/text_classification/train.py \
		--config recipes/text_classification/quickstart.yaml

test: .venv/.test  ## Runs the tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: .venv/.test  ## Runs the tests of the inner loop: those that start no launcher (under a minute)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit -k "not lock_step"

test-versions: .venv/.test  ## Tries the lowest and the newest versions of what it builds on (15 minutes; several GB)
	PYTHONPATH=$(CURDIR) $(BIN)/python scripts/tools/try_versions.py

style: .venv/.quality  ## Formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/.quality .venv/.test  ## Checks format, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.docs  ## Builds the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: .venv/.release  ## Builds the source distribution and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build

release: wheel  ## The same, and checks what an index would check before an upload
	$(BIN)/twine check --strict dist/*

clean:  ## Removes .venv, site/ and dist/
	rm -rf .venv site dist

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.quality: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet $$(sed -n 's/^ *"\(\(ruff\|mypy\)==[0-9.]*\)".*/\1/p' pyproject.toml)
	touch $@

.venv/.docs: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet $$($(BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

.venv/.release: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet $$($(BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["release"])')
	touch $@

.venv/.recipes: pyproject.toml | .venv/bin/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable '.[recipes]'
	touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet $(TORCH_FOR_TESTS) --editable '.[test]'
	touch $@
