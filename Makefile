# make demo      compress a small network end to end (under a minute once installed)
# make quick     the most telling tests, listed in tests/quick.txt (under a minute)
# make test      every test that needs no GPU
# make test-gpu  the tests that need one
# make lint      style and formatting
# make bench     the engine against a textbook loop (minutes; needs a quiet machine)
#
# Each creates .venv if it is missing and installs what the requirements files list.

PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3.10 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
	2>/dev/null && echo $$python && break; done)
VENV_PYTHON = .venv/bin/python
INSTALLED = .venv/.installed

PYTEST = $(VENV_PYTHON) -m pytest $(PYTEST_OPTIONS)

.PHONY: demo quick test test-gpu lint bench
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@PYTHON=$(VENV_PYTHON) ./demo.sh

# Two processes of one thread each: with more threads they would only wait for each other.
quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTEST) -m "not gpu" -n 2 @tests/quick.txt

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTEST) -m "not gpu" -n 2

test-gpu: $(INSTALLED)
	$(PYTEST) -m gpu

lint: $(INSTALLED)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

bench: $(INSTALLED)
	$(VENV_PYTHON) -m benchmarks.bench_trueobs --out bench_trueobs.json

$(INSTALLED): requirements.txt requirements-study.txt requirements-export.txt requirements-dev.txt
	@test -n "$(PYTHON)" || \
	{ echo "error: needs Python 3.10 or newer with its venv module; try make PYTHON=…" >&2; exit 2; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(VENV_PYTHON) -m pip install --quiet -r requirements-dev.txt
	@touch $@
