"""One rival in a process of its own: JSON lines on stdin and stdout, tensors by file.

python -m benchmarks.rivals.worker CONTENDER THREADS

Requests: load (workload, case, data, dtype), gradient (name, to), time (name, calls), peak (name).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rivals.common import Contenders, cast
from metafocus.comparison import memory


class Worker:
    """Answers requests about one contender file."""

    def __init__(self, module: str):
        self.module = importlib.import_module(f"benchmarks.rivals.contenders.{module}")
        self.runs: Contenders = {}

    def load(self, workload: str, case: dict[str, Any], data: str, dtype: str) -> dict[str, Any]:
        """Make the contenders of a case; return their labels."""
        self.runs = {}
        gc.collect()
        kind = getattr(torch, dtype)
        torch.set_default_dtype(kind)
        torch.manual_seed(0)
        tensors = cast(torch.load(data), kind)
        self.runs = getattr(self.module, workload)(tensors, case)
        return {"names": list(self.runs)}

    def gradient(self, name: str, to: str) -> dict[str, Any]:
        """Write the hypergradient to a file."""
        torch.manual_seed(0)
        torch.save(self.runs[name]().detach().clone(), to)
        return {}

    def time(self, name: str, calls: int) -> dict[str, Any]:
        """Return CPU and wall seconds of one call, the mean over `calls`."""
        run = self.runs[name]
        # Not inside: a collection that another contender's garbage has made due.
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"cpu": cpu / calls, "wall": wall / calls}

    def peak(self, name: str, counted: bool = True) -> dict[str, Any]:
        """Return the growth of the peak RSS over one call, the peak of live tensors, the FLOP.

        Asked of a fresh process whose allocator returns blocks at once. The call before it loads
        code; its memory has been given back.
        """
        run = self.runs[name]
        found = {"process_bytes": None, "tensor_bytes": None, "flop": None}
        try:
            if not counted:
                raise NotImplementedError
            with FlopCounterMode(display=False) as counter:
                run()
            found["flop"] = counter.get_total_flops()
            found["tensor_bytes"] = memory.peak_bytes(run)[1]  # The counter would keep tensors.
        except Exception:  # A dispatch mode does not go with everything that rivals do.
            run()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory.process_memory("VmRSS")
        run()
        found["process_bytes"] = memory.process_memory("VmHWM") - before
        return found


def main() -> None:
    """Answer requests until stdin ends."""
    # Rivals print; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(sys.argv[2]))
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker(sys.argv[1])
            answer = getattr(worker, request.pop("do"))(**request)
        except BaseException as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
