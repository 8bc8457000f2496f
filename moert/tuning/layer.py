"""What the trials of all buckets of one layer share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from moert.backends.base import Backend
from moert.backends.even_routing import distinct_experts
from moert.compile_ahead import Ahead, NothingAhead, in_order
from moert.compile_job import CompileJob
from moert.plan import Choice
from moert.quantization.int4_layout import Int4Matrix
from moert.tuning.measure import Rotation, cache_bytes, plan_rotation
from moert.tuning.probes import Probes
from moert.weights import ExpertWeights, Matrix

log = logging.getLogger("moert")

WORK: Final = ("waiting", "building", "checking", "timing")  # what the seconds of a bucket go into


class Layer:
    """What the trials of all buckets use: the backend, its compiled kernels, copies of its weights.

    Args:
        backend: bound to the layer's weights.
        probes: its device.
    """

    def __init__(self, backend: Backend, probes: Probes) -> None:
        self.backend, self.probes = backend, probes
        self.kernel_cache: dict[Any, Any] = {}
        self._bound = [backend]
        self.used = False  # something was put on the device
        self.spent = dict.fromkeys(WORK, 0.0)  # seconds
        self._jobs: dict[int, dict[CompileJob, None]] = {}
        self._ahead: Ahead = NothingAhead()

    @contextlib.contextmanager
    def spending(self, work: str) -> Iterator[None]:
        """Count the seconds as `work`, one of `WORK`."""
        start = self.probes.now()
        try:
            yield
        finally:
            self.spent[work] += self.probes.now() - start

    def compile_ahead(self, buckets: Mapping[int, Sequence[Choice]]) -> None:
        """Start to compile what the candidates of these buckets need, in the order of the buckets."""
        self._jobs = {tokens: self._jobs_of(tokens, choices) for tokens, choices in buckets.items()}
        jobs = in_order(self._jobs.values(), self.kernel_cache)
        if jobs:
            self._ahead = self.probes.compile_ahead(jobs)

    def _jobs_of(self, tokens: int, choices: Sequence[Choice]) -> dict[CompileJob, None]:
        def jobs(choice: Choice) -> tuple[CompileJob, ...]:
            try:
                return self.backend.compile_jobs(tokens, choice)
            except Exception as error:
                # its program cannot be made either: it is dropped there
                log.debug("tuning %d tokens: %s not compiled ahead: %r", tokens, choice, error)
                return ()

        return dict.fromkeys(job for choice in choices for job in jobs(choice))

    def wait_for_kernels(self, tokens: int) -> None:
        """Until what was started for this bucket is compiled."""
        with self.spending("waiting"):
            self._ahead.wait(self._jobs.get(tokens, {}))

    def rotation(self, tokens: int) -> Rotation:
        """How timed calls of `tokens` rows spread over the weights."""
        cfg, weights = self.backend.cfg, self.backend.weights
        layer_bytes = weights.w13.nbytes + weights.w2.nbytes
        hit = distinct_experts(cfg.num_experts, cfg.top_k, tokens) / cfg.num_experts
        cache = cache_bytes(self.backend.facts)
        return plan_rotation(layer_bytes, int(hit * layer_bytes), cache, self.probes.free_bytes())

    def bound_to_copies(self, count: int) -> list[Backend]:
        """The backend, and others of its kind bound to copies of the weights.

        Raises:
            torch.OutOfMemoryError: the copies do not fit after all.
        """
        backend = self.backend
        while len(self._bound) < count:
            copy = copied(backend.weights)
            self._bound.append(type(backend)(backend.cfg, copy, backend.facts))
        return self._bound[:count]

    def forget_copies(self) -> None:
        del self._bound[1:]

    def close(self) -> None:
        """Free everything on the device, and stop compiling ahead."""
        try:
            self._ahead.close()
        finally:
            self.forget_copies()
            self.kernel_cache.clear()
            if self.used:
                self.probes.release()


def copied(weights: ExpertWeights) -> ExpertWeights:
    """Copies of the two matrices with the very strides they have, so that the same kernels fit."""

    def copy(tensor: Matrix) -> Matrix:
        if isinstance(tensor, Int4Matrix):
            return tensor.clone()
        new = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        return new.copy_(tensor)

    return replace(weights, w13=copy(weights.w13), w2=copy(weights.w2))
