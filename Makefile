# Everything a developer does. All set-up happens in .venv, inside the tree; nothing global is touched.

PYTHON  ?= python3
MINUTES ?= 5
SEED    ?=
VERSIONS ?=
INPUT   ?=
TESTS   ?= tests
# Three, which two processors keep busy, where each can have a /dev/shm of its own; else one after the other.
namespace = unshare $$(test $$(id -u) = 0 || echo --map-root-user) --mount --propagation private
JOBS    ?= $(shell $(namespace) mount -t tmpfs tmpfs /dev/shm 2>/dev/null && echo 3 || echo 0)

venv   := .venv
python := $(venv)/bin/python
stamp  := $(venv)/.stamp
native := setup.py shmengine/_native/build.py $(wildcard csrc/*.c csrc/*.h)

.DEFAULT_GOAL := help
.PHONY: help setup rebuild demo test test-all test-lowest quick bench peers soak points fuzz coverage lint format ctest clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(stamp) ## Make .venv, install what is needed, build the C core

# One stamp for all: with nothing to install, pip takes a second, and setuptools compiles only what changed.
$(stamp): pyproject.toml $(native)
	@test -x $(python) || $(PYTHON) -m venv $(venv)
	@$(python) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shmengine needs Python 3.11 or newer")'
	@echo "setting up $(venv) and building the C core ..."
	@$(python) -m pip install --quiet --disable-pip-version-check 'setuptools>=77' 'cffi>=2' 'numpy>=2'
	@rm -f shmengine/_native/*.so
	@$(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[test,demo]'
	@touch $@

rebuild: ## Build the C core anew, after a change of SHMENGINE_DEBUG, _SANITIZE or _COVERAGE
	@rm -f $(stamp)
	@$(MAKE) --no-print-directory setup

demo: $(stamp) ## The main job on real photographs, or on INPUT=file.npy, checked against NumPy
	@$(python) examples/demo.py $(if $(INPUT),'$(INPUT)')

# In this order and one after the other even under `make -j`: pytest's summary is the last thing printed. It runs the
# files of tests in JOBS processes (0: in its own), each with a /dev/shm of its own (tests/conftest.py), in order: with
# those of many tests first, the few that take minutes each would come at the end, beside an idle processor.
test: $(stamp) ## Linters, C tests (with sanitizers), Python tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory ctest
	@$(python) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(TESTS)

quick: $(stamp) ## The Python tests that take no more than a few seconds each
	@$(python) -m pytest -q -m 'not slow' $(TESTS)

test-all: $(stamp) ## The tests that are not slow on Python 3.11, 3.12 and 3.13, or VERSIONS="3.12 ...", each with a build of its own
	@$(python) -m tests.versions --jobs $(JOBS) $(VERSIONS)

test-lowest: $(stamp) ## Tests with the oldest libraries that pyproject.toml allows, on the oldest Python
	@$(python) -m tests.versions --lowest --jobs $(JOBS)

bench: $(stamp) ## Speed, as ratios against rivals in one run
	@$(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[bench,rivals]'
	@$(python) -m pytest benches --check-targets

peers: $(stamp) ## Other projects' own tests, of the interfaces that we implement; writes docs/peers.md
	@$(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dask]' scipy
	@$(python) -m tests.peers

soak: $(stamp) ## Kills, stops and load for MINUTES=5 in all, with SEED=... or a random one; one report
	@$(python) -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

points: $(stamp) ## A SIGKILL at up to 500 points of each operation: accesses of shared memory, of workers and main changes; half an hour
	@SHMENGINE_SOAK_MINUTES=1 $(python) -m pytest tests/crash/test_kill_points.py

fuzz: $(stamp) ## Hostile bytes for MINUTES=5 each: libFuzzer over the C core, atheris over frames (needs clang)
	@$(MAKE) --no-print-directory -C tests/fuzz fuzz MINUTES=$(MINUTES)
	@$(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[fuzz]'
	@$(MAKE) --no-print-directory -C tests/fuzz frames MINUTES=$(MINUTES) PYTHON=$(abspath $(python))

coverage: $(stamp) ## Lines and branches of csrc/ that the tests reach; minutes
	@$(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[coverage]'
	@$(python) -m tests.helpers.coverage

lint: $(stamp) ## ruff and mypy
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy

format: $(stamp) ## Let ruff repair what it can
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

ctest: ## The C core's own tests, without Python
	@$(MAKE) --no-print-directory -C csrc test
	@$(MAKE) --no-print-directory -C tests/fuzz replay

clean: ## Remove everything that was built, .venv too
	@rm -rf $(venv) build dist *.egg-info csrc/build tests/fuzz/build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -f shmengine/_native/*.so shmengine/_native/_core.c
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
