# make demo      compress a small network end to end (under a minute once installed)
# make test      every test that needs no GPU
# make test-gpu  the tests that need one
# make lint      style
# make bench     the engine against a textbook loop (minutes; a quiet machine)
#
# Each makes .venv if it is missing, and installs what the requirements files ask for.

PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3.10 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
	2>/dev/null && echo $$python && break; done)
VENV_PYTHON = .venv/bin/python
INSTALLED = .venv/.installed

.PHONY: demo test test-gpu lint bench
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@PYTHON=$(VENV_PYTHON) ./demo.sh

test: $(INSTALLED)
	@# two processes of one thread each: they would only wait for each other with more
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -m "not gpu" -n 2 $(PYTEST_OPTIONS)

test-gpu: $(INSTALLED)
	$(VENV_PYTHON) -m pytest -m gpu $(PYTEST_OPTIONS)

lint: $(INSTALLED)
	$(VENV_PYTHON) -m ruff check .

bench: $(INSTALLED)
	$(VENV_PYTHON) -m benchmarks.bench_trueobs --out bench_trueobs.json

$(INSTALLED): requirements.txt requirements-study.txt requirements-dev.txt
	@test -n "$(PYTHON)" || \
	{ echo "error: needs Python 3.10 or newer with its venv module; try make PYTHON=…" >&2; exit 2; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(VENV_PYTHON) -m pip install --quiet -r requirements-dev.txt
	@touch $@
