# Sourced by the other scripts: sets PYTHON to an interpreter that has what they need, and changes to the
# root of the repository.
#
# MOERT_PYTHON=/path/to/python  use this interpreter as it is; nothing is installed.
# An active virtual environment that has everything is used as it is, too.
# Otherwise .venv at the root is made and filled; a second start finds its stamp and returns at once.

TORCH=2.13.0
TRITON=3.6.0

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# prints the modules that an interpreter lacks
missing() {
    local python=$1
    shift
    "$python" -c 'import importlib.util, sys
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])' "$@"
}

fail() {
    echo "env.sh: $*" >&2
    exit 2
}

# torch for the CPU: as +cpu from the configured index, else from PyTorch's own, else what there is.
# The plain wheel for Linux on x86_64 brings gigabytes of CUDA along, so it comes last.
install_torch() {
    local pip=("$PYTHON" -m pip install -qq --disable-pip-version-check)
    if nvidia-smi -L >/dev/null 2>&1; then
        "${pip[@]}" "torch>=$TORCH"
        return
    fi
    if [ -e /dev/kfd ]; then
        fail "an AMD GPU: install PyTorch for ROCm and name its interpreter in MOERT_PYTHON"
    fi
    "${pip[@]}" "torch==$TORCH+cpu" 2>/dev/null ||
        "${pip[@]}" "torch==$TORCH" --index-url https://download.pytorch.org/whl/cpu --retries 0 2>/dev/null ||
        "${pip[@]}" "torch==$TORCH"
}

base_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "needs python >= 3.10 with the venv module"
}

make_venv() {
    local stamp=.venv/moert-stamp want base
    want=$({ cat pyproject.toml scripts/env.sh && grep __version__ moert/__init__.py; } | cksum)
    PYTHON=$PWD/.venv/bin/python
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
        return
    fi
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        base=$(base_python)
        echo "making .venv with $("$base" --version)"
        "$base" -m venv .venv
    fi
    echo "installing what .venv lacks"
    if [ -n "$(missing "$PYTHON" torch)" ]; then
        install_torch
    fi
    local wanted=(-e ".[dev]")
    # torch with CUDA pins its own triton; torch for the CPU brings none
    if [ "$(uname -sm)" = "Linux x86_64" ] && [ -n "$(missing "$PYTHON" triton)" ]; then
        wanted+=("triton==$TRITON")
    fi
    "$PYTHON" -m pip install -qq --disable-pip-version-check "${wanted[@]}"
    echo "$want" >"$stamp"
}

RUNTIME_MODULES=(torch numpy safetensors platformdirs)
DEV_MODULES=(pytest pytest_benchmark hypothesis transformers ruff mypy)
if [ "$(uname -sm)" = "Linux x86_64" ]; then
    DEV_MODULES+=(triton)
fi

if [ -n "${MOERT_PYTHON:-}" ]; then
    PYTHON=$MOERT_PYTHON
    lacks=$(missing "$PYTHON" "${RUNTIME_MODULES[@]}") || fail "MOERT_PYTHON=$PYTHON does not run"
    [ -z "$lacks" ] || fail "MOERT_PYTHON=$PYTHON lacks: $lacks"
elif [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ] &&
    [ -z "$(missing "$VIRTUAL_ENV/bin/python" "${RUNTIME_MODULES[@]}" "${DEV_MODULES[@]}")" ]; then
    PYTHON=$VIRTUAL_ENV/bin/python
else
    make_venv
fi

# nothing here needs the network once installed
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# the tree beside this script, also where moert is not installed
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
