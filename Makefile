# make demo   sets up and runs the bundled model on two ranks
# make test   sets up and checks everything that runs without a GPU
# make test-cluster  the launchers, on a Slurm, MPI and hosts made for it, and lost ranks; wants root
#
# PYTHON=python3.12            which Python makes the environment (3.10 or newer)
# LOCKSTEP_TORCH=torch==2.12.0 which torch: any pip requirement; it is installed first
# LOCKSTEP_EXTRAS=dev,cuda13   which extras of setup.py
PYTHON ?= python3
VENV ?= .venv
LOCKSTEP_TORCH ?= torch==2.13.0
LOCKSTEP_EXTRAS ?= dev

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.lockstep-installed
NATIVE := $(wildcard kernels/build.py kernels/csrc/*)
TEST_LIMIT_S ?= 1500
CLUSTER_LIMIT_S ?= 900

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cluster lint format clean distclean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml .ci/constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'Lockstep needs Python 3.10 or newer: make setup PYTHON=python3.12' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install '$(LOCKSTEP_TORCH)' setuptools wheel -c .ci/constraints.txt
	$(PIP) install -e '.[$(LOCKSTEP_EXTRAS)]' --no-build-isolation -c .ci/constraints.txt
	touch $@

demo: setup
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 \
	    launch/infer.py --config tiny_mixtral_ep2.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One thread a process: the distributed tests start up to eight ranks. The limits end a hung run.
# Two tests at a time; then, alone, those that judge how fast real ranks are.
test: lint
	OMP_NUM_THREADS=1 timeout --kill-after=30 $(TEST_LIMIT_S) $(BIN)/python -m pytest \
	    -n 2 --dist worksteal -m 'not alone' tests/unit tests/tools tests/models tests/distributed tests/gpu
	OMP_NUM_THREADS=1 timeout --kill-after=30 $(TEST_LIMIT_S) $(BIN)/python -m pytest \
	    -m alone tests/unit tests/tools tests/models tests/distributed tests/gpu
	@echo 'make test: lint, types and tests passed'

# Its files run two at a time: they mostly wait. -rs: what is not installed here is named.
test-cluster: setup
	OMP_NUM_THREADS=1 timeout --kill-after=30 $(CLUSTER_LIMIT_S) \
	    $(BIN)/python -m pytest -rs -n 2 --dist loadfile tests/cluster
	@echo 'make test-cluster: passed'

clean:
	rm -rf build dist *.egg-info engine/*.so .pytest_cache .ruff_cache .hypothesis $(STAMP)
	find engine kernels launch tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
