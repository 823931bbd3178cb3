# Everything a fresh clone needs: `make demo`, `make test`, `make check`, `make bench`. Only Python >= 3.11, make and g++ are assumed.

PYTHON ?= python3
JOBS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev

.DELETE_ON_ERROR:
.PHONY: demo test check bench sanitize aot gpu-check clean

demo: $(DEMO)
	$(PY) -m fp4fx demo

# One thread per process: the test processes share the cores.
test: $(DEV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)

check: $(DEV)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# Short ones; the extra `peers` brings what fp4fx is measured beside, and what is missing is named in the tables.
bench: $(DEV)
	$(PY) -m benchmarks.ops --quick --out build/bench/ops-cpu.json
	$(PY) -m benchmarks.models --quick --out build/bench/models-cpu.json

# The CPU kernels under AddressSanitizer and UBSan, at every instruction set that this machine has.
sanitize: $(DEV)
	$(PY) -m tests.kernels.sanitize $(TIERS)

# The Triton kernels compiled for GPUs that need not be here: registers, spills, shared memory, matrix instructions.
aot: $(DEV)
	$(PY) -m fp4fx.kernels.triton.aot $(ARGS)

# Tests and timings on the GPU that is here; ARGS=--dry goes through all of it on the CPU.
gpu-check: $(DEV)
	PYTHON=$(PY) benchmarks/gpu_check.sh $(ARGS)

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fp4fx needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# The extra `dev` includes `demo`.
$(DEMO): pyproject.toml | $(PY)
	@echo "installing into $(VENV), torch included: a minute or two"
	$(PY) -m pip install --quiet --editable '.[demo]'
	touch $@

$(DEV): pyproject.toml | $(PY)
	@echo "installing into $(VENV), torch included: a minute or two"
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $(DEMO) $@
