#!/usr/bin/env bash
# Everything that only an AMD GPU can show, in one command: contract tests, allocations and copies, graph replay
# with updated arguments, AITER if it is there, the sort crossover, the decode table. Writes one report file to
# send back.
#     bash scripts/rocm_check.sh [--out FILE] [--only PART ...]
# MOERT_PYTHON names the interpreter (torch for ROCm, triton, pytest); default: .venv or python3, whichever has
# torch for ROCm. Nothing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for python in "${MOERT_PYTHON:-.venv/bin/python}" python3; do
    if "$python" -c 'import torch; assert torch.version.hip' 2>/dev/null; then
        exec "$python" scripts/rocm_check.py "$@"
    fi
done
# none has: the script says what is missing
exec "${MOERT_PYTHON:-python3}" scripts/rocm_check.py "$@"
