"""Facts about devices, present and absent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moert.device import KNOWN_DEVICES, device_facts
from moert.errors import UnsupportedError


def test_the_cpu() -> None:
    facts = device_facts(torch.device("cpu"))
    assert (facts.kind, facts.slug, facts.arch, facts.shared_memory) == ("cpu", "cpu", "", 0)
    assert facts.compute_units >= 1
    assert device_facts(torch.device("cpu")) is facts


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"device={name}: moert runs on cpu and on cuda"):
        device_facts(torch.device(name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_absent_gpu_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="device=cuda:0: torch sees no GPU"):
        device_facts(torch.device("cuda", 0))


@pytest.mark.gpu
def test_a_gpu_that_is_there() -> None:
    facts = device_facts(torch.device("cuda", 0))
    assert facts.kind == ("hip" if torch.version.hip else "cuda")
    assert facts.arch.startswith("gfx" if torch.version.hip else "sm_")
    assert facts.warp_size in (32, 64)
    assert min(facts.compute_units, facts.shared_memory, facts.l2_bytes, facts.memory_bytes) > 0


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("AMD Radeon RX 7900 XTX", "amd-radeon-rx-7900-xtx"),
        ("AMD Instinct MI300X (OEM) / 192GB", "amd-instinct-mi300x-oem-192gb"),
    ],
)
def test_slug(name: str, slug: str) -> None:
    assert replace(KNOWN_DEVICES["sm_90"], name=name).slug == slug


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_known_devices_are_plausible(arch: str) -> None:
    facts = KNOWN_DEVICES[arch]
    assert facts.arch == arch
    assert facts.kind == ("hip" if arch.startswith("gfx") else "cuda")
    # wavefronts of 64 lanes are CDNA's alone: gfx9
    assert facts.warp_size == (64 if arch.startswith("gfx9") else 32)
    assert facts.shared_memory % 1024 == 0 and 65536 <= facts.shared_memory <= 232448
    assert facts.l2_bytes < facts.memory_bytes
