# Two commands for a newcomer: make train, make test. Both set up what they need, say so, and can be run again.
# Variables: PYTHON, TORCH and TORCH_INDEX_URL (see scripts/environment.sh), NPROC.
NPROC ?= 2
OUT ?= runs/pretrain_gpt

.PHONY: help train test test-all test-simulators test-triton lint bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

train: ## set up, then train a small GPT with Megatron-Core on this machine, tensor parallel over NPROC=2 processes
	@python=$$(scripts/environment.sh megatron,bench) && set -x && \
	$$python -m llm_adapt.cli run --nproc $(NPROC) --out $(OUT) examples/pretrain_gpt.py --out $(OUT)

test: ## set up, then check style, types, layers and run the tests, those on simulated devices too (20 minutes or so on 2 cores)
	@python=$$(scripts/environment.sh megatron,transformers,dev) && set -x && \
	$$python -m ruff check . && $$python -m ruff format --check . && $$python -m mypy && \
	$$(dirname $$python)/lint-imports && $$python scripts/devices_page.py --check && \
	$$python scripts/transformers_census.py --check && scripts/test_in_parts.sh $$python

test-simulators: ## only the tests that run on simulated devices (needs g++; fetches torch_npu once)
	@python=$$(scripts/environment.sh megatron,transformers,dev) && set -x && scripts/test_simulators.sh $$python

test-all: ## the tests with the slow ones
	@python=$$(scripts/environment.sh megatron,transformers,dev) && set -x && $$python -m pytest -m ''

test-triton: ## our Triton kernels in Triton's interpreter; it is installed beside the environment (1 GB)
	@python=$$(scripts/environment.sh megatron,transformers,dev) && set -x && \
	$$python -m pip install --quiet --no-deps --upgrade --target build/triton "triton>=3.2" && \
	PYTHONPATH=build/triton $$python -m pytest tests/ops/kernels

lint: ## style, types and layers only
	@python=$$(scripts/environment.sh megatron,transformers,dev) && set -x && \
	$$python -m ruff check . && $$python -m ruff format --check . && $$python -m mypy && $$(dirname $$python)/lint-imports

bench: ## every operator beside what frameworks run without us, and what the facade costs per call
	@python=$$(scripts/environment.sh megatron,transformers,bench) && set -x && \
	$$python benchmarks/ops.py --out runs/bench && $$python benchmarks/overhead.py

clean: ## remove what the targets made
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
