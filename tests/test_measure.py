"""Peak memory: the byte counts of computations whose live tensors can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import metafocus as mf
from metafocus.comparison.memory import peak_bytes

N = 1000
UNIT = N * 8
"""Bytes of one float64 tensor of N entries."""


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, dtype=torch.float64)


def chain(x: Tensor, length: int = 10) -> Tensor:
    for _ in range(length):
        x = torch.tanh(x)
    return x


def test_result_is_returned(x):
    result, peak = peak_bytes(lambda: chain(x))
    assert torch.equal(result, chain(x))
    assert isinstance(peak, int)


def test_chain_without_graph_keeps_two_tensors(x):
    assert peak_bytes(lambda: chain(x))[1] == 2 * UNIT


@pytest.mark.parametrize("length", [1, 4, 10])
def test_chain_with_graph_keeps_every_output(x, length):
    x.requires_grad_()
    assert peak_bytes(lambda: chain(x, length))[1] == length * UNIT


def test_chain_without_grad_mode_builds_no_graph(x):
    x.requires_grad_()
    with torch.no_grad():
        assert peak_bytes(lambda: chain(x))[1] == 2 * UNIT


def test_backward_adds_one_cotangent(x):
    x.requires_grad_()

    def run():
        return torch.autograd.grad(chain(x).sum(), x)

    # Ten outputs and one cotangent, beside the scalar sum and its own cotangent.
    assert peak_bytes(run)[1] == 11 * UNIT + 2 * 8


def test_tensors_saved_by_the_graph_alone_are_alive(x):
    x.requires_grad_()

    def run():
        y = chain(x, 5)
        total = y.sum()
        del y
        torch.ones_like(x)
        return total

    assert peak_bytes(run)[1] == 6 * UNIT + 8


def test_freed_tensors_lower_the_level(x):
    def one_after_another():
        for _ in range(5):
            y = x + 1
            del y

    def together():
        return [x + 1 for _ in range(5)]

    assert peak_bytes(one_after_another)[1] == UNIT
    assert peak_bytes(together)[1] == 5 * UNIT


def test_what_lives_at_the_end_does_not_hide_an_earlier_peak(x):
    def run():
        big = torch.cat([x] * 7)
        return big.sum()

    assert peak_bytes(run)[1] == 7 * UNIT + 8


def test_what_runs_on_the_cpu_is_counted_there_in_a_process_that_used_cuda(monkeypatch):
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    run = lambda: torch.ones(256, dtype=torch.float32) + 1  # noqa: E731
    assert peak_bytes(run, torch.device("cpu"))[1] == 2048


def test_tensors_that_existed_before_are_not_counted(x):
    assert peak_bytes(lambda: x)[1] == 0
    assert peak_bytes(lambda: x.add_(1))[1] == 0
    assert peak_bytes(lambda: x.view(10, 100).t()[1:])[1] == 0
    assert peak_bytes(lambda: x + 1)[1] == UNIT


def test_in_place_operators_and_views_count_once(x):
    def run():
        y = x.clone().add_(1).mul_(2)
        return y.view(10, 100).t()[0], y.detach(), y[5:]

    assert peak_bytes(run)[1] == UNIT


def test_dtype_counts(x):
    assert peak_bytes(lambda: x.to(torch.float32))[1] == N * 4
    assert peak_bytes(lambda: x > 0)[1] == N
    assert peak_bytes(lambda: torch.zeros(3, dtype=torch.int64))[1] == 24


def test_measuring_again_and_inside_gives_the_same(x):
    x.requires_grad_()
    first = [peak_bytes(lambda: chain(x))[1] for _ in range(3)]
    (_, inside), outside = peak_bytes(lambda: peak_bytes(lambda: chain(x)))
    assert {*first, inside, outside} == {10 * UNIT}


def test_an_error_inside_ends_the_measurement(x):
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    assert peak_bytes(lambda: x + 1)[1] == UNIT


def test_around_functorch_grad(x):
    def loss(x):
        return chain(x).sum()

    result, peak = peak_bytes(lambda: torch.func.grad(loss)(x))
    expected = torch.func.grad(loss)(x)
    assert torch.equal(result, expected)
    # torch.func.grad keeps the graph of the second derivative: outputs and cotangents.
    assert 11 * UNIT <= peak <= 22 * UNIT


def test_around_vmap(x):
    rows = x.view(10, 100)
    result, peak = peak_bytes(lambda: torch.func.vmap(torch.tanh)(rows))
    assert torch.equal(result, torch.tanh(rows))
    assert peak == UNIT


WIDTH = 2000


def wide_problem() -> mf.Problem:
    """Two fast weights and 2000 hidden numbers: the memory is all in the activations."""

    def loss(fast, slow, x):
        hidden = torch.tanh(torch.outer(fast["w"], x)).sum(0)
        return (torch.tanh(hidden * slow["s"]) - 0.5).square().mean()

    def init(slow, support):
        return {"w": torch.zeros(2, dtype=torch.float64)}

    return mf.Problem(loss, loss, init=init)


def peaks(estimator) -> list[float]:
    """Peak memory, in vectors of the width, at 4, 8 and 16 inner steps."""
    x = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    outer = {"s": torch.ones((), dtype=torch.float64)}
    found = []
    for steps in (4, 8, 16):
        meta = mf.bilevel(wide_problem(), solver=mf.SGD(0.1, steps=steps), estimator=estimator)
        run = mf.hypergrad(meta)
        run(outer, mf.Episode(x, x))
        found.append(peak_bytes(lambda run=run: run(outer, mf.Episode(x, x)))[1] / (8 * WIDTH))
    return found


def test_graph_unroll_grows_linearly_with_steps():
    four, eight, sixteen = peaks(mf.Unrolled())
    assert sixteen - eight == pytest.approx(2 * (eight - four), rel=1e-9)
    # Each step keeps at least the two hidden rows, their sum and the output.
    assert eight - four > 4 * 4


@pytest.mark.parametrize("estimator", [mf.Unrolled(recompute=True), mf.FirstOrder()], ids=str)
def test_recompute_and_first_order_are_flat_in_steps(estimator):
    four, _, sixteen = peaks(estimator)
    # Twelve more iterates of two numbers, their losses, and nothing of the width.
    assert 0 <= sixteen - four < 0.1


def test_recompute_in_segments_keeps_one_segment():
    one, four = (peaks(mf.Unrolled(recompute=k))[-1] for k in (1, 4))
    assert one < four < peaks(mf.Unrolled())[-1] / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_uses_the_allocator():
    x = torch.randn(2**20, device="cuda", dtype=torch.float64).requires_grad_()
    _, peak = peak_bytes(lambda: chain(x))
    assert peak == 10 * 2**23
    # What runs on the CPU meanwhile is counted there.
    assert peak_bytes(lambda: torch.ones(256) + 1, torch.device("cpu"))[1] == 2048
