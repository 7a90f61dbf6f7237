# Needs only Python >= 3.11, make and a reachable package index.
#   make run     the quickstart: a 135M model learns a task with checkable answers (ARGS="--training.steps=20" ...)
#   make test    lint and tests (ARGS='-m slow': every method end to end, and others that take minutes)
#   make test-isa  the numeric tests as on other CPUs, limited to each of ISAS (25 minutes each with empty caches)
PYTHON ?= python3
BIN := .venv/bin
# The accelerator that is there decides which jax is installed; EXTRAS= or EXTRAS=cuda overrides.
EXTRAS ?= $(shell if nvidia-smi -L >/dev/null 2>&1; then echo cuda; elif ls /dev/accel0 /dev/vfio/0 >/dev/null 2>&1; then echo tpu; fi)
COMMA := ,

# Instruction sets that XLA may use stand for other CPUs: sums are rounded in another order, with or without FMA.
# Compiled programs are not shared between them: the key of jax's compilation cache contains XLA_FLAGS.
ISAS ?= SSE4_2 AVX AVX2 AVX512
NUMERIC ?= tests/objectives tests/models tests/sampling tests/scale tests/training tests/evaluation tests/reporting
# The part that every `make test` runs a second time: the step against autodiff, the model against transformers.
NUMERIC_CORE := tests/training/test_step.py tests/models/test_golden.py

.PHONY: run test test-isa lint clean

run: .venv/installed
	$(BIN)/lpo train configs/quickstart.yaml --resume $(ARGS)

# Tests take and free memory all the time: it stays with the process, in huge pages.
test: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.arena_max=1
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)
ifeq ($(ARGS)-$(shell uname -m),-x86_64)
	$(MAKE) test-isa ISAS=SSE4_2 NUMERIC='$(NUMERIC_CORE)'
endif

# Every instruction set runs, whatever failed before; each run ends with its smallest margins (tests/margins.py).
test-isa: .venv/installed
	@failed=; for isa in $(ISAS); do echo "XLA_FLAGS=--xla_cpu_max_isa=$$isa"; \
	XLA_FLAGS="$$XLA_FLAGS --xla_cpu_max_isa=$$isa" $(BIN)/python -m pytest -n 2 --dist worksteal $(NUMERIC) $(ARGS) \
	|| failed="$$failed $$isa"; done; if [ -n "$$failed" ]; then echo "failed under$$failed"; exit 1; fi

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lpo_jax needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (set PYTHON=...)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test$(if $(EXTRAS),$(COMMA)$(EXTRAS))]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
