"""Kernels compiled before they are needed, in processes: at a start with an empty cache all at once, while
tuning those of the next buckets beside the timing of the ones before.

Triton's compiler holds Python's lock most of the time, so threads hardly help. The processes leave what they
compile in Triton's cache on disk, where this process finds it; what they cannot do it does by itself. So
nothing depends on them but the time it takes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Final, Protocol

from moert.compile_job import CompileJob
from moert.env import environment_with, local_processes

log = logging.getLogger("moert")

FEW_JOBS: Final = 12  # below, this process is done before a helper has imported what it needs: 2 s
FEW_CORES: Final = 4
SPARE_CORES: Final = 2  # for this process, which checks and times meanwhile
MAX_WORKERS: Final = 16
PATIENCE_S: Final = 120.0  # without any result: 8 times the longest compilation seen
STOP_S: Final = 2.0  # for the helper to end by itself
# modules are found where they are here; by PYTHONPATH, a user's enum.py would come before Python's own
RUN_HELPER: Final = """
import sys
parent, sys.path[:] = int(sys.argv[1]), sys.argv[2:]
from moert.compile_helper import main
main(parent)
"""
CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/cpu.max")

# parts of the names of kernels that take longest, the longest first
SLOW: Final = ("specialised_int4", "specialised", "registers", "stream")


class Ahead(Protocol):
    """Jobs that are being compiled elsewhere."""

    def wait(self, jobs: Collection[CompileJob]) -> None:
        """Until no more can be expected of these jobs, most often as they are compiled."""

    def close(self) -> None:
        """Stop what is still running; `wait` then returns at once."""


class NothingAhead:
    """Where nothing is compiled elsewhere."""

    def wait(self, jobs: Collection[CompileJob]) -> None:
        return

    def close(self) -> None:
        return


def in_order(
    buckets: Iterable[Iterable[CompileJob]], compiled: Collection[CompileJob]
) -> list[CompileJob]:
    """Every job once that is not compiled yet: by bucket, the slow ones of a bucket first."""

    def rank(job: CompileJob) -> int:
        return next((i for i, part in enumerate(SLOW) if part in job.name), len(SLOW))

    found = (job for bucket in buckets for job in sorted(bucket, key=rank))
    return [job for job in dict.fromkeys(found) if job not in compiled]


def usable_cores() -> int:
    """Cores that this process may use, by its affinity, the limit of its container, and the processes that
    torch's launcher has started beside it."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        # microseconds in each period, or "max"
        quota, period = CGROUP_LIMIT.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores // local_processes())


def worker_count(jobs: int, cores: int) -> int:
    """Processes that should compile so many jobs; 0 if this process had better do it."""
    if jobs < FEW_JOBS or cores < FEW_CORES:
        return 0
    return min(max(1, cores - SPARE_CORES), MAX_WORKERS)


def able() -> bool:
    """Whether another process can compile for this one."""
    import triton

    # compiling anew is asked of this process, and an interpreter compiles nothing
    changed = triton.knobs.runtime.interpret or triton.knobs.compilation.always_compile
    # a frozen application is no Python that could run a module
    python = sys.executable and not getattr(sys, "frozen", False)
    return bool(hasattr(os, "fork") and python and not changed)


def compile_ahead(jobs: Sequence[CompileJob]) -> Ahead:
    """Start to compile for the current device, in their order, the jobs that Triton's cache may lack."""
    cores = usable_cores()
    if not worker_count(len(jobs), cores):
        return NothingAhead()
    import triton

    try:
        if not able():
            return NothingAhead()
        target = triton.runtime.driver.active.get_current_target()
        missing = [job for job in jobs if not job.cached(target)]
        workers = worker_count(len(missing), cores)
        return HelperProcess(missing, target, workers) if workers else NothingAhead()
    except Exception as error:
        # whatever it is: this process can compile
        log.debug("no helper to compile ahead: %r", error)
        return NothingAhead()


def compile_together(jobs: Iterable[CompileJob]) -> None:
    """Compile for the current device what Triton's cache may lack, many at a time, and wait for it.

    What is little, or cannot be compiled elsewhere, is left to whoever needs it.
    """
    wanted = list(dict.fromkeys(jobs))
    ahead = compile_ahead(wanted)
    try:
        ahead.wait(wanted)
    finally:
        ahead.close()


class HelperProcess:
    """A process of `moert.compile_helper` at work.

    Args:
        jobs: in the order in which they are wanted.
        target: a `GPUTarget`, which need not be present.
        workers: kernels that are compiled at a time.
        patience_s: after so many seconds without any result nothing more is expected.

    Raises:
        OSError, RuntimeError: no process, or no thread, can be started.
        PicklingError, AttributeError, TypeError: a job holds what cannot be sent.
    """

    def __init__(
        self,
        jobs: Sequence[CompileJob],
        target: Any,
        workers: int,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._jobs, self._patience_s = list(jobs), patience_s
        self._left = set(jobs)
        self._changed = threading.Condition()
        self._start = self._heard = time.monotonic()
        self._sent = self._closed = False
        message = pickle.dumps((target, self._jobs, workers))
        self._process = start_helper()
        self._thread = threading.Thread(
            target=self._talk, args=(message,), name="moert-compile-ahead", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:
            self._kill()
            self._free()
            raise
        log.debug("compiling %d kernels ahead in %d processes", len(self._jobs), workers)

    def wait(self, jobs: Collection[CompileJob]) -> None:
        with self._changed:
            while not self._left.isdisjoint(jobs):
                patience = self._heard + self._patience_s - time.monotonic()
                if patience <= 0:
                    break
                self._changed.wait(patience)
            else:
                return
        log.debug("compiling ahead: no result for %.0f s, given up", self._patience_s)
        self.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._sent:
            # its sign to end; while it is not even reading there is nothing to be ended gently
            with contextlib.suppress(OSError):
                self._inbox.close()
        else:
            self._kill()
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            self._kill()
            self._thread.join(STOP_S)
        self._free()

    @property
    def _inbox(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _answers(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _talk(self, message: bytes) -> None:
        """Hand over the jobs and take the answers, until the helper ends."""
        # a helper that is gone is an error of this thread's write, whatever the process made of such signals
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        try:
            self._inbox.write(message)
            self._inbox.flush()
            self._sent = True
            for line in self._answers:
                index, error = json.loads(line)
                self._done(self._jobs[index], error)
        except Exception as error:
            log.debug("compiling ahead: %r", error)
        finally:
            # workers that a killed helper left
            self._kill()
            with self._changed:
                self._left.clear()
                self._changed.notify_all()

    def _done(self, job: CompileJob, error: str) -> None:
        if error:
            log.debug("compiling ahead: %s: %s", job.name, error)
        with self._changed:
            self._left.discard(job)
            self._heard = time.monotonic()
            if not self._left:
                log.debug("compiled ahead after %.1f s", self._heard - self._start)
            self._changed.notify_all()

    def _kill(self) -> None:
        # its process id is taken until `_free`, so this meets nobody else
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _free(self) -> None:
        # a process that another thread forked meanwhile can hold a pipe open; nobody closes it under a reader
        if not self._thread.is_alive():
            for pipe in (self._inbox, self._answers):
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()


def start_helper() -> subprocess.Popen[bytes]:
    """A new Python that runs the helper's module alone, not the user's.

    Raises:
        OSError: it cannot be started.
    """
    import triton

    environment = environment_with(
        TRITON_CACHE_DIR=str(triton.knobs.cache.dir),
        CUDA_VISIBLE_DEVICES="",
        HIP_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",  # no threads that a fork would lack
        OPENBLAS_NUM_THREADS="1",
    )
    found = [entry or os.getcwd() for entry in sys.path if isinstance(entry, str)]
    return subprocess.Popen(
        [sys.executable, "-c", RUN_HELPER, str(os.getpid()), *found],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # ended as one group, and not by the user's interrupt
    )
