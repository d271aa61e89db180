# Two commands on a fresh machine with Python 3.11 and pip: `make demo`, `make test`. Both set up .venv first, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready

.PHONY: demo test lint gpu-check setup lock clean

demo: setup
	$(BIN)/garserve demo

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a GPU, in an environment with garserve[gpu]: every kernel against its truth there, then its speed.
gpu-check:
	GARSERVE_TEST_DEVICE=cuda $(PYTHON) -m pytest tests/test_kernels.py -q
	$(PYTHON) benchmarks/replay.py --device cuda --save

setup: $(READY)

$(READY): requirements/cpu.txt requirements/torch-cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the lock is for Python 3.11: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
# The CPU build of torch where the machine's package indexes have it, else the ordinary one with the CUDA libraries it needs.
	$(PIP) --no-deps --require-hashes -r requirements/torch-cpu.txt || $(PIP) torch==2.13.0
	$(PIP) --no-deps --require-hashes -r requirements/cpu.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $(READY)

lock: setup
	$(BIN)/python tools/lock.py

clean:
	rm -rf $(VENV) demo-out build *.egg-info
