#!/bin/bash
# Everything worth knowing from a GPU in nine minutes, into the folder OUT (default: gpu_check):
#
#   OUT=folder scripts/gpu_check.sh                  on one H100 or H200
#   OUT=folder scripts/gpu_check.sh --device cpu     the rehearsal
#
# PYTHON=.venv/bin/python names another interpreter than python3. On a machine that is busy, OMP_NUM_THREADS=1 keeps the
# rehearsal's threads from waiting for each other, and --patience 5 gives each step five times its limit.
#
# What the machine must have, and wheels to bring where they are missing: see the head of gpu_check.py. Nothing is
# installed and nothing is fetched. The order of the steps is by worth: the limit may end the run at any time.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-gpu_check}"
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" XLA_PYTHON_CLIENT_PREALLOCATE=false
export TORCHINDUCTOR_CACHE_DIR="$PWD/.gpu_check_cache/inductor" TRITON_CACHE_DIR="$PWD/.gpu_check_cache/triton"
# The check has the process, the signals and the status of this script: 1 if a step failed.
exec "${PYTHON:-python3}" scripts/gpu_check.py --out "$OUT" "$@"
