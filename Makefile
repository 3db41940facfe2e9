# `make demo` and `make test` set up all they need in .venv. Variables:
#   PYTHON  the interpreter to start from (python3). Given on the command line and holding torch and triton already,
#           it is used as it is, without a virtual environment: for machines that reach no package registry.
#   TORCH   the torch requirement. Default: `torch` with an NVIDIA GPU, else the pinned torch==2.13.0, so that pip can
#           take a CPU build where it finds one; a plain `torch` would bring some GB of CUDA libraries.
PYTHON ?= python3
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch,torch==2.13.0)
PIP := .venv/bin/python -m pip --disable-pip-version-check install -qq --retries 2
PROBE := import sys, torch, triton; print(sys.implementation.cache_tag)
OWN := $(if $(filter command,$(firstword $(origin PYTHON))),$(shell $(PYTHON) -c "$(PROBE)" 2>/dev/null))

# The stamp is older than what decides the environment exactly when that must be made anew.
ifdef OWN
RUN := PYTHONPATH=$(CURDIR)/.links $(PYTHON)
STAMP := build/.stamp-$(OWN)
else
RUN := .venv/bin/python
STAMP := .venv/.stamp
endif
# Without a GPU the kernels run in Triton's interpreter, which needs a process of its own and one thread.
INTERPRET := $(if $(shell nvidia-smi -L 2>/dev/null),,env TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1)
SOURCES := setup.py pyproject.toml CMakeLists.txt engine/version.py $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: setup demo test test-slow lint types bench bench-kernels clean

setup: $(STAMP)

.venv/.stamp: $(SOURCES)
	@echo "setting up .venv with $(TORCH) (some minutes the first time)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PIP) "$(TORCH)" "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" ninja
	@$(PIP) --no-build-isolation -e ".[all,dev]"
	@.venv/bin/python -c "import liverelay.engine._C" 2>/dev/null || echo "$(NO_C)"
	@touch $@

build/.stamp-%: $(SOURCES)
	@echo "using $(PYTHON) as it is: it has torch and triton"
	@$(PYTHON) setup.py --quiet build_ext --inplace >/dev/null 2>&1 || true
	@PYTHONPATH=$(CURDIR)/.links $(PYTHON) -c "import liverelay.engine._C" 2>/dev/null || echo "$(NO_C)"
	@mkdir -p build && touch $@

NO_C = the compiled module was not built (it needs a C++ compiler, cmake, ninja or make, and pybind11): its Python twin is used

demo: setup
	@mkdir -p demo
	@$(RUN) -m liverelay.engine generate --checkpoint toon --image samples/toon.png --audio samples/speech.wav \
	  --out demo/demo.mp4 --contact-sheet demo/demo.png

test: setup
	@$(RUN) -m pytest -q -m "not slow"
	@$(INTERPRET) $(RUN) -m pytest -q -m "not slow" tests/kernels

test-slow: setup
	@$(RUN) -m pytest -q -m slow

lint: setup
	@$(RUN) -m ruff check .

types: setup
	@$(RUN) -m mypy

bench: setup
	@$(RUN) -m bench.block_step_cpu

bench-kernels: setup
	@$(RUN) -m pytest -q bench/test_kernels.py

clean:
	rm -rf .venv build dist demo *.egg-info engine/*.so
