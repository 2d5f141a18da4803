# Every target sets up what it needs in .venv; only Python 3.11 to 3.13 and make have to be there.
# PIP_ARGS is passed to `pip install`: on a Linux machine without an NVIDIA GPU it can name a package index
# with CPU builds of torch (see pytorch.org, "Start locally"), which saves several GB.

SHELL := /bin/bash
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
# Processes that share the tests. Each computes with one thread: the models of the tests are too small for more.
TEST_PROCESSES ?= 2
BENCH_ARGS ?=
MUSEUM_ARGS ?=
DEMO ?= examples/m4_inference.py --watch

# Threads that wait for each other leave the processor to other programs. OpenMP reads this when torch is loaded.
export OMP_WAIT_POLICY ?= PASSIVE

PY := $(VENV)/bin/python
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

# The first interpreter on this machine that is new enough and not too new; else the plain name, for the message.
supported = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(supported)' 2>/dev/null && { echo $$p; exit; }; done; echo python3)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test mutants lint format types notebooks docs tags bench clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-base  ## watch the bundled model answer, step by step, and compare M1 to M4
	@$(PY) $(DEMO)

test: $(VENV)/.installed-test  ## run the tests that need no GPU
	@$(PY) -m pytest -m "not gpu" -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

mutants: $(VENV)/.installed-test  ## check that the tests see every bug in the museum
	@$(PY) -m folovllm museum run $(MUSEUM_ARGS)

lint: $(VENV)/.installed-dev  ## check style, formatting and types
	@failed=0; \
	  $(PY) -m ruff check . || failed=1; \
	  $(PY) -m ruff format --check . || failed=1; \
	  $(PY) -m mypy || failed=1; \
	  exit $$failed

format: $(VENV)/.installed-dev  ## rewrite the files as `make lint` wants them
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: $(VENV)/.installed-dev  ## check types
	@$(PY) -m mypy

notebooks: $(if $(NOTEBOOKS),$(VENV)/.installed-notebooks)  ## run every notebook from top to bottom
	@$(if $(NOTEBOOKS),$(PY) -m pytest --nbmake --nbmake-timeout=300 $(NOTEBOOKS),\
	  echo "There are no notebooks yet: nothing to run.")

docs: $(VENV)/.installed-docs  ## build the course as a site in docs/_build/html
	@$(PY) -m sphinx -b html -W --keep-going -q docs docs/_build/html
	@$(PY) docs/check_site.py docs/_build/html
	@echo "Open docs/_build/html/index.html"

tags:  ## set the tags m0 to m4 from the `Milestone:` trailers in the history
	@$(PYTHON) .ci/make_tags.py

bench: $(VENV)/.installed-base  ## measure on this machine (BENCH_ARGS="--help" lists what)
	@$(PY) -m folovllm.course.bench $(BENCH_ARGS)

clean:  ## delete caches and build outputs
	rm -rf build dist docs/_build docs/labs .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## delete the virtual environment as well
	rm -rf $(VENV)

# --- setting up -----------------------------------------------------------------------------------------------
# A stamp is written only after pip has succeeded, and is out of date when the pins or the package's needs change.

$(VENV)/.installed-base: EXTRA :=
$(VENV)/.installed-test: EXTRA := [test]
$(VENV)/.installed-dev: EXTRA := [dev]
$(VENV)/.installed-notebooks: EXTRA := [notebooks,test]
$(VENV)/.installed-docs: EXTRA := [docs]

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@$(PY) -c '$(supported)' || { \
	  echo "$(VENV) does not hold a working Python 3.11 to 3.13. Delete it with 'make distclean' and try again." >&2; \
	  exit 1; }
	@echo "Installing folovllm$(EXTRA) into $(VENV). The first time, this downloads torch: on Linux a build of"
	@echo "several GB with CUDA, elsewhere far less. It may take many minutes; later calls start at once."
	@set -o pipefail; \
	  $(PY) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt $(PIP_ARGS) -e ".$(EXTRA)" \
	  | tee $(VENV)/install.log \
	  | awk '/^ *Downloading .*[0-9][0-9]\.?[0-9]* [MG]B\)/ { print; fflush() } /^Installing collected/ { print "  Unpacking" }' \
	  || { echo "That failed. The end of $(VENV)/install.log:" >&2; tail -n 12 $(VENV)/install.log >&2; exit 1; }
	@touch $@ $(VENV)/.installed-base
	@echo "Installed."

$(VENV)/bin/pip:
	@$(PYTHON) -c '$(supported)' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null || echo "not there"); \
	  echo "folovllm needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$found." >&2; \
	  echo "Name one that you have, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "This Python cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
