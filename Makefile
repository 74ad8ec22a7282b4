# Every target works in a fresh clone: it creates .venv and installs the tested versions into it, the
# demo those that the package itself needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test slow check docs pictures wheel learning zoo growth growth-mixed bench faults soak worlds mutants sanitize gpu-proof clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed: $(VENV)/.made
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.made ## Train CartPole to a mean return of at least 475
	$(BIN)/esper fit --config configs/cartpole.yaml

test: $(VENV)/.installed ## Run the tests
	$(BIN)/python -m pytest -n 2 -m 'not slow'

slow: $(VENV)/.installed ## Run the tests that take longer
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed ## Lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/.installed ## Build the docs site, strictly
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	$(BIN)/mkdocs build --strict

pictures: $(VENV)/.installed ## Make the pictures of the docs from real runs, in a headless Chromium (two minutes)
	$(BIN)/python scripts/pictures.py

wheel: $(VENV)/.installed ## Build the wheel, and use it in a new environment outside the repository
	PYTHON=$(CURDIR)/$(BIN)/python scripts/try_wheel.sh dist

learning: $(VENV)/.installed ## Measure learning on every task, 5 seeds each (six minutes)
	$(BIN)/python benchmarks/learning.py

zoo: $(VENV)/.installed ## Measure learning in simulators of others, 5 seeds each, beside a peer (hours)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench,gymnasium,minigrid]'
	$(BIN)/python benchmarks/zoo.py --peer

growth: $(VENV)/.installed ## Train policies that grow networks, 5 seeds, against baselines (most of an hour)
	$(BIN)/python benchmarks/growth.py

growth-mixed: $(VENV)/.installed ## Train policies on networks that differ, 5 seeds, against every schedule of a grid (an hour)
	$(BIN)/python benchmarks/growth_mixed.py

bench: $(VENV)/.installed ## Measure throughput against the peers (half an hour)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/throughput.py

faults: $(VENV)/.installed ## Let runs die of every fault, write what they leave, and replay deaths (20 minutes)
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python -m pytest -n 2 tests/crash/test_replay.py

soak: $(VENV)/.installed ## Kill runs at random moments and resume them (20 minutes)
	$(BIN)/python benchmarks/soak.py

worlds: $(VENV)/.installed ## Train in simulators that are too large for the tests (half an hour, and gigabytes)
	$(BIN)/python benchmarks/worlds.py

mutants: $(VENV)/.installed ## Break the package in small ways: the fast tests must notice (a quarter of an hour)
	$(BIN)/python scripts/mutants.py

# -O1, since the sanitizers see the same accesses and the compiler takes a third of the time.
sanitize: $(VENV)/.installed ## Run the tests of native code with sanitizers of memory and behaviour (half an hour)
	cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && \
	XDG_CACHE_HOME="$$cache" CXX="env -u LD_PRELOAD g++" \
	CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest --capture=sys --timeout=1800 $(or $(TESTS),tests/compiling/native tests/training/test_native.py tests/envs/morphogenesis/test_native.py)

# Triton has the assembler for NVIDIA's GPUs; torch for CPUs does not bring it. Nothing else of the environment changes.
gpu-proof: $(VENV)/.installed ## Prove without a GPU what a GPU will run, and compile its kernels (ten minutes)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .gpu_proof triton==3.7.1
	PYTHONPATH=.gpu_proof $(BIN)/python -m pytest tests/gpu_proof tests/compiling/test_cuda_graph.py

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .gpu_proof build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
