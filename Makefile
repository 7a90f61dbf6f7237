# Requires only Python >= 3.11, make and a reachable package index.
#   make run       run the quickstart: a 135M model learns a task with verifiable answers (ARGS="--training.steps=20" ...)
#   make test      run lint and tests (ARGS='-m slow': every method end to end, and other tests that take minutes)
#   make docs      build the documentation site in build/site; warnings are errors
#   make test-isa  run the numeric tests fully optimised, with XLA limited to each instruction set in ISAS
PYTHON ?= python3
BIN := .venv/bin
# The extra of jax to install depends on the accelerator of this machine; EXTRAS= or EXTRAS=cuda overrides the choice.
EXTRAS ?= $(shell if nvidia-smi -L >/dev/null 2>&1; then echo cuda; elif ls /dev/accel0 /dev/vfio/0 >/dev/null 2>&1; then echo tpu; fi)
COMMA := ,
# Processes share the bytecode of the package and its tests. Without bytecode, a worker takes 7 s longer to collect tests.
unexport PYTHONDONTWRITEBYTECODE

# Limiting the instruction sets of XLA simulates other CPUs: sums are rounded in a different order, with or without FMA.
# The compiled programs do not mix, because the key of jax's compilation cache contains XLA_FLAGS.
# Tests skip most optimisations (tests/conftest.py); these runs do not.
ISAS ?= default SSE4_2 AVX AVX2 AVX512
NUMERIC ?= tests/objectives tests/models tests/sampling tests/rollout tests/parallel tests/planner tests/training \
  tests/runs tests/evaluation tests/reporting
# Every `make test` compiles these as a run does: the float32 results against float64, autodiff and transformers. SSE4_2
# has no FMA, so that they are rounded in a different way than in the tests before, which have the instructions of this
# machine. Beside the other tests they would take more time than after them.
NUMERIC_CORE := $(addprefix tests/models/test_golden.py::test_logits_equal_transformers,[llama] [qwen3]) \
  $(addprefix tests/training/test_step.py::test_,scores_equal_those_of_each_response_alone \
  three_parts_in_float32_differ_by_rounding)

.PHONY: run test pytest test-isa lint docs clean

run: .venv/installed
	$(BIN)/lpo train configs/quickstart.yaml --resume $(ARGS)

test: .venv/installed
	$(MAKE) -j 2 lint pytest
ifeq ($(ARGS)-$(shell uname -m),-x86_64)
	$(MAKE) test-isa ISAS=SSE4_2 NUMERIC='$(NUMERIC_CORE)'
endif

# Tests allocate and free memory all the time, so the process keeps freed memory, in huge pages. A worker runs whole
# files, because the tests of a file share programs. On two cores, two workers are idle for 5 to 8% of the time, while
# tests wait for other processes; with a third worker no core is idle, but the suite takes 15% more processor time.
pytest test-isa: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.arena_max=4
pytest: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# All instruction sets are tested even after a failure. Each run ends with its smallest margins (tests/margins.py).
test-isa: export JAX_DISABLE_MOST_OPTIMIZATIONS = 0
test-isa: .venv/installed
	@failed=; for isa in $(ISAS); do \
	flags="$$XLA_FLAGS $$([ $$isa = default ] || echo --xla_cpu_max_isa=$$isa)"; echo "XLA_FLAGS=$$flags"; \
	XLA_FLAGS="$$flags" $(BIN)/python -m pytest -n 2 --dist worksteal $(NUMERIC) $(ARGS) \
	|| failed="$$failed $$isa"; done; if [ -n "$$failed" ]; then echo "failed under$$failed"; exit 1; fi

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lpo_jax needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (set PYTHON=...)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test$(if $(EXTRAS),$(COMMA)$(EXTRAS))]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
