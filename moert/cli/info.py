"""`moert info`: what this machine has, what moert would use, and what it was told by the environment."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

import torch

from moert import __version__
from moert.backends.registry import NAMES, backend_class
from moert.cli.arguments import print_json, print_table, size
from moert.config import MoEConfig
from moert.device import DeviceFacts, device_facts
from moert.env import VARIABLES, given_variables, read_env
from moert.errors import ConfigError
from moert.tuning.store import directories

EXAMPLES = """examples:
  moert info
  moert info --json
"""
# what a backend says of a device, it says of this layer: one that every kernel can serve
USUAL = MoEConfig(128, 8, 2048, 768)
PACKAGES = ("torch", "triton", "transformers", "safetensors", "amd-aiter")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    variables = environment()
    problems = [row["problem"] for row in variables if row["problem"]]
    found = {
        "moert": __version__,
        "python": platform.python_version(),
        "packages": packages(),
        "devices": [asdict(facts) for facts in devices()],
        "backends": [row for facts in devices() for row in backends(facts)],
        # a directory that was named wrongly is among the problems already
        "tuning": tuning(None if problems else read_env().tuning_dir),
        "environment": variables,
        "problems": problems,
    }
    if args.json:
        print_json(found)
    else:
        print_info(found)
    return bool(problems)


def packages() -> dict[str, str | None]:
    """Versions of what moert can work with; None for what is absent."""
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[DeviceFacts]:
    """Every GPU that torch sees, then the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [device_facts(torch.device("cuda", index)) for index in range(count)]
    return [*gpus, device_facts(torch.device("cpu"))]


def backends(facts: DeviceFacts) -> list[dict[str, Any]]:
    """For each backend, None or the reason why it does not serve a usual layer on the device."""
    rows = []
    for name in NAMES:
        found = backend_class(name)
        reason = found if isinstance(found, str) else found.supports(USUAL, facts)
        rows.append({"device": facts.name, "backend": name, "why_not": reason})
    return rows


def tuning(tuning_dir: Any) -> list[dict[str, Any]]:
    """The directories of tuning records in the order of look-up, with their files."""
    return [
        {
            "directory": str(place),
            "source": source,
            "files": sorted(str(file.relative_to(place)) for file in place.glob("*/*.json")),
        }
        for place, source in directories(tuning_dir)
    ]


def environment() -> list[dict[str, Any]]:
    """Every variable that moert reads, and what is wrong with its value."""
    given, rows = given_variables(), []
    for variable in VARIABLES:
        value, problem = given.get(variable.name), None
        try:
            read_env({} if value is None else {variable.name: value})
        except ConfigError as error:
            problem = str(error)
        rows.append(
            {
                "name": variable.name,
                "value": value,
                "default": variable.default,
                "meaning": variable.help,
                "problem": problem,
            }
        )
    return rows


def print_info(found: dict[str, Any]) -> None:
    print(f"moert {found['moert']}, python {found['python']}")
    print(", ".join(f"{name} {v or 'not installed'}" for name, v in found["packages"].items()))
    print("\ndevices")
    rows: list[tuple[Any, ...]] = [
        (
            *(d["name"], d["arch"] or d["kind"], d["compute_units"]),
            size(d["shared_memory"]),
            size(d["l2_bytes"]),
            size(d["memory_bytes"]),
        )
        for d in found["devices"]
    ]
    print_table(("  name", "arch", "units", "shared", "L2", "memory"), _indented(rows))
    print("\nbackends")
    rows = [(b["device"], b["backend"], b["why_not"] or "can be used") for b in found["backends"]]
    print_table(("  device", "backend", ""), _indented(rows))
    print("\ntuning records, in the order of look-up")
    for place in found["tuning"]:
        count = len(place["files"])
        print(f"  {place['directory']} ({place['source']}): {count or 'no'} file(s)")
        for file in place["files"]:
            print(f"    {file}")
    print("\nenvironment")
    rows = [
        (v["name"], v["value"] or f"unset ({v['default']})", v["problem"] or v["meaning"])
        for v in found["environment"]
    ]
    print_table(("  variable", "value", "meaning"), _indented(rows))


def _indented(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(f"  {row[0]}", *row[1:]) for row in rows]
