"""`python -m moert`: see `moert.cli`."""

from __future__ import annotations

import sys

from moert.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
