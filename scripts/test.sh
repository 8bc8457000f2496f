#!/usr/bin/env bash
# All checks: lint, format, types, tests. Arguments go to pytest. Exits with the code of the first failure.
#     bash scripts/test.sh [-k sorting]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

SUMMARY=()
CODE=0

# step NAME MODULE COMMAND...: runs a step if its module is there, notes how it went and how long it took
step() {
    local name=$1 module=$2 start=$SECONDS code=0
    shift 2
    if [ -n "$(missing "$PYTHON" "$module")" ]; then
        SUMMARY+=("skipped  $name ($module is not installed)")
        return
    fi
    echo "== $name"
    "$@" || code=$?
    if [ "$code" -eq 0 ]; then
        SUMMARY+=("ok       $name, $((SECONDS - start)) s")
    else
        SUMMARY+=("FAILED   $name, $((SECONDS - start)) s, exit code $code")
        [ "$CODE" -ne 0 ] || CODE=$code
    fi
}

# a GPU is not shared between test processes: the tests watch its free memory
WORKERS=()
if [ -z "$(missing "$PYTHON" xdist)" ] &&
    "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    cores=$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    WORKERS=(-n "$((cores < 8 ? cores : 8))" --dist worksteal)
    export OMP_NUM_THREADS=1
fi

step "ruff check" ruff "$PYTHON" -m ruff check
step "ruff format" ruff "$PYTHON" -m ruff format --check --quiet
step "mypy" mypy "$PYTHON" -m mypy
step "pytest" pytest "$PYTHON" -m pytest -q ${WORKERS[@]+"${WORKERS[@]}"} "$@"

echo
printf '%s\n' "${SUMMARY[@]}"
exit "$CODE"
