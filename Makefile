# make demo          set up, and run the bundled model on two ranks
# make quick         the unit tests that take seconds; under 3 minutes on two cores
# make test          lint, types, and all but the long tests; under 12 minutes on two cores
# make test-long     what takes longer, and what measures speed and so runs one at a time
# make test-cluster  the launchers on a Slurm, MPI and hosts made for it, and lost ranks; needs root
# make docs          the site of docs/, in build/site; fails on a broken link
#
# ARGS="-k capacity -x"        more arguments for pytest, in every target that runs it
# PYTHON=python3.12            which Python makes the environment (3.10 or newer)
# LOCKSTEP_TORCH=torch==2.12.0 which torch: any pip requirement; it is installed first
# LOCKSTEP_EXTRAS=dev,cuda13   which extras of setup.py; te and te13 compile Transformer Engine,
#                              eval is lm-evaluation-harness
PYTHON ?= python3
VENV ?= .venv
PINNED_TORCH := torch==2.13.0
LOCKSTEP_TORCH ?= $(PINNED_TORCH)
LOCKSTEP_EXTRAS ?= dev

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.lockstep-installed
NATIVE := $(wildcard kernels/build.py kernels/csrc/*)
comma := ,
# Another torch for CUDA requires a triton of its own: that pin is for the pinned torch alone.
UNPINNED := $(if $(filter $(PINNED_TORCH),$(LOCKSTEP_TORCH)),,triton)
CONSTRAINTS := $(if $(UNPINNED),$(VENV)/constraints.txt,.ci/constraints.txt)
# What compiling the torch extension of Transformer Engine needs: headers of a toolkit, where there is
# one, and of the nvidia wheels that came with torch.
TE_HEADERS = /usr/local/cuda/include /usr/local/cuda/include/cccl \
    $(abspath $(wildcard $(VENV)/lib/python3*/site-packages/nvidia/*/include \
    $(VENV)/lib/python3*/site-packages/nvidia/*/include/cccl))
TE_BUILD = NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE
BUILD_ENV = $(if $(filter te te13,$(subst $(comma), ,$(LOCKSTEP_EXTRAS))),$(TE_BUILD) \
    CPLUS_INCLUDE_PATH="$$(printf '%s:' $(TE_HEADERS))$$CPLUS_INCLUDE_PATH")
# A limit ends a hung run. One thread per process: the distributed tests start up to eight ranks.
QUICK_LIMIT_S ?= 600
TEST_LIMIT_S ?= 1200
LONG_LIMIT_S ?= 2400
CLUSTER_LIMIT_S ?= 900
PYTEST = OMP_NUM_THREADS=1 timeout --kill-after=30 $(1) $(BIN)/python -m pytest
SUITE := tests/unit tests/tools tests/models tests/distributed tests/gpu tests/fuzz

.DEFAULT_GOAL := help
.PHONY: help setup install-package demo quick test test-long test-cluster docs lint format clean distclean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml .ci/constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'Lockstep needs Python 3.10 or newer: make setup PYTHON=python3.12' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(UNPINNED),grep -v '^$(UNPINNED)==' .ci/constraints.txt >$(CONSTRAINTS))
	$(PIP) install '$(LOCKSTEP_TORCH)' setuptools wheel -c $(CONSTRAINTS)
	$(MAKE) --no-print-directory install-package
	touch $@

# In a make of its own: the headers of torch's wheels are there only now.
install-package:
	$(BUILD_ENV) $(PIP) install -e '.[$(LOCKSTEP_EXTRAS)]' --no-build-isolation -c $(CONSTRAINTS)

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

quick: setup
	$(call PYTEST,$(QUICK_LIMIT_S)) -n 2 -m 'not slow and not alone and not long' tests/unit $(ARGS)
	@echo 'make quick: passed'

test: lint
	$(call PYTEST,$(TEST_LIMIT_S)) -n 2 --dist worksteal -m 'not alone and not long' $(SUITE) $(ARGS)
	@echo 'make test: lint, types and tests passed'

# One at a time: what is measured has the machine to itself.
# First the oldest and the newest triton, which compile the GPU kernels, into folders of their own.
test-long: setup
	$(BIN)/python tools/compile_kernels.py --install
	$(call PYTEST,$(LONG_LIMIT_S)) -m 'alone or long' $(SUITE) $(ARGS)
	@echo 'make test-long: passed'

# Its files run two at a time: they mostly wait. -rs: what is not installed here is named.
test-cluster: setup
	$(call PYTEST,$(CLUSTER_LIMIT_S)) -rs -n 2 --dist loadfile tests/cluster $(ARGS)
	@echo 'make test-cluster: passed'

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'make docs: build/site/index.html'

clean:
	rm -rf build dist *.egg-info engine/*.so .pytest_cache .ruff_cache .hypothesis $(STAMP)
	find engine kernels launch tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
