"""The backends in order of preference, and why one is or is not taken."""

from __future__ import annotations

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
