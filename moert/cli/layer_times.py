"""Times of one layer geometry at decode time: chained layers with weights and routing of their own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

import torch

from moert import __version__
from moert.backends.even_routing import distinct_experts
from moert.config import MoEConfig
from moert.device import device_facts
from moert.runtime import MoERuntime
from moert.topk import TopK
from moert.tuning.measure import COLD_CACHES, cache_bytes
from moert.tuning.probes import DeviceProbes
from moert.weights import ExpertWeights

ROUNDS: Final = 15
HOST_SECONDS: Final = 0.2  # of one batch size on a CPU
MIN_LAYERS, MAX_LAYERS = 2, 8
MEMORY_FRACTION: Final = 0.5  # of what is free, for weights


class LayerTimes:
    """A chain of layers that share, ready to be timed at several T; a context manager.

    Args:
        cfg: of each layer.
        tokens: every T that will be asked for.
        backend, tune: as for `MoERuntime`.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        tokens: Sequence[int],
        *,
        backend: str | None = None,
        tune: str | None = None,
    ) -> None:
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else _CPU
        self.cfg, self._gpu = cfg, gpu
        first = ExpertWeights.random(cfg, device=self.device)
        # the router is not the layer's to read
        held = (first.w13, first.w2, first.b13, first.b2)
        self._layer_bytes = sum(part.nbytes for part in held if part is not None)
        self.layers = [
            MoERuntime(
                cfg,
                first,
                backend=backend,
                tune=tune,
                buckets=sorted(set(tokens)),
                max_tokens=max(tokens),
                graphs="host" if gpu else None,
            )
        ]
        for seed in range(1, self._layer_count(min(tokens))):
            weights = ExpertWeights.random(cfg, seed=seed, device=self.device)
            self.layers.append(MoERuntime(cfg, weights, share=self.layers[0]))
        self._report = self.layers[0].plan()

    def _layer_count(self, tokens: int) -> int:
        """Enough that no cache holds a layer's experts until their next use, and fit the memory."""
        if not self._gpu:
            return MIN_LAYERS
        cfg = self.cfg
        hit = distinct_experts(cfg.num_experts, cfg.top_k, tokens) / cfg.num_experts
        wanted = COLD_CACHES * cache_bytes(device_facts(self.device)) / (hit * self._layer_bytes)
        free = MEMORY_FRACTION * torch.cuda.mem_get_info(self.device)[0] / self._layer_bytes
        return max(1, min(MAX_LAYERS, max(MIN_LAYERS, round(wanted + 0.5)), int(free)))

    def facts(self) -> dict[str, Any]:
        """What all figures have in common."""
        return {
            "device": device_facts(self.device).name,
            "made_with": {"moert": __version__, "torch": torch.__version__},
            "backend": self._report.backend,
            "layers": len(self.layers),
            "how": "replays of one graph, events" if self._gpu else "the host's clock",
        }

    def measure(self, tokens: int) -> dict[str, Any]:
        """Median microseconds of one layer at T, the bytes that it has to read, its plan."""
        generator = torch.Generator("cpu").manual_seed(tokens)
        cfg, count = self.cfg, len(self.layers)
        x = torch.randn(tokens, cfg.hidden_size, generator=generator).to(
            self.device, cfg.torch_dtype
        )
        rows = [x, *(torch.empty_like(x) for _ in range(count))]
        topks = [_random_topk(cfg, tokens, generator, self.device) for _ in range(count)]

        def call(layer: int) -> None:
            self.layers[layer].forward(rows[layer], topks[layer], rows[layer + 1])

        for layer in range(count):
            call(layer)
        samples = self._on_gpu(call) if self._gpu else self._on_host(call)
        us = statistics.median(samples)
        expert = self._layer_bytes // cfg.num_experts
        distinct = sum(topk.ids.unique().numel() for topk in topks) / count
        read = distinct * expert + 2 * x.numel() * x.element_size()
        plan = self._report.for_tokens(tokens)
        return {
            "us": us,
            "min_us": min(samples),
            "bytes": int(read),
            "GB_per_s": read / us / 1e3,
            "plan": str(plan.choice),
            "source": plan.source,
        }

    def _on_gpu(self, call: Any) -> list[float]:
        probes = DeviceProbes(self.device)
        torch.cuda.synchronize(self.device)
        calls = [lambda _, layer=layer: call(layer) for layer in range(len(self.layers))]
        graph = probes.repeat(calls)
        try:
            return probes.time([graph], ROUNDS)[0]
        finally:
            graph.close()

    def _on_host(self, call: Any) -> list[float]:
        samples: list[float] = []
        end = time.perf_counter() + HOST_SECONDS
        while len(samples) < ROUNDS or time.perf_counter() < end:
            begin = time.perf_counter()
            for layer in range(len(self.layers)):
                call(layer)
            samples.append((time.perf_counter() - begin) * 1e6 / len(self.layers))
        return samples

    def close(self) -> None:
        for layer in self.layers:
            layer.close()

    def __enter__(self) -> LayerTimes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_CPU: Final = torch.device("cpu")


def _random_topk(
    cfg: MoEConfig, tokens: int, generator: torch.Generator, device: torch.device
) -> TopK:
    scores = torch.rand(tokens, cfg.num_experts, generator=generator).topk(cfg.top_k, dim=1)
    weights = torch.softmax(scores.values, dim=1)
    return TopK(weights.to(device), scores.indices.int().to(device))
