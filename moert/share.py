"""What the layers of one model share: arena, output buffers, compiled kernels, plans, order on the device."""

from __future__ import annotations

import contextlib
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from moert.arena import Arena
from moert.backends.base import Backend
from moert.block_rows import BlockRows
from moert.call import Call
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.errors import StateError
from moert.graph_nodes import GraphDriver
from moert.labels import Labels
from moert.plan import Plan
from moert.streams import StreamOrder
from moert.topk import TopK

NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Options:
    """The options of a runtime that everything sharing with it has too."""

    max_tokens: int
    buckets: tuple[int, ...]
    graphs: str
    sort_policy: int
    tune: str


class ShareGroup:
    """One per set of runtimes that share; freed with the last of them.

    Two alternating output buffers: a result stays valid until the call after next of the group.

    Args:
        described: the layer as the user described it; `cfg` is the same as its launches see it.
    """

    def __init__(
        self, described: MoEConfig, device: torch.device, facts: DeviceFacts, options: Options
    ) -> None:
        self.described, self.device, self.facts, self.options = described, device, facts, options
        self.cfg = cfg = described.as_launched
        self.lock = threading.RLock()
        self.kernel_cache: dict[Any, Any] = {}
        self.labels = Labels(cfg)
        self.plans: tuple[Plan, ...] = ()
        # those that are merely dropped count no more
        self.members: weakref.WeakSet[object] = weakref.WeakSet()
        self.graph_bytes = 0
        self.notes: list[str] = []
        self.joins_captures = device.type == "cuda" and options.graphs != "off"
        self.results = ResultBuffers(described, device, options.max_tokens)
        # calls inside somebody else's capture have results of their own: replaying that graph later must
        # not meet what the runtime itself returned
        self.captured_results = ResultBuffers(
            described, device, self.largest_bucket if self.joins_captures else 0
        )
        self.block: BlockRows | None = None
        self.captured_block: BlockRows | None = None
        self._scalars = torch.tensor([NO_LIMIT, 0], dtype=torch.int32, device=device)
        self._chunk_live = self._scalars[1]
        self.call = Call(self._scalars[0], 16 if cfg.hidden_size % 16 == 0 else 1)
        self.arena: Arena | None = None
        self.capture_arena: Arena | None = None
        self.order: StreamOrder | None = None
        self.driver: GraphDriver | None = None
        self.null_stream = 0
        self.closed = False
        self._destroy_stream: weakref.finalize[..., ShareGroup] | None = None
        if device.type == "cuda":
            self.order = StreamOrder(device)
            self.capture_stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def open_driver(self) -> None:
        """What graphs are updated and launched by, once for all layers.

        Raises:
            StateError: the driver lacks a function for it.
        """
        if self.driver is not None:
            return
        driver = GraphDriver(hip=self.facts.kind == "hip")
        if self.facts.kind == "cuda":
            self.null_stream = driver.create_blocking_stream()
            # a group that is merely dropped gives it back too; at exit the driver does by itself
            self._destroy_stream = weakref.finalize(
                self, _destroy_quietly, driver, self.null_stream
            )
            self._destroy_stream.atexit = False
        self.driver = driver

    def results_for(self, capturing: bool) -> ResultBuffers:
        """The buffers of results that the runtime returns, or of calls inside somebody's capture."""
        return self.captured_results if capturing else self.results

    def rows_left(self, num_valid: torch.Tensor, start: int) -> torch.Tensor:
        """The live count of the rows from `start` on, in the group's own scalar."""
        torch.clamp(num_valid.view(()), min=start, out=self._chunk_live)
        return self._chunk_live.sub_(start)

    def make_arenas(self) -> None:
        """Allocate the arena for the largest plan, and the one for captures by others."""
        self.arena = Arena(self.device, max(plan.scratch_bytes for plan in self.plans))
        if self.joins_captures:
            inside = [p.scratch_bytes for p in self.plans if p.tokens <= self.largest_bucket]
            self.capture_arena = Arena(self.device, max(inside))

    def make_block(self, backend: Backend) -> None:
        """Allocate what calls need that do not bring all slots; for captures by others apart, as arenas."""

        def made(rows: int) -> BlockRows:
            return BlockRows(self.device, rows, backend.block_fields(self.described, rows))

        if shared := self.described.shared_experts:
            self.notes.append(
                f"{shared} shared expert(s) are among E={self.cfg.num_experts}, K={self.cfg.top_k} of these "
                "kernels; ahead of them come router logits and routing in forward_block, and in forward one "
                "launch that marks the shared slots as nobody's"
            )
        self.block = made(self.options.max_tokens)
        if self.joins_captures:
            self.captured_block = made(self.largest_bucket)

    def block_for(self, capturing: bool) -> BlockRows:
        """The rows of a call, or of one inside somebody's capture."""
        found = self.captured_block if capturing else self.block
        assert found is not None
        return found

    @property
    def largest_bucket(self) -> int:
        return self.options.buckets[-1]

    def memory(self) -> dict[str, int]:
        """Bytes by purpose; graphs as the device's own free-memory figure told at capture."""
        return {
            "arena": self.arena.nbytes if self.arena else 0,
            "capture_arena": self.capture_arena.nbytes if self.capture_arena else 0,
            "results": self.results.nbytes + self.captured_results.nbytes,
            "graphs": self.graph_bytes,
            "block": sum(b.nbytes for b in (self.block, self.captured_block) if b is not None),
        }

    def join(self, executor: object) -> None:
        """A layer that shares is there as long as its executor is."""
        self.members.add(executor)

    def leave(self, executor: object) -> None:
        """The last member frees everything."""
        self.members.discard(executor)
        if self.members:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._destroy_stream is not None:
            self._destroy_stream()
        self.closed, self.null_stream = True, 0
        self.arena = self.capture_arena = None
        self.block = self.captured_block = None
        self.kernel_cache.clear()
        self.results = self.captured_results = ResultBuffers(self.described, self.device, 0)


def _destroy_quietly(driver: GraphDriver, stream: int) -> None:
    # nobody could do anything about a driver that is not there any more
    with contextlib.suppress(StateError):
        driver.destroy_stream(stream)


class ResultBuffers:
    """What `forward` without out= and `route` return: two buffers each, taken in turn.

    Args:
        rows: the most tokens of a call.
    """

    def __init__(self, cfg: MoEConfig, device: torch.device, rows: int) -> None:
        outputs = (2, rows, cfg.hidden_size)
        self._outputs = torch.empty(outputs, dtype=cfg.torch_dtype, device=device)
        self._weights = torch.empty(2, rows, cfg.top_k, dtype=torch.float32, device=device)
        self._ids = torch.empty(2, rows, cfg.top_k, dtype=torch.int32, device=device)
        self._output_views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._topk_views: dict[int, tuple[TopK, TopK]] = {}
        self._output_turn = self._topk_turn = 0

    @property
    def nbytes(self) -> int:
        tensors = (self._outputs, self._weights, self._ids)
        return sum(t.numel() * t.element_size() for t in tensors)

    def peek_output(self, tokens: int) -> torch.Tensor:
        """The next result, [tokens, H]; no storage is allocated."""
        views = self._output_views.get(tokens)
        if views is None:
            views = (self._outputs[0, :tokens], self._outputs[1, :tokens])
            self._output_views[tokens] = views
        return views[self._output_turn]

    def take_output(self) -> None:
        """The peeked result is the caller's now; the other buffer is next."""
        self._output_turn ^= 1

    def next_topk(self, tokens: int) -> TopK:
        """The next routing, [tokens, K] fp32 and int32."""
        self._topk_turn ^= 1
        views = self._topk_views.get(tokens)
        if views is None:
            first, second = (TopK(self._weights[i, :tokens], self._ids[i, :tokens]) for i in (0, 1))
            views = self._topk_views[tokens] = (first, second)
        return views[self._topk_turn]
