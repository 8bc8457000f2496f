"""Jobs that do something else in place of compiling, for the tests of the processes that compile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moert.compile_ahead import HelperProcess
from moert.compile_job import CompileJob


class Deed(CompileJob):
    """Does what its name says; `module` is a folder where it leaves a file with its process id."""

    __slots__ = ()

    def compile(self, target: Any = None, kernel: Any = None) -> Any:
        assert target == "target"
        what = self.name.split("-")[0]
        left = Path(self.module) / self.name
        # whole at once, for who looks meanwhile
        fresh = left.with_name(f".{self.name}")
        fresh.write_text(f"{os.getpid()} {time.monotonic_ns()}")
        fresh.replace(left)
        print("nobody reads this")
        if what == "fail":
            raise ValueError("no such layout")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=False)


def deeds(folder: Path, *names: str) -> list[CompileJob]:
    return [Deed(str(folder), name, (), (), (), ()) for name in names]


def hang_forever(folder: str) -> None:
    """A parent that never stops its helper."""
    jobs = deeds(Path(folder), "hang-0", "hang-1")
    helper = HelperProcess(jobs, "target", workers=2)
    helper.wait(jobs)
