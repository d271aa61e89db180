# Two commands on a fresh machine with Python 3.11 and pip: `make demo`, `make test`. Both set up .venv first, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready
RESULTS = $(shell $(BIN)/python benchmarks/machine.py)
REDUCED := --model GAR-1B --depth 2 --layers 1 --max-tokens 16

.PHONY: demo test lint gpu-check bench bench-full setup lock clean

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
	GARSERVE_TEST_DEVICE=cuda $(PYTHON) -m pytest tests/test_kernels.py tests/test_gpu_road.py -q
	$(PYTHON) benchmarks/replay.py --device cuda --save

# Figures of this machine into benchmarks/results: `bench` in minutes with the tiny checkpoint, `bench-full` also with random
# weights of GAR-1B's shape, its tower and decoder cut to 2 of 23 blocks and 1 of 16 layers. pip adds what only they need.
bench: setup
	$(PIP) 'matplotlib>=3.9' 'pytest-benchmark>=5'
	$(BIN)/python -m pytest benchmarks/test_micro.py -q --benchmark-json=$(RESULTS)/micro.json
	$(BIN)/garserve bench latency --save $(RESULTS)/latency.json
	$(BIN)/garserve bench startup --runs 1 --save $(RESULTS)/startup.json
	$(BIN)/python benchmarks/preprocess.py --rounds 3 --save
	for regions in 1 5 20; do $(BIN)/python benchmarks/end_to_end.py --regions $$regions --save || exit 1; done
	$(BIN)/python benchmarks/end_to_end.py --group 4 --save
	$(BIN)/python benchmarks/plot.py

bench-full: bench
# Not saved: its main peers need torchvision, which is not in this environment (CONTRIBUTING.md).
	$(BIN)/python benchmarks/replay.py
	$(BIN)/python benchmarks/end_to_end.py --workload stream --images 8 --save
	$(BIN)/python benchmarks/end_to_end.py --workload five --images 4 --save
	$(BIN)/python benchmarks/end_to_end.py --workload questions --save
	$(BIN)/python benchmarks/end_to_end.py $(REDUCED) --peer-regions 2 --batch 2 --save
	$(BIN)/python benchmarks/end_to_end.py $(REDUCED) --peer-regions 1 --batch 0 --group 4 --save
	$(BIN)/python benchmarks/end_to_end.py $(REDUCED) --peer-regions 1 --batch 0 --workload stream --images 4 --save
	$(BIN)/python benchmarks/plot.py

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
