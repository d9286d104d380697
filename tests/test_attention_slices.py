"""Which kernels serve turns on a GPU, as far as that can be asked without one."""

from __future__ import annotations

import pytest
import torch

from metafocus import masks
from metafocus.attention.kernels import flash, flash_cpu
from metafocus.attention.kernels.flash_dense import REPEATS, Fastest
from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.attention.kernels.query_runs import find_query_runs
from metafocus.attention.kernels.tiled import Tiled


def test_the_fastest_way_is_measured_once_for_a_key():
    ran = []

    def clock(run):
        return float(run())

    def way(name, seconds):
        return lambda: ran.append(name) or seconds

    fastest = Fastest(clock)
    assert fastest("short", [way("a", 1.0), way("b", 2.0)]) == 0
    assert ran == ["a"] * REPEATS + ["b"] * REPEATS
    assert fastest("short", [way("a", 3.0), way("b", 2.0)]) == 0
    assert fastest("long", [way("a", 3.0), way("b", 2.0)]) == 1
    assert len(ran) == 4 * REPEATS


class OfCuDNN(flash_cpu.OnCPU):
    """The CPU's kernel, called as cuDNN's are: with rows that must be dense."""

    def backward(self, do, inputs, o, lse, causal, scale):
        assert o.shape == do.shape and lse.shape == do.shape[:-1]
        return super().backward(do, inputs, o, lse, causal, scale)


def turns(length):
    token = torch.arange(length)[None]
    batch = {
        "input_ids": torch.zeros(1, length),
        "turn_ids": token // (length // 4),
        "answer_mask": token // (length // 4) % 2 == 1,
    }
    return masks.context_bidirectional(batch)


def test_slices_through_another_kernel_are_exact():
    """The output and the gradients of grouped heads, merged from up to two slices a turn."""
    draw = torch.Generator().manual_seed(0)
    do, q, k, v = (
        torch.randn(1, heads, 64, 8, generator=draw, dtype=torch.float64) for heads in (4, 4, 2, 2)
    )
    spans, scaling, inputs = turns(64), Scaling(8**-0.5), QKV(q, k, v)
    expected = Tiled().forward(inputs, spans, scaling)
    runs = find_query_runs(spans)
    found = flash_cpu.forward(inputs, runs, scaling.scale, OfCuDNN())
    grads = flash_cpu.backward(do, inputs, found, runs, scaling.scale, OfCuDNN())
    exact = Tiled().backward(do, inputs, expected, spans, scaling)
    for got, want in zip((*found, *grads), (*expected, *exact), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("length", "faulty", "seconds", "sliced"),
    [
        (8192, None, (2.0, 1.0), True),
        (8192, None, (1.0, 2.0), False),
        # Where cuDNN is wrong or missing, and where turns are short, nothing is measured.
        (8192, "wrong on a small example", (2.0, 1.0), False),
        (4096, None, (2.0, 1.0), False),
    ],
)
def test_slices_are_chosen_by_measurement(monkeypatch, length, faulty, seconds, sliced):
    times = iter([seconds[0]] * REPEATS + [seconds[1]] * REPEATS)
    monkeypatch.setattr(flash, "_FASTEST", Fastest(lambda run: next(times)))
    monkeypatch.setattr(flash, "fault", lambda *args: faulty)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    q = torch.zeros(1, 1, length, 8)
    runs = find_query_runs(turns(length))
    # Four turns: two of one slice, two of two.
    assert sum(len(group.pieces) for group in flash_cpu.groups(runs)) == 6
    assert flash.by_slices(QKV(q, q, q), runs, Scaling(1.0)) is sliced


def test_slices_have_no_soft_cap():
    q = torch.zeros(1, 1, 8192, 8)
    assert not flash.by_slices(QKV(q, q, q), find_query_runs(turns(8192)), Scaling(1.0, 30.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [64, 128])
def test_cudnn_on_a_gpu(size):
    assert flash.fault(torch.device("cuda"), torch.bfloat16, size, True) is None
