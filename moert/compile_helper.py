"""The process behind `moert.compile_ahead`: compiles kernels into Triton's cache on disk.

`main` reads one pickle (target, jobs, workers) from standard
input, forks a process for each job, so many at a time, and writes a line of JSON for each that is done: its
index and what went wrong, "" if nothing did. A fork has everything imported already, and takes nothing along
but its own job when the compiler ends it. Nothing here touches a device.

Standard input stays open as long as the helper is wanted. At its end, which comes with the parent's too, the
helper ends, and its forks with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from moert.compile_job import CompileJob

LOOK_S: Final = 1.0  # between two looks for a parent whose end of the pipe others hold open
MAX_TEXT: Final = 2000  # bytes of an error: fit a pipe that nobody reads yet


def main(parent: int) -> None:
    """Serve the process of this id; ends this one."""
    # what anyone prints must not mix with the answers
    answers = os.dup(1)
    quiet(1)
    # for `_leave`, which ends the whole group
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # a parent that ignores the ends of its children passes that on
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    target, jobs, workers = pickle.load(sys.stdin.buffer)
    prepare(target, jobs)
    Helper(target, jobs, answers, parent).serve(workers)
    # half a second of taking apart what was imported is nobody's gain
    os._exit(0)


def quiet(descriptor: int) -> None:
    """Let a file descriptor lead nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)


def prepare(target: Any, jobs: Sequence[CompileJob]) -> None:
    """Import and compute what every job needs, once for all forks."""
    # only saves time: what is wrong here is wrong again in the fork, and told as that job's error
    with contextlib.suppress(Exception):
        import triton.compiler.code_generator
        from triton.runtime.cache import triton_key

        triton_key()
        triton.compiler.make_backend(target).hash()
    for module, name in dict.fromkeys((job.module, job.name) for job in jobs):
        with contextlib.suppress(Exception):
            _ = next(j for j in jobs if (j.module, j.name) == (module, name)).kernel().cache_key


class Helper:
    """Compiles jobs in forks of this process.

    Args:
        target: a `GPUTarget`.
        jobs: in the order in which they are begun.
        answers: file descriptor.
        parent: process id.
    """

    def __init__(self, target: Any, jobs: Sequence[CompileJob], answers: int, parent: int) -> None:
        self._target, self._answers, self._parent = target, answers, parent
        self._waiting = deque(enumerate(jobs))
        self._running: dict[int, tuple[int, int]] = {}  # (index, process id) by file descriptor
        self._selector = selectors.DefaultSelector()

    def serve(self, workers: int) -> None:
        """Compile all jobs, so many at a time."""
        self._selector.register(0, selectors.EVENT_READ)
        while self._waiting or self._running:
            while self._waiting and len(self._running) < workers:
                self._start(*self._waiting.popleft())
            ready = [key.fd for key, _ in self._selector.select(LOOK_S)]
            # nothing but its end comes from standard input now
            if 0 in ready or os.getppid() != self._parent:
                self._leave()
            for descriptor in ready:
                self._finish(descriptor)

    def _start(self, index: int, job: CompileJob) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            # never returns into the loop, whatever happens
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.close(self._answers)
                quiet(0)
                os.write(write, attempt(job, self._target).encode()[:MAX_TEXT])
            finally:
                os._exit(0)
        os.close(write)
        self._running[read] = index, pid
        self._selector.register(read, selectors.EVENT_READ)

    def _finish(self, descriptor: int) -> None:
        """Of a fork whose end of the pipe is closed, or about to be."""
        index, pid = self._running.pop(descriptor)
        self._selector.unregister(descriptor)
        with open(descriptor, "rb") as pipe:
            error = pipe.read().decode(errors="replace")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            error = f"the compiler ended its process: {status}"
        try:
            os.write(self._answers, f"{json.dumps([index, error])}\n".encode())
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        """End, and the forks and what they started before."""
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGTERM)
        for _, pid in self._running.values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        os._exit(0)


def attempt(job: CompileJob, target: Any) -> str:
    """Compile; what went wrong, or ""."""
    try:
        job.compile(target)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""
