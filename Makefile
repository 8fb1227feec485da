# Everything from a bare Python: each target makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

ZOOS ?= zoos
ZOO ?=

export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs examples gpu paper paper-defaults wheel release-check clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[plot,progress,test,lint,docs]'
	touch $@

demo: $(STAMP)  ## All systems on a real zoo of digit networks
	$(BIN)/python examples/plot_quickstart.py

test: $(STAMP)  ## Tests and doctests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

lint: $(STAMP)  ## Ruff: format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## mypy --strict
	$(BIN)/mypy

docs: $(STAMP)  ## Documentation and gallery, warnings are errors, no network
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

examples: $(STAMP)  ## Run every example
	set -e; for example in examples/plot_*.py; do $(BIN)/python $$example; done

gpu: $(STAMP)  ## On a machine with an NVIDIA GPU: its tests, and the paper's cost table
	$(BIN)/python -m benchmarks gpu

paper: $(STAMP)  ## The papers' tables and their page; ZOOS keeps the zoos, ZOO=photos makes one
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[paper]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks paper.everything --folder $(ZOOS) \
		$(if $(ZOO),--kinds $(ZOO))
	$(BIN)/python -m benchmarks paper.page

paper-defaults: $(STAMP)  ## The experiments the defaults were chosen by, on development zoos
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks paper.defaults --folder $(ZOOS)
	$(BIN)/python -m benchmarks paper.page

wheel: $(STAMP)  ## Source distribution and wheel in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

release-check: wheel  ## Build, check contents and metadata, try the wheel in an empty environment
	$(BIN)/python .ci/release_check.py dist

clean:  ## Remove what was built; the environment stays
	rm -rf dist docs/_build docs/auto_examples docs/generated docs/sg_execution_times.rst \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
