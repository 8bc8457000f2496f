"""What Triton's compiler is asked for, as data that another process can be handed.

Triton finds a compiled kernel in its cache on disk by the kernel's source, the signature, constants, options
and the target. A job holds all of them but the target, so that whichever process compiles it makes the very
entry that every other process will look for.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Triton's form of what is known of an argument, by (index,)
Attributes = dict[tuple[int], list[list[Any]]]


@dataclass(frozen=True, slots=True)
class CompileJob:
    """One kernel, specialised; equal jobs are one compiled kernel on every device.

    Args:
        module, name: where the kernel is defined, and as what.
        signature: parameter names and Triton's types, in order.
        constants: values of the parameters of type "constexpr"; hashable.
        divisible: indices of the parameters that are known to be multiples of 16.
        options: of the compiler.
    """

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def kernel(self) -> Any:
        """The kernel that the module defines by this name.

        Raises:
            ImportError, AttributeError: there is none.
        """
        return getattr(importlib.import_module(self.module), self.name)

    def compile(self, target: Any = None, kernel: Any = None) -> Any:
        """The compiled kernel, from Triton's cache where it is there.

        Args:
            target: a `GPUTarget` that need not be present; the current device by default.
            kernel: the kernel itself, where no module defines it.
        """
        import triton

        kernel = self.kernel() if kernel is None else kernel
        return triton.compile(self._source(kernel), target=target, options=dict(self.options))

    def cached(self, target: Any) -> bool | None:
        """Whether Triton's cache on disk has it for a `GPUTarget`; None where that cannot be told.

        Asked in the way of `triton.compile` (3.6), whose parts are not for others to rely on.
        """
        try:
            from triton.compiler import compiler

            source, backend = self._source(self.kernel()), compiler.make_backend(target)
            options = backend.parse_options({**dict(self.options), **source.parse_options()})
            variables = compiler.get_cache_invalidating_env_vars()
            key = compiler.get_cache_key(source, backend, options, env_vars=variables)
            folder = compiler.get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
            name = f"{source.name[:150]}.json"
            return name in (folder.get_group(name) or {})
        except Exception:
            return None

    def _source(self, kernel: Any) -> Any:
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        make_source = GluonASTSource if kernel.is_gluon() else ASTSource
        attributes: Attributes = {(index,): [["tt.divisibility", 16]] for index in self.divisible}
        return make_source(kernel, dict(self.signature), dict(self.constants), attributes)


def make_job(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Sequence[int],
    options: Mapping[str, Any],
) -> CompileJob:
    """The job of a `triton.jit` or Gluon kernel; arguments as for `CompileJob`."""
    return CompileJob(
        kernel.fn.__module__,
        kernel.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )
