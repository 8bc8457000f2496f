"""What compiled machine code says about itself: parsing alone, no device and no Triton needed.

AMD: the metadata and comments of LLVM's AMDGPU assembly (LLVM, "User Guide for AMDGPU Backend", code object
metadata). NVIDIA: `cuobjdump --dump-resource-usage` and PTX.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moert.device import DeviceFacts

_MATRIX = {
    "hip": r"^\s*v_(?:mfma|smfmac|wmma|swmmac)_",
    "cuda": r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b",
}
_HIP_LOAD = r"^\s*(?:global|buffer|flat)_load_(?:lds_)?(?:d16_(?:hi_)?)?([a-z]+\d*)"
_HIP_BYTES = {
    "dwordx4": 16,
    "b128": 16,
    "dwordx3": 12,
    "b96": 12,
    "dwordx2": 8,
    "b64": 8,
    "dword": 4,
    "b32": 4,
}
_CUDA_LOAD = r"\bld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b"
_CUDA_ASYNC = r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)"

TRITONS_ARGUMENTS = 2  # scratch pointers, last: node updates of graphs count on no others

# registers of one SIMD lane and the most warps of one SIMD (CUDA programming guide, compute capabilities;
# AMD's are counted by the compiler itself)
_CUDA_REGISTERS, _CUDA_WARPS, _CUDA_SIMDS = 65536, 64, 4
_CUDA_RESERVED = 1024  # bytes of shared memory the system takes of every block


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel uses.

    Args:
        vgprs: vector registers a lane (AMD: the accumulation registers are part of them from gfx90a on).
        agprs, sgprs: accumulation and scalar registers; 0 on NVIDIA.
        spills: vector registers kept in memory.
        scratch: bytes of private memory a lane.
        global_scratch: bytes of device memory that a launch would have to allocate.
        shared: bytes of shared memory (LDS) a workgroup.
        occupancy: warps (waves) that one SIMD can hold at a time.
        matrix: matrix instructions in the code.
        widest_load: bytes a lane loads at once from device memory, at most.
        hidden: arguments that the machine code takes beyond those of the kernel.
    """

    vgprs: int
    agprs: int
    sgprs: int
    spills: int
    scratch: int
    global_scratch: int
    shared: int
    occupancy: int
    matrix: int
    widest_load: int
    hidden: int = TRITONS_ARGUMENTS


def read_amdgcn(
    text: str,
    facts: DeviceFacts,
    *,
    num_warps: int,
    shared: int,
    global_scratch: int = 0,
    hidden: int = TRITONS_ARGUMENTS,
) -> Resources:
    """Resources of AMD assembly.

    Raises:
        ValueError: the text has no kernel metadata.
    """
    # the compiler does not know the shared memory, which is given at launch; a CU has 4 SIMDs, on RDNA 2
    simds = 4 if facts.warp_size == 64 else 2
    waves = _number(text, r"; Occupancy: (\d+)")
    if shared:
        waves = min(waves, facts.shared_memory // shared * num_warps // simds)
    return Resources(
        vgprs=_number(text, r"\.vgpr_count:\s+(\d+)"),
        agprs=_number(text, r"\.agpr_count:\s+(\d+)", default=0),
        sgprs=_number(text, r"\.sgpr_count:\s+(\d+)"),
        spills=_number(text, r"\.vgpr_spill_count:\s+(\d+)"),
        scratch=_number(text, r"\.private_segment_fixed_size:\s+(\d+)"),
        global_scratch=global_scratch,
        shared=shared,
        occupancy=waves,
        matrix=len(re.findall(_MATRIX["hip"], text, re.MULTILINE)),
        widest_load=max(_hip_loads(text), default=0),
        hidden=hidden,
    )


def read_ptx(
    text: str,
    usage: str,
    facts: DeviceFacts,
    *,
    num_warps: int,
    shared: int,
    global_scratch: int = 0,
    hidden: int = TRITONS_ARGUMENTS,
) -> Resources:
    """Resources of NVIDIA code.

    Args:
        text: PTX.
        usage: what `cuobjdump --dump-resource-usage` prints about the cubin.

    Raises:
        ValueError: the usage names no registers.
    """
    registers = _number(usage, r"\bREG:(\d+)")
    stack = _number(usage, r"\bSTACK:(\d+)") + _number(usage, r"\bLOCAL:(\d+)")
    blocks = _CUDA_REGISTERS // (-(-max(registers, 1) // 8) * 8 * 32 * num_warps)
    blocks = min(blocks, _CUDA_WARPS // num_warps)
    if shared:
        blocks = min(blocks, (facts.shared_memory + _CUDA_RESERVED) // (shared + _CUDA_RESERVED))
    return Resources(
        vgprs=registers,
        agprs=0,
        sgprs=0,
        spills=stack // 4,
        scratch=stack,
        global_scratch=global_scratch,
        shared=shared,
        occupancy=blocks * num_warps // _CUDA_SIMDS,
        matrix=len(re.findall(_MATRIX["cuda"], text)),
        widest_load=max(_cuda_loads(text), default=0),
        hidden=hidden,
    )


def problems(
    found: Resources, facts: DeviceFacts, *, needs_matrix: bool, needs_wide: bool
) -> list[str]:
    """What is wrong with a kernel on a device; empty where nothing is.

    Nothing is allowed for: one spilled register, one byte of scratch is a fault on every device.
    """
    wrong = {
        f"spills {found.spills} registers": found.spills > 0,
        f"{found.scratch} bytes of scratch a lane": found.scratch > 0,
        f"{found.global_scratch} bytes of device memory a launch": found.global_scratch > 0,
        f"{found.shared} bytes of shared memory, the device has {facts.shared_memory}": (
            found.shared > facts.shared_memory
        ),
        f"{found.hidden} hidden arguments, Triton adds {TRITONS_ARGUMENTS}": (
            found.hidden != TRITONS_ARGUMENTS
        ),
        "no matrix instruction": needs_matrix and not found.matrix,
        f"no 16-byte load, the widest has {found.widest_load}": (
            needs_wide and found.widest_load < 16
        ),
    }
    return [text for text, holds in wrong.items() if holds]


def _number(text: str, pattern: str, default: int | None = None) -> int:
    """The largest of all matches: a file may hold more than one kernel."""
    numbers = [int(number) for number in re.findall(pattern, text)]
    if not numbers and default is None:
        raise ValueError(f"nothing in the compiler's output matches {pattern!r}")
    return max(numbers) if numbers else int(default or 0)


def _hip_loads(text: str) -> Iterator[int]:
    for kind in re.findall(_HIP_LOAD, text, re.MULTILINE):
        yield _HIP_BYTES.get(kind, 2 if kind.endswith(("16", "short")) else 1)


def _cuda_loads(text: str) -> Iterator[int]:
    for lanes, bits in re.findall(_CUDA_LOAD, text):
        yield int(lanes or 1) * int(bits) // 8
    for size in re.findall(_CUDA_ASYNC, text):
        yield int(size, 0)
    if "cp.async.bulk" in text:
        yield 16
