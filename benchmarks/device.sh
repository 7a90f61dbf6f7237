#!/usr/bin/env bash
# Measure this machine's accelerator with device.py: parity, decoding, the gradient, a full step, memory.
# Uses the interpreter in PYTHON if it can import the required packages, otherwise the repository's .venv.
#
#   benchmarks/device.sh --out results          # all measurements, at most eight minutes
#   benchmarks/device.sh --dry-run              # tiny shapes on any device
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import flax, jax, optax, pydantic' 2>/dev/null; then
  make --quiet .venv/installed
  python=.venv/bin/python
fi
exec timeout --signal=INT 480 "$python" benchmarks/device.py "$@"
