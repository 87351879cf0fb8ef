# `make demo` and `make test` work on a fresh machine: each makes the environment first if it is missing.
PYTHON ?= python3
VENV ?= .venv
VENV_NEWEST ?= .venv-newest
VENV_DOCS ?= .venv-docs
TORCH_NEWEST ?= 2.13.0
BIN := $(VENV)/bin
# A process per core, up to four, with one thread each.
PYTEST_ENV := OMP_NUM_THREADS=1
PYTEST_OPTIONS := --numprocesses auto --maxprocesses 4 --dist loadfile
# What no PyTorch changes, tested once.
ONCE := ablations_frontier ablations_ledger ablations_runner ablations_sampler ablations_study ablations_views packaging

.PHONY: help demo test test-newest check docs bench gpu wheel clean

help:
	@echo "make demo         train the arms of the demo on real text; figure, table, TensorBoard logs in runs/demo"
	@echo "make test         all tests"
	@echo "make test-newest  the tests that need no Composer and concern PyTorch, with torch $(TORCH_NEWEST)"
	@echo "make check        ruff and mypy"
	@echo "make docs         the site, strictly, into site/; it needs none of the other environments"
	@echo "make bench        the cost of an application, of MSign in a run, of monitoring; what processes and workers share"
	@echo "make gpu          GPU tests and benchmarks with the current '$(PYTHON)', nothing installed"
	@echo "make wheel        build sdist and wheel into dist/"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[composer,dev,models,ray]"
	touch $@

$(VENV_NEWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/pip install --quiet torch==$(TORCH_NEWEST)
	$(VENV_NEWEST)/bin/pip install --quiet --editable ".[dev]"
	touch $@

$(VENV_DOCS)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/pip install --quiet --requirement $<
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m msign_lightning.ablations run demo --folder runs

test: $(VENV)/.installed
	$(PYTEST_ENV) $(BIN)/python -m pytest $(PYTEST_OPTIONS)

test-newest: $(VENV_NEWEST)/.installed
	$(PYTEST_ENV) $(VENV_NEWEST)/bin/python -m pytest $(PYTEST_OPTIONS) -m "not composer" $(ONCE:%=--ignore=tests/test_%.py)

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV_DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.application
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.sharing
	$(BIN)/python -m benchmarks.monitoring
	$(BIN)/python -m benchmarks.workers
	$(BIN)/python -m benchmarks.inspection

gpu:
	$(PYTHON) -m pytest -m gpu tests/test_linalg_cuda.py tests/test_restoration_cuda.py tests/test_monitor_cuda.py
	$(PYTHON) -m benchmarks.application
	$(PYTHON) -m benchmarks.overhead
	$(PYTHON) -m benchmarks.monitoring

wheel: $(VENV)/.installed
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(VENV_NEWEST) $(VENV_DOCS) dist site
