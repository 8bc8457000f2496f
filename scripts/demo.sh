#!/usr/bin/env bash
# The demonstration, in an environment that is made when there is none. Arguments go to `moert demo`.
#     bash scripts/demo.sh [--quick]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

exec "$PYTHON" -m moert demo "$@"
