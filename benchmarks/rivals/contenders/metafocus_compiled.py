"""This library, compiled: in a process of its own, since compilation takes minutes."""

from __future__ import annotations

import metafocus as mf
from benchmarks.rivals.common import flat
from benchmarks.rivals.contenders import metafocus
from benchmarks.rivals.workloads import w1 as W1

PACKAGE = None
COMPILES = True


def w1(data, case):
    if not W1.SECOND.items() <= case.items():
        return {}
    gradient = mf.compiled(metafocus.maml_gradient(data, case, W1))
    start, episodes = metafocus.inputs(data)
    return {"metafocus compiled": lambda: flat(gradient(start, episodes)[0].values())}
