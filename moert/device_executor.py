"""Runs checked calls of one layer on a GPU: replays graphs, launches eagerly, or joins somebody's capture."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

import torch
import triton

from moert.backends.base import Backend, Program
from moert.call import Key
from moert.capture import StartUpRows, capture_plans
from moert.checks import check_forward, plainly_fine
from moert.compile_ahead import compile_together
from moert.errors import StateError
from moert.graphs import CapturedPlan
from moert.host_executor import layer_block, layer_router
from moert.labels import profiling
from moert.plan import Plan
from moert.share import ShareGroup
from moert.topk import TopK


class DeviceExecutor:
    """Programs and graphs of one layer, for every plan of its share group.

    Args:
        group: with plans and arenas made.
        backend: bound to this layer's weights.
    """

    def __init__(self, group: ShareGroup, backend: Backend) -> None:
        self.group, self.backend = group, backend
        self.counts = {"replays": 0, "eager": 0, "captured": 0, "rebinds": 0}
        assert group.arena is not None and group.order is not None
        self._order, self._call = group.order, group.call
        self._index = group.device.index
        driver = triton.runtime.driver.active
        self._current_stream = driver.get_current_stream
        self._limits = [plan.tokens for plan in group.plans]
        if not group.members:
            self._compile_kernels()
        self._programs = [self._program(plan, group.arena) for plan in group.plans]
        self._unaligned = self._program(group.plans[-1], group.arena, aligned=False)
        self._foreign: list[Program] = []
        self._foreign_unaligned: Program | None = None
        if group.capture_arena is not None:
            inside = [p for p in group.plans if p.tokens <= group.largest_bucket]
            self._foreign = [self._program(plan, group.capture_arena) for plan in inside]
            self._foreign_unaligned = self._program(inside[-1], group.capture_arena, aligned=False)
        self._router = layer_router(group, backend)
        self._block = layer_block(group, backend, group.block)
        self._foreign_block = layer_block(group, backend, group.captured_block)
        self._graphs: list[CapturedPlan | None] = [None] * len(group.plans)
        self._slot_of = [0] + [
            bisect_left(self._limits, t) for t in range(1, group.options.max_tokens + 1)
        ]
        if not group.members:
            group.notes.append(
                f"tensors that are not 16-byte aligned take the plan of {self._limits[-1]} tokens, kernel by "
                "kernel with narrower loads: other bits than aligned ones"
            )
        self._warm_up()
        if any(plan.captured for plan in group.plans):
            self._capture()
        self._null_stream = group.null_stream

    def _compile_kernels(self) -> None:
        """What the plans need, side by side: programs that are made one by one then find it compiled."""
        plans, jobs_of = self.group.plans, self.backend.compile_jobs
        jobs = [job for plan in plans for job in jobs_of(plan.tokens, plan.choice)]
        jobs += jobs_of(plans[-1].tokens, plans[-1].choice, aligned=False)
        compile_together(job for job in jobs if job not in self.group.kernel_cache)

    def _program(self, plan: Plan, arena: Any, aligned: bool = True) -> Program:
        views = arena.views(plan.fields)
        return self.backend.program(
            plan.tokens,
            plan.choice,
            views,
            aligned=aligned,
            kernel_cache=self.group.kernel_cache,
        )

    def run(
        self,
        key: Key,
        x: torch.Tensor,
        topk: TopK,
        out: torch.Tensor,
        num_valid: torch.Tensor | None,
        capturing: bool,
    ) -> None:
        """Enqueue one call of up to max_tokens rows on the current stream; the group's lock is held.

        Args:
            key: the call's `call_key`; a replay of the key a graph holds is neither checked nor bound.
            capturing: what `capturing()` said.
        """
        slot = self._slot_of[key[4][0]] if len(key[4]) == 2 else 0
        graph = self._graphs[slot]
        raw = self._current_stream(self._index)
        if graph is None or graph.key != key or capturing:
            if not plainly_fine(self.group.cfg, self._index, key, (x, out, *topk)):
                check_forward(self.group.cfg, self.group.device, x, topk, out, num_valid, key[17])
            if not key[4][0]:
                return
            self._call.set(key, x, topk, out, num_valid)
            try:
                if capturing:
                    self._join_capture(raw, slot)
                    return
                if graph is None or not self._call.aligned or not graph.takes(key):
                    self._run_eager(raw, self._programs[slot])
                    return
            finally:
                self._call.release()  # whatever is enqueued has addresses: no tensor is kept alive
            graph.update()
            graph.key = key
            self.counts["rebinds"] += 1
        if raw != self._order.last_raw:
            self._order.switch(raw)
        if profiling():
            with self.group.labels.replay(graph.bucket):
                graph.launch(raw or self._null_stream)
        else:
            graph.launch(raw or self._null_stream)
        if self._order.record_each:
            self._order.record()
        self.counts["replays"] += 1

    def fill_slots(
        self,
        key: Key,
        x: torch.Tensor,
        topk: TopK,
        out: torch.Tensor,
        num_valid: torch.Tensor | None,
        routed: bool,
        capturing: bool,
    ) -> None:
        """Enqueue what fills the slots that a `run` right after it reads; the group's lock is held.

        Args:
            key: the `call_key` of these tensors, which have been checked, of 1..max_tokens rows.
            topk: the caller's routing of K slots, if `routed`, else anything.
            routed: the slots are taken from `topk`; else they are routed here.
        """
        raw = self._current_stream(self._index)
        if not capturing and raw != self._order.last_raw:
            self._order.switch(raw)
        steps = self._foreign_block if capturing else self._block
        assert steps is not None
        self._call.set(key, x, topk, out, num_valid)
        try:
            (steps.take if routed else steps.route)(self._call, raw, self.group.labels)
        finally:
            self._call.release()

    def rows_left(self, num_valid: torch.Tensor, start: int) -> torch.Tensor:
        """The live count of the rows from `start` on, after what other streams still read of the last one."""
        raw = self._current_stream(self._index)
        if raw != self._order.last_raw:
            self._order.switch(raw)
        return self.group.rows_left(num_valid, start)

    @property
    def routing_bytes(self) -> int:
        """Scratch of the routing step."""
        return 0 if self._router is None else self._router.nbytes

    def capturing(self) -> bool:
        """Whether the current stream is being captured, by somebody else.

        Raises:
            StateError: it is, and this runtime keeps no arena for that.
        """
        if not torch.cuda.is_current_stream_capturing():
            return False
        if not self._foreign:
            raise StateError(
                "the current stream is capturing and graphs='off' keeps no arena for that; use "
                "graphs='own' or graphs='host'"
            )
        return True

    def route(
        self, logits: torch.Tensor, out: TopK, num_valid: torch.Tensor | None, capturing: bool
    ) -> None:
        """Enqueue the routing of 1..max_tokens rows on the current stream; the group's lock is held."""
        assert self._router is not None
        raw = self._current_stream(self._index)
        if not capturing and raw != self._order.last_raw:
            self._order.switch(raw)
        if profiling():
            with self.group.labels.step("route", logits.shape[0]):
                self._router.run(logits, out, num_valid, raw)
        else:
            self._router.run(logits, out, num_valid, raw)
        if not capturing and self._order.record_each:
            self._order.record()

    def _run_eager(self, raw: int, program: Program) -> None:
        if raw != self._order.last_raw:
            self._order.switch(raw)
        program = program if self._call.aligned else self._unaligned
        program.launch(self._call, raw, self.group.labels)
        if self._order.record_each:
            self._order.record()
        self.counts["eager"] += 1

    def _join_capture(self, raw: int, slot: int) -> None:
        """Launch into the capture under way on the current stream: no sync, no events, second arena."""
        program = self._foreign[slot]
        if not self._call.aligned:
            assert self._foreign_unaligned is not None
            program = self._foreign_unaligned
        program.launch(self._call, raw, self.group.labels)
        self.counts["captured"] += 1

    def _warm_up(self) -> None:
        """Load and run every kernel once on the capture stream: later launches allocate nothing."""
        group, stream = self.group, self.group.capture_stream
        if group.members:
            torch.cuda.synchronize(group.device)  # their calls use the arena, on whichever streams
        # the weights may still be on their way, and who used the arena's memory before may not be done
        stream.wait_stream(torch.cuda.current_stream(group.device))
        with torch.cuda.stream(stream):
            rows = StartUpRows(group, self._limits[-1])
            programs = [
                *zip(self._programs, self._limits, strict=True),
                *zip(self._foreign, self._limits, strict=False),
                (self._unaligned, 1),
                (self._foreign_unaligned, 1),
            ]
            for program, limit in programs:
                if program is not None:
                    rows.set(limit)
                    program.launch(self._call, stream.cuda_stream, group.labels)
        self._call.release()
        stream.synchronize()

    def _capture(self) -> None:
        """The graphs; where there can be none, the plans say so."""
        group = self.group
        try:
            self._graphs = capture_plans(group, self._programs)
            self._tell_limit()
        except StateError as error:
            if group.members:
                group.notes.append(f"a layer has no graphs, its kernels go one by one: {error}")
                return
            group.plans = tuple(replace(plan, captured=False) for plan in group.plans)
            group.notes.append(
                f"no graphs on this device, kernels are launched one by one: {error}"
            )

    def _tell_limit(self) -> None:
        left = [
            g.updates_left for g in self._graphs if g is not None and g.updates_left is not None
        ]
        if left and not self.group.members:
            self.group.notes.append(
                f"a graph takes over addresses that come twice in a row, at most {min(left)} to {max(left)} "
                "times (each takes memory that HIP frees with the graph); calls with others are launched "
                "kernel by kernel"
            )

    def close(self) -> None:
        for graph in self._graphs:
            if graph is not None:
                graph.close()
        self._graphs, self._programs, self._foreign = [], [], []
        # every program keeps its arena alive
        del self._unaligned, self._foreign_unaligned, self._router, self.backend
        del self._block, self._foreign_block
