"""What a time depends on besides the code: the device and the versions, and nothing that changes daily."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from device_timing import DEVICE, GPU

from moert import __version__
from moert.device import DeviceFacts, device_facts


def facts() -> DeviceFacts:
    place = torch.device("cuda", torch.cuda.current_device()) if GPU else DEVICE
    return device_facts(place)


def driver() -> str | None:
    """The version of the GPU's driver in the kernel; None where there is no GPU or nobody says."""
    if not GPU:
        return None
    for name in ("nvidia", "amdgpu"):
        path = Path("/sys/module") / name / "version"
        if path.is_file():
            return path.read_text().strip()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.splitlines()[0].strip() if said else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_info() -> dict[str, Any]:
    """For the JSON of a run: two runs with the same content can be compared without a second thought."""
    here = facts()
    return {
        "device": here.name,
        "arch": here.arch,
        "compute_units": here.compute_units,
        "driver": driver(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "moert": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
