# Needs only Python >= 3.11, make and a reachable package index.
#   make run     the quickstart: a 135M model learns a task with checkable answers (ARGS="--training.steps=20" ...)
#   make test    lint and tests (ARGS='-m slow': every method end to end, and others that take minutes)
PYTHON ?= python3
BIN := .venv/bin
# The accelerator that is there decides which jax is installed; EXTRAS= or EXTRAS=cuda overrides.
EXTRAS ?= $(shell if nvidia-smi -L >/dev/null 2>&1; then echo cuda; elif ls /dev/accel0 /dev/vfio/0 >/dev/null 2>&1; then echo tpu; fi)
COMMA := ,

.PHONY: run test lint clean

run: .venv/installed
	$(BIN)/lpo train configs/quickstart.yaml --resume $(ARGS)

# Tests take and free memory all the time: it stays with the process, in huge pages.
test: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.arena_max=1
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lpo_jax needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (set PYTHON=...)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test$(if $(EXTRAS),$(COMMA)$(EXTRAS))]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
