"""Nothing is kept from one outer step to the next, and recompute is flat in the inner steps."""

from __future__ import annotations

import gc
import warnings
import weakref

import psutil
import pytest
import torch
from problems import FAST, maml, regression
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATORS = {
    "FirstOrder": mf.FirstOrder(),
    "graph": mf.Unrolled(),
    "last": mf.Unrolled(last=2),
    "recompute": mf.Unrolled(recompute=True),
    "recompute=2": mf.Unrolled(recompute=2),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "Implicit": mf.Implicit(mf.CG(3)),
}
WAYS = ["backward", "func.grad", "over_tasks"]


def _step(meta, case, leaves, way):
    if way == "backward":
        meta(leaves, case.episode(0))[0].backward()
        for v in leaves.values():
            v.grad = None
    elif way == "func.grad":
        torch.func.grad(lambda o: meta(o, case.episode(0))[0])(case.outer)
    else:
        mf.over_tasks(meta)(leaves, case.episodes)[0].backward()
        for v in leaves.values():
            v.grad = None


def _live_tensors() -> int:
    with warnings.catch_warnings():
        # Looking at every object wakes deprecated attributes of other packages.
        warnings.simplefilter("ignore")
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["FirstOrder", "graph", "recompute", "Implicit"])
def test_two_hundred_outer_steps_leave_nothing_behind(name, way):
    case = maml()
    leaves = case.leaves()
    meta = mf.bilevel(case.problem, solver=mf.SGD(0.05, 3, 0.5), estimator=ESTIMATORS[name])
    count = 200 if way == "backward" else 30
    for _ in range(5):
        _step(meta, case, leaves, way)
    gc.collect()
    # Without the collector: a tensor in a reference cycle counts as a leak, it fills a GPU.
    gc.disable()
    try:
        tensors = _live_tensors()
        for _ in range(count // 10):
            _step(meta, case, leaves, way)
        assert _live_tensors() <= tensors
    finally:
        gc.enable()
    gc.collect()
    # With it: torch.func makes cycles of small Python objects.
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(count):
        _step(meta, case, leaves, way)
    grown = process.memory_info().rss - before
    # The allocator and the collector work in steps; a kept graph, about 100 kB an outer step,
    # would be 20 MB after 200.
    assert grown < 10 * 2**20, f"{grown / 2**20:.1f} MB"


class Live(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage()._cdata
            for x in pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key in self.known or key in inputs:
                    continue
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key, size)
        return out

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


WIDTH, ROWS = 32, 64


def _deep(fast, slow, x):
    h = x
    for _ in range(6):
        h = torch.tanh(h @ fast["w"]) + 0.1 * h.sin()
    return (h**2).mean()


def _peak(estimator, steps, way="backward"):
    problem = mf.Problem(_deep, _deep, lambda slow, support: dict(slow))
    meta = mf.bilevel(problem, solver=mf.SGD(0.01, steps), estimator=estimator)
    w = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    x = torch.randn(ROWS, WIDTH)
    with torch.no_grad():
        meta({"w": w}, (x, x))  # the first call, with its trial
    leaf = {"w": w.clone().requires_grad_()}
    with Live() as live:
        if way == "backward":
            meta(leaf, (x, x))[0].backward()
        elif way == "hypergrad":
            mf.hypergrad(meta)({"w": w}, (x, x))
        elif way == "backward(vmap)":
            mf.over_tasks(meta)(leaf, (x[None], x[None]))[0].backward()
        else:
            torch.func.grad(lambda o: meta(o, (x, x))[0])({"w": w})
    return live.peak


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("way", ["backward", "hypergrad", "backward(vmap)", "func.grad"])
@pytest.mark.parametrize("name", ["recompute", "forward", "FirstOrder", "Implicit"])
def test_the_peak_is_flat_in_the_inner_steps(name, way, request):
    if way == "func.grad" and name in ("recompute", "forward"):
        reason = "torch.func.grad records its own backward pass, for a derivative of it"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    few, many = (_peak(ESTIMATORS[name], steps, way) for steps in (2, 16))
    iterates = 14 * 8 * WIDTH * WIDTH
    # What may grow is one iterate (and one detached loss) for each step; first order and the
    # implicit one keep not even that. 10 % for what overlaps at the seams.
    allowed = iterates if name in ("recompute", "forward") else 0
    assert many <= 1.1 * few + 2 * allowed, (few, many)


def test_the_graph_is_not_flat_and_recompute_in_segments_is_between():
    graph = _peak(ESTIMATORS["graph"], 16)
    one = _peak(ESTIMATORS["recompute"], 16)
    four = _peak(mf.Unrolled(recompute=4), 16)
    # The meter measures something: the graph of 16 steps is an order of magnitude larger.
    assert graph > 4 * one
    assert one < four < graph


def test_adapt_is_flat_in_the_inner_steps():
    problem = mf.Problem(_deep, _deep, lambda slow, support: dict(slow))
    w, x = torch.randn(WIDTH, WIDTH) / WIDTH**0.5, torch.randn(ROWS, WIDTH)
    peaks = []
    for steps in (2, 32):
        with Live() as live:
            mf.adapt(problem, {"w": w.requires_grad_()}, x, solver=mf.SGD(0.01, steps))
        peaks.append(live.peak)
    # Only the scalar losses grow.
    assert peaks[1] <= peaks[0] + 32 * 8 * 4


def test_aux_keeps_no_graph_alive():
    case = maml()
    leaves = case.leaves()
    kept_by_the_graph = []

    def outer_loss(fast, slow, data):
        value = regression(fast, slow, data)
        kept_by_the_graph.append(value)
        return value.exp()  # saves its result

    problem = mf.Problem(case.problem.inner_loss, outer_loss, case.problem.init)
    meta = mf.bilevel(problem, solver=mf.SGD(0.05, 3), estimator=mf.Unrolled())
    kept = []
    for _ in range(3):
        loss, aux = meta(leaves, case.episode(0))
        kept.append(aux)
        between = weakref.ref(kept_by_the_graph.pop())
        del loss
        gc.collect()
        assert between() is None
    assert all(set(aux.params) == set(FAST) for aux in kept)
