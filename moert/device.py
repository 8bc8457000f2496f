"""What a device can hold and run, as plain facts that plans and tuning are derived from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moert.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Facts of one device; pure data, so that plans for absent devices can be made and tested.

    Args:
        kind: "cpu", "cuda" or "hip".
        name: as the driver gives it, for tables and cache file names.
        arch: "sm_90", "gfx942", or "" on a CPU.
        compute_units: SMs or CUs (cores on a CPU).
        shared_memory: bytes of shared memory/LDS one workgroup may use.
        warp_size: 32 or 64.
        l2_bytes: last-level cache shared by all units.
        memory_bytes: device memory.
    """

    kind: str
    name: str
    arch: str
    compute_units: int
    shared_memory: int
    warp_size: int
    l2_bytes: int
    memory_bytes: int

    @property
    def compute_capability(self) -> int:
        """NVIDIA's, times ten: 90 of "sm_90"; 0 elsewhere."""
        return int(self.arch.removeprefix("sm_") or 0) if self.kind == "cuda" else 0

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel can start while its predecessor drains: NVIDIA, compute capability 9.0 on."""
        return self.compute_capability >= 90

    @property
    def slug(self) -> str:
        """The name as a file name: "nvidia-h200"."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())


@lru_cache(maxsize=16)
def device_facts(device: torch.device) -> DeviceFacts:
    """Read the facts of a device that is present.

    Raises:
        UnsupportedError: a device type that is neither a CPU nor a CUDA/HIP GPU, or none present.
    """
    if device.type == "cpu":
        return DeviceFacts("cpu", "cpu", "", torch.get_num_threads(), 0, 1, 0, 0)
    if device.type != "cuda":
        raise UnsupportedError(
            f"device={device}: moert runs on cpu and on cuda (NVIDIA or ROCm) devices"
        )
    if not torch.cuda.is_available():
        raise UnsupportedError(f"device={device}: torch sees no GPU here; use device='cpu'")
    props = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    arch = props.gcnArchName.split(":")[0] if hip else f"sm_{props.major}{props.minor}"
    shared = getattr(props, "shared_memory_per_block_optin", 0) or getattr(
        props, "shared_memory_per_block", 65536
    )
    return DeviceFacts(
        kind="hip" if hip else "cuda",
        name=props.name,
        arch=arch,
        compute_units=props.multi_processor_count,
        shared_memory=shared,
        warp_size=getattr(props, "warp_size", 64 if arch.startswith("gfx9") else 32),
        l2_bytes=getattr(props, "L2_cache_size", 0),
        memory_bytes=props.total_memory,
    )


# facts of devices that need not be present: default plans and compile checks are made from them.
# NVIDIA: shared memory opt-in limit per block (CUDA programming guide, compute capability tables);
# AMD: CUs and LDS per workgroup (CDNA2/3/4 and RDNA3/3.5 ISA guides; gfx950 has 160 KiB of LDS).
KNOWN_DEVICES = {
    "sm_80": DeviceFacts("cuda", "NVIDIA A100", "sm_80", 108, 166912, 32, 40 << 20, 80 << 30),
    "sm_90": DeviceFacts("cuda", "NVIDIA H200", "sm_90", 132, 232448, 32, 60 << 20, 141 << 30),
    "sm_100": DeviceFacts("cuda", "NVIDIA B200", "sm_100", 148, 232448, 32, 126 << 20, 180 << 30),
    "gfx90a": DeviceFacts(
        "hip", "AMD Instinct MI250X", "gfx90a", 104, 65536, 64, 8 << 20, 64 << 30
    ),
    "gfx942": DeviceFacts(
        "hip", "AMD Instinct MI300X", "gfx942", 304, 65536, 64, 32 << 20, 192 << 30
    ),
    "gfx950": DeviceFacts(
        "hip", "AMD Instinct MI355X", "gfx950", 256, 163840, 64, 32 << 20, 288 << 30
    ),
    "gfx1100": DeviceFacts(
        "hip", "AMD Radeon RX 7900 XTX", "gfx1100", 96, 65536, 32, 6 << 20, 24 << 30
    ),
    "gfx1151": DeviceFacts("hip", "AMD Radeon 8060S", "gfx1151", 40, 65536, 32, 2 << 20, 96 << 30),
    "gfx1201": DeviceFacts(
        "hip", "AMD Radeon RX 9070 XT", "gfx1201", 64, 65536, 32, 8 << 20, 16 << 30
    ),
}
