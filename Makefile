# make demo      compress a small network end to end (under a minute once installed)
# make cifar10 DATAPATH=…  the same for ResNet-20 on CIFAR-10 (see below)
# make quick     the most telling tests, listed in tests/quick.txt (under a minute)
# make test      every test that needs no GPU
# make test-gpu  the tests that need one
# make lint      style and formatting
# make wheel     build a wheel, install it into a fresh environment and compress a network there
# make docs      the pages of docs/ as a site, with every link checked
# make bench     the engine against a textbook loop (minutes; needs a quiet machine)
#
# Each creates .venv if it is missing and installs what the requirements files list.

PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3.10 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
	2>/dev/null && echo $$python && break; done)
VENV_PYTHON = .venv/bin/python
INSTALLED = .venv/.installed

PYTEST = $(VENV_PYTHON) -m pytest $(PYTEST_OPTIONS)

.PHONY: demo cifar10 quick test test-gpu lint wheel docs bench
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@PYTHON=$(VENV_PYTHON) ./demo.sh

# DATAPATH holds cifar-10-batches-py, as torchvision unpacks it. WEIGHTS are those of ResNet-20; without
# them, a published network's are downloaded (1 MB, by its name's hash). Results go to demo_cifar10/.
RESNET20 = resnet20-12fca82f.th
WEIGHTS ?= cache/$(RESNET20)

cifar10: $(INSTALLED)
	@test -n "$(DATAPATH)" || { echo "error: name the images: make cifar10 DATAPATH=…" >&2; exit 2; }
	@test -e "$(WEIGHTS)" || { mkdir -p cache && $(VENV_PYTHON) -c 'import sys, torch; \
	torch.hub.download_url_to_file(sys.argv[1], sys.argv[2], hash_prefix="12fca82f")' \
	https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/$(RESNET20) "$(WEIGHTS)"; }
	PYTHON=$(VENV_PYTHON) ./demo.sh rn20 cifar10 --noaug --datapath "$(DATAPATH)" \
	--weights "$(WEIGHTS)" --out demo_cifar10

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

wheel:
	rm -rf dist build
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	dist/venv/bin/python -m pip install --quiet dist/*.whl
	cd dist && venv/bin/trueobs compress rn8 digits quant --wbits 4 --noaug --save rn8_4w.pth
	cd dist && venv/bin/python -c 'from trueobs import TrueOBS'

docs: $(INSTALLED)
	$(VENV_PYTHON) -m mkdocs build --strict --site-dir site

bench: $(INSTALLED)
	$(VENV_PYTHON) -m benchmarks.bench_trueobs --out bench_trueobs.json

REQUIREMENTS = $(wildcard requirements*.txt)

$(INSTALLED): $(REQUIREMENTS)
	@test -n "$(PYTHON)" || \
	{ echo "error: needs Python 3.10 or newer with its venv module; try make PYTHON=…" >&2; exit 2; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(VENV_PYTHON) -m pip install --quiet $(REQUIREMENTS:%=-r %)
	@touch $@
