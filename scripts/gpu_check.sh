#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: contract tests, every choice, memory checker, host cost, chained
# replays, start-up. Writes JSON and a summary under bench/results/<device>/.
# MOERT_PYTHON names the interpreter (torch with a GPU, triton, pytest); default: python3 if it has them.
set -euo pipefail
if [ -z "${MOERT_PYTHON:-}" ] && python3 -c 'import torch, triton, pytest; assert torch.cuda.is_available()' 2>/dev/null; then
    export MOERT_PYTHON=python3
fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" scripts/gpu_check.py "$@"
