"""How runtimes end: closed, shared, copied, forked; and what they keep alive until then."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from runtime_cases import BACKENDS, CFG, check_call, make_case, make_runtime
from torch._subclasses.fake_tensor import FakeTensor

from moert.errors import StateError

both = pytest.mark.parametrize("backend", BACKENDS)


CLOSED = {
    "forward": lambda rt: make_case(CFG, 1).call(rt),
    "route": lambda rt: rt.route(torch.zeros(1, 5)),
    "plan": lambda rt: rt.plan(),
    "memory": lambda rt: rt.memory(),
    "update_weights": lambda rt: rt.update_weights(),
}


@both
@pytest.mark.parametrize("name", CLOSED)
def test_use_after_close(backend: str, name: str) -> None:
    with make_runtime(backend) as rt:
        check_call(rt, make_case(CFG, 1))
    for _ in range(2):
        with pytest.raises(
            StateError, match=f"{name}: the runtime is closed; make a new MoERuntime"
        ):
            CLOSED[name](rt)
        rt.close()
    assert rt.stats()["calls"] == 1
    assert "the runtime is closed" in repr(rt)


def test_a_call_that_waited_while_another_thread_closed() -> None:
    """It was let in before; what waits for the lock comes here."""
    rt = make_runtime("torch")
    case = make_case(CFG, 1)
    rt.close()
    with pytest.raises(StateError, match="forward: the runtime is closed"):
        rt._forward(case.x, case.topk, case.out, None, "keep")
    with pytest.raises(StateError, match="route: the runtime is closed"):
        rt._route(torch.zeros(1, 5), None)


def tensors_in(arena: Any) -> list[weakref.ref[torch.Tensor]]:
    found = (
        o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"
    )
    # what tracing left behind has a device and no memory
    real = (t for t in found if not t.is_sparse and not isinstance(t, FakeTensor))
    return [weakref.ref(t) for t in real if arena.contains(t)]


@both
def test_what_others_share_outlives_a_runtime(backend: str) -> None:
    first = make_runtime(backend)
    second = make_runtime(backend, seed=1, share=first)
    views = tensors_in(first._group.arena)
    assert len(views) > len(first.plan())
    first.close()
    check_call(second, make_case(CFG, 7))
    third = make_runtime(backend, seed=2, share=second)
    second.close()
    check_call(third, make_case(CFG, 2))
    views += tensors_in(third._group.arena)
    third.close()
    gc.collect()
    assert [ref() for ref in views if ref() is not None] == []  # though all three are still there


def test_no_tensor_of_a_call_is_kept_alive() -> None:
    rt = make_runtime("torch")
    case = make_case(CFG, 3)
    num_valid = torch.tensor(2, dtype=torch.int32)
    case.call(rt, num_valid=num_valid)
    alive = [weakref.ref(t) for t in (case.x, *case.topk, case.out, num_valid)]
    del case, num_valid
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_copies_are_refused(way: Any) -> None:
    rt = make_runtime("torch")
    with pytest.raises(StateError, match="cannot be pickled or copied; make a new one"):
        way(rt)
    check_call(rt, make_case(CFG, 1))


FORK = """
import os, sys
sys.path.insert(0, "tests")
from runtime_cases import *
rt = make_runtime("torch")
closed = make_runtime("torch")
closed.close()
case = make_case(CFG, 2)
case.call(rt)
pid = os.fork()
if pid:
    os.waitpid(pid, 0)
for runtime in (rt, closed):
    for use in (lambda: case.call(runtime), lambda: runtime.route(torch.zeros(1, 5)), runtime.plan):
        try:
            use()
            print("child" if pid == 0 else "parent", "ok")
        except Exception as error:
            print("child" if pid == 0 else "parent", type(error).__name__, error)
if pid == 0:
    rt.close()
    new = make_runtime("torch")
    check_call(new, case)
    print("child new ok", flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_use_after_fork() -> None:
    root = os.path.dirname(os.path.dirname(__file__))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    run = subprocess.run(
        [sys.executable, "-c", FORK], cwd=root, env=env, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    child = [line for line in lines if line.startswith("child")]
    assert sum("the process was forked after it was made" in line for line in child) == 3
    assert sum("StateError" in line for line in child) == 6
    assert "child new ok" in child
    parent = [line for line in lines if line.startswith("parent")]
    assert parent[:3] == ["parent ok"] * 3
    assert all("the runtime is closed" in line for line in parent[3:])
