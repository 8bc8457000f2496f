"""The backends in order of preference, and why one is or is not taken.

"auto" takes the first that can serve a layer. On ROCm AITER may be able to as well, and which is faster is a
property of the shape and the chip: with graphs="host" both are tuned and the faster one is taken
(`moert.tuning.contest`). With graphs of our own it is Triton: a replay costs the host one launch, and AITER's
calls, whose addresses no graph of ours can rewrite, one for each operator.
"""

from __future__ import annotations

import torch

from moert.backends.base import Backend
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.errors import ConfigError, UnsupportedError

NAMES = ("triton", "aiter", "torch")


def backend_class(name: str) -> type[Backend] | str:
    """The class, imported only now, or the reason why it cannot be imported."""
    if name == "torch":
        from moert.backends.torch import TorchBackend

        return TorchBackend
    try:
        if name == "aiter":
            # its operators are looked for by `supports`; some kernels of ours run beside them
            from moert.backends.aiter import AiterBackend

            return AiterBackend
        from moert.backends.triton import TritonBackend
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return TritonBackend


def select_backend(
    name: str, cfg: MoEConfig, facts: DeviceFacts
) -> tuple[type[Backend], tuple[str, ...]]:
    """The backend to use, and for "auto" a note for each one passed over.

    Raises:
        ConfigError: an unknown name.
        UnsupportedError: the one asked for, or every one, cannot serve the configuration here.
    """
    if name not in ("auto", *NAMES):
        raise ConfigError(f"backend={name!r} is not one of auto, {', '.join(NAMES)}")
    reasons: list[str] = []
    # on a CPU triton is an interpreter, for tests: there, only whoever names it gets it
    order = ("torch",) if facts.kind == "cpu" else NAMES
    for candidate in order if name == "auto" else (name,):
        found = backend_class(candidate)
        reason = found if isinstance(found, str) else found.supports(cfg, facts)
        if reason is None and not isinstance(found, str):
            return found, tuple(reasons)
        reasons.append(f"backend {candidate}: {reason}")
    raise UnsupportedError(f"no backend for {facts.name}: " + "; ".join(reasons))


def rival(
    chosen: type[Backend], cfg: MoEConfig, facts: DeviceFacts, *, graphs: str, tune: str
) -> type[Backend] | str | None:
    """What "auto" has to time against the backend that it chose first.

    Args:
        graphs, tune: the runtime's options.

    Returns:
        The other backend, a note why it is not timed, or None where there is none to speak of.
    """
    if facts.kind != "hip" or chosen.name != "triton":
        return None
    found = backend_class("aiter")
    reason = found if isinstance(found, str) else found.supports(cfg, facts)
    if isinstance(found, str) or reason is not None:
        return f"backend aiter: {reason}"
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    reasons = {
        f"graphs={graphs!r} (only graphs='host' times it against triton)": graphs != "host",
        f"tune={tune!r}": tune == "off",
        "torch.distributed runs, and all ranks have to take the same": ranks,
    }
    untimed = next((reason for reason, holds in reasons.items() if holds), None)
    if untimed is None:
        return found
    return (
        f"backend aiter: can serve this layer too, not timed: {untimed}; backend='aiter' takes it"
    )
