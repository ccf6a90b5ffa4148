#!/usr/bin/env bash
# What can only be shown on a GPU; prints a table. Exit status: 0 all as it should be, 1 not, 2 there is no GPU.
#     scripts/stress/gpu_check.sh [--output benchmarks/gpu.json]
# hf_lsam need not be installed; torch, transformers, accelerate and peft must be. PYTHON names another interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x "$root/.venv/bin/python" ]] && PYTHON="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$root/scripts/stress/gpu_check.py" "$@"
