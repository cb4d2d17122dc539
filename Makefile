# `make test` and `make demo` on a machine that has only Python 3.10-3.13 and make: each first installs what it needs
# into .venv; the demo needs the runtime only, no PyTorch. PYTHON=... chooses the interpreter. Where packages come from
# is up to pip's own settings (PIP_INDEX_URL, pip.conf): on a host without a GPU an index with the CPU build of PyTorch
# saves several gigabytes.

VENV := .venv
# The runtime is installed, and everything is.
LIGHT := $(VENV)/.installed-runtime
STAMP := $(VENV)/.installed
PIP_INSTALL := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-dev.txt
WORKERS ?= 2
# An order, so that the choice does not depend on what `python3` happens to be. CI runs 3.11.
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.10 python3.13 python3)

# One thread for each test worker, whatever the number of cores.
test test-slow: export OMP_NUM_THREADS = 1

# The stamps name the checkout they were made for. A copied or moved .venv would import the other checkout, and one
# whose interpreter is gone would not run: both count as not installed.
INSTALLED := $(shell $(VENV)/bin/python -c \
    'import glob; print(*{open(stamp).read().strip() for stamp in glob.glob("$(STAMP)*")})' 2>/dev/null)
ifneq ($(INSTALLED),$(CURDIR))
$(shell rm -f $(LIGHT) $(STAMP))
endif

.PHONY: help install test test-slow fuzz demo check-install lint format clean

help:
	@echo 'make demo           caption the shipped clip with the shipped captioner'
	@echo 'make test           the tests (WORKERS=2 processes; ARGS=... goes to pytest)'
	@echo 'make test-slow      the heavier tests'
	@echo 'make fuzz           mutants of media files through the runtime (ARGS=... goes to the fuzzer)'
	@echo 'make check-install  the wheel in clean environments, on every Python that is there'
	@echo 'make lint           ruff and pyright'
	@echo 'make format         let ruff rewrite'
	@echo 'make install        only the virtual environment, .venv'
	@echo 'make clean          remove .venv and everything that was built'

install: $(STAMP)

# Interrupted before the first stamp: the next run starts with an empty environment.
$(LIGHT): Makefile setup.cfg pyproject.toml constraints-dev.txt
	@set -e; \
	if [ ! -f $(LIGHT) ] && [ ! -f $(STAMP) ]; then \
	    found=; \
	    for python in $(PYTHONS); do \
	        if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	            2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo 'intertitle needs Python 3.10 to 3.13 with venv; tried: $(PYTHONS). Choose one: make PYTHON=...' >&2; \
	        exit 1; \
	    fi; \
	    echo "creating $(VENV) with $$($$found -c 'import platform, sys; print(sys.executable, platform.python_version())')"; \
	    $$found -m venv --clear $(VENV); \
	fi
	@rm -f $(LIGHT) $(STAMP)
	$(PIP_INSTALL) --upgrade pip setuptools
	$(PIP_INSTALL) -e '.[cpu]'
	@echo '$(CURDIR)' > $(LIGHT)

$(STAMP): $(LIGHT)
	@rm -f $(STAMP)
	@# PyTorch first and alone: no other package may choose its version.
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[cpu,compile,align,dev,scenes]'
	@echo '$(CURDIR)' > $(STAMP)

test: $(STAMP)
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) $(ARGS)

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -q -m slow $(ARGS)

# ARGS='structured --count 50000 --keep finds' and so on; ARGS=--help tells.
fuzz: $(STAMP)
	$(VENV)/bin/python -m intertitle.tests.fuzz $(or $(ARGS),media)

demo: $(LIGHT)
	$(VENV)/bin/intertitle demo

# ARGS='--only 3.12' for one Python.
check-install: $(LIGHT)
	$(VENV)/bin/python tests/install/check.py $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
