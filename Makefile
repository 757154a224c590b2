# make run ARGS="model=opt1.3b hardware=a6000"    make test ARGS="-k chat"    make lint    make bench
# Each sets up .venv first: once, and again when pyproject.toml or constraints.txt has changed. Another Python: PYTHON=/path/to/python3.12
SHELL := /bin/bash
PYTHON ?=
TRIED := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
ARGS ?=
PIP_ENV := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1

.PHONY: run test lint bench

run: .venv/installed
	@.venv/bin/python run.py $(ARGS)

test: .venv/installed
	.venv/bin/python -m pytest $(ARGS)

bench: .venv/installed
	.venv/bin/python benchmarks/run_all.py $(ARGS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: pyproject.toml constraints.txt
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(TRIED); do \
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break; python=; \
	  done; \
	  [ "$$python" ] || { echo "error: found no Python 3.11, 3.12 or 3.13 (tried $(TRIED)): install one, or name it: make run PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }; \
	  echo "setting up .venv with $$python; this happens once and takes a few minutes"; \
	  "$$python" -m venv --clear .venv >/dev/null 2>&1 || { \
	    "$$python" -m venv --clear --without-pip .venv && $(PIP_ENV) "$$python" -m pip --python .venv/bin/python install -q pip; } || { \
	    rm -rf .venv; echo "error: $$python cannot make a virtual environment: install its venv package (Debian: python3-venv)" >&2; exit 1; }; \
	}
	@echo "installing the packages of constraints.txt; a dot for each that is fetched, then they are unpacked, which takes a while"
	@set -o pipefail; $(PIP_ENV) .venv/bin/python -m pip install -c constraints.txt -e '.[test]' | while read -r line; do \
	  case "$$line" in Collecting*) printf .;; Installing\ collected*) printf ' unpacking';; esac; \
	done && echo ' done'
	@touch $@
