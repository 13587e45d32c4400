#!/usr/bin/env bash
# All GPU checks of the project in one command, in under nine minutes; needs no network.
#   benchmarks/gpu.sh                  on a machine with a CUDA GPU and torch 2.11 or newer
#   benchmarks/gpu.sh --cpu-dry-run    the same code at small sizes on a CPU
# PYTHON chooses the interpreter; packages that are not installed may come by PYTHONPATH.
# Without a GPU it says so, does the dry run and exits 0. A failed check exits 1.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
exec timeout --kill-after=10 535 "$PYTHON" -m benchmarks.gpu_checks "$@"
