#!/usr/bin/env bash
# Everything that only an AMD GPU can show, in one command: contract tests, allocations and copies, graph replay
# with updated arguments, the sort crossover, the decode table. Writes one report file to send back.
#     bash scripts/rocm_check.sh [--out FILE] [--only PART ...]
# MOERT_PYTHON names the interpreter (torch for ROCm, triton, pytest); default: python3 if it has them.
set -euo pipefail
if [ -z "${MOERT_PYTHON:-}" ] && python3 -c 'import torch, triton, pytest; assert torch.version.hip' 2>/dev/null; then
    export MOERT_PYTHON=python3
fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" scripts/rocm_check.py "$@"
