#!/usr/bin/env bash
# Measures on the GPU at hand and compares with its committed baseline; fails on a regression of a median.
#     bash scripts/bench_regress.sh [-k EXPR] [--percent 10] [--save] [--out DIR]      (see bench/regress.py)
# MOERT_PYTHON names the interpreter (torch with a GPU, triton, pytest-benchmark); default: python3 if it has them.
set -euo pipefail
if [ -z "${MOERT_PYTHON:-}" ] && python3 -c 'import torch, triton, pytest_benchmark; assert torch.cuda.is_available()' 2>/dev/null; then
    export MOERT_PYTHON=python3
fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" bench/regress.py "$@"
