"""Which verbs there are; a verb's module is imported when it is chosen, so that help comes at once."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Final

from moert import __version__
from moert.errors import MoertError

VERBS: Final = {
    "info": "devices, backends, tuning records and environment variables of this machine",
    "plan": "what a layer would run on a device, per batch size, and the memory it takes",
    "check": "whether a checkpoint's experts can be loaded, and the memory they take",
    "tune": "measure the plans of a layer on the GPU at hand and keep them as records",
    "bench": "how long a layer takes here, and whether that got worse",
    "demo": "a tiny language model generating with moert beside its own experts",
    "plot": "pictures of results: times the floor, roofline, crossovers of the sorts",
    "convert": "a checkpoint with int4 experts, of one in any format that moert reads",
    "compile": "compile every kernel for devices that need not be there, and examine the code",
}
OK, PROBLEM, USAGE = 0, 1, 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code: 0 all well, 1 a problem was found, 2 wrong usage.

    Raises:
        SystemExit: by argparse, after help (0) or wrong usage (2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    args = _parser(chosen if chosen in VERBS else None).parse_args(words)
    try:
        return int(args.run(args))
    except MoertError as error:
        print(f"moert {args.verb}: {error}", file=sys.stderr)
        return PROBLEM
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The whole parser, with the arguments of the chosen verb only."""
    parser = argparse.ArgumentParser(
        prog="moert",
        description="The mixture-of-experts layer at decode time.",
        epilog="exit codes: 0 all well, 1 a problem was found, 2 wrong usage",
    )
    parser.add_argument("--version", action="version", version=f"moert {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        module = importlib.import_module(f"moert.cli.{name}") if name == chosen else None
        verb = verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=None if module is None else module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module is not None:
            module.configure(verb)
            verb.set_defaults(run=module.run)
    return parser
