#!/usr/bin/env bash
# Measure this machine's accelerator with device.py: matrix rate and copy bandwidth, parity of the kernels, the gradient,
# a full step, decoding, memory, and `lpo plan` against the measured times. At most eight minutes with installation.
# Uses the interpreter in PYTHON if it can import the required packages, otherwise the repository's .venv.
#
#   benchmarks/device.sh --out results          # all measurements; JSON and a table in results/
#   benchmarks/device.sh --dry-run              # tiny shapes on any device
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import flax, jax, optax, pydantic' 2>/dev/null; then
  make --quiet .venv/installed
  python=.venv/bin/python
fi
exec timeout --signal=INT $((480 - SECONDS)) "$python" benchmarks/device.py --seconds $((420 - SECONDS)) "$@"
