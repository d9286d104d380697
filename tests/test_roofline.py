"""The modelled step on a GPU: its arithmetic, and what a step may cost."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.focusft_step import data
from benchmarks.roofline import __main__ as roofline
from benchmarks.roofline import official, steps
from benchmarks.roofline.machine import H200, Machine
from benchmarks.roofline.record import KERNEL, SYNC, Op, Recorder
from benchmarks.roofline.scale import RECORDED, Scale
from metafocus.attention.kernels import flash_cuda
from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.attention.kernels.query_runs import find_query_runs
from metafocus.masks import context_bidirectional

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
SIMPLE = Machine(products=10.0, memory=100.0, gap=0, least=0, issue=1, view=0, latency=0, wait=2)


def test_a_device_works_while_the_host_issues_and_idles_where_it_waits():
    slow = Op(KERNEL, "mm", "bfloat16", flops=50)
    assert SIMPLE.seconds([slow, slow]) == 11  # issued at 1 and 2; 5 seconds each
    # The host comes back at 6 + 2 and issues at 9.
    assert SIMPLE.seconds([slow, Op(SYNC, "item"), slow]) == 14


def test_sizes_are_those_of_the_large_model_and_the_long_row():
    scale = Scale(4096)
    assert scale.shape(torch.zeros(1, 1024, 280)) == (1, 4096, 3584)
    # What is expanded is read once: 4096 numbers of 4 bytes.
    assert scale.bytes(torch.zeros(1024, 1).expand(1024, 1480)) == 16384


def test_products_and_bytes_of_an_operation():
    with Recorder(Scale(4096)) as recorder:
        torch.zeros(1024, 280) @ torch.zeros(280, 1480)
    (product,) = [op for op in recorder.ops if op.flops]
    assert product.flops == 2 * 4096 * 3584 * 18944
    assert product.bytes == 4 * (4096 * 3584 + 3584 * 18944 + 4096 * 18944)


def test_the_model_reproduces_what_was_measured():
    before = json.loads(roofline.CHANGES.read_text())[0]["rows"]
    assert len(before) == 8
    for row in before:
        assert row["seconds"] == pytest.approx(roofline.measured()[row["name"], row["length"]], 0.1)
    for length in roofline.LENGTHS:
        seconds = H200.seconds(official.read(length))
        assert seconds == pytest.approx(roofline.measured()[steps.OFFICIAL, length], 0.1)


# --- what a step may cost ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
    """One FocuSFT step of 4,096 tokens."""
    return steps.record(steps.OURS, 4096)


def test_spans_are_read_once_per_batch_and_the_host_waits_three_times(step):
    assert step.layouts == 1
    waits = [op.name for op in step.ops if op.kind == SYNC]
    assert len(waits) == 3, waits


def test_a_model_in_bfloat16_has_no_float32_tensor_of_intermediate_width(step):
    wide = [
        (op.name, shape)
        for op in step.ops
        for shape in op.shapes
        if op.kind == KERNEL and op.dtype == "float32" and shape[-1:] == (18944,)
        # Fast weights [32, 18944] and their gradients are float32.
        if len(shape) > 1 and shape[0] != 32
    ]
    assert wide == []


def test_the_head_takes_as_many_rows_at_once_as_the_model_is_wide(step):
    # Of 4,096 tokens 1,024 are scored: one chunk in each of two inner passes and the outer one.
    # The model itself sees its head at one position.
    logits = [op.shapes[0] for op in step.ops if op.name == "mm" and op.shapes[1][-1] == 152064]
    assert [shape for shape in logits if shape[0] > 1] == [(1024, 3584)] * 3


@pytest.mark.parametrize(("backward", "most"), [(False, 20), (True, 32)])
def test_attention_of_two_turns_has_few_kernels_beside_the_fused_ones(backward, most):
    # Two context turns and two answers: two fused calls, of which each gathers its tokens.
    recorder = Recorder(Scale(4096))
    kernels, scaling = steps._Varlen(recorder), Scaling(0.1)
    q, k = torch.zeros(1, 28, 1024, 10), torch.zeros(1, 4, 1024, 10)
    inputs, runs = QKV(q, k, k), find_query_runs(context_bidirectional(data(RECORDED)))
    found = flash_cuda.forward(inputs, runs, scaling, kernels)
    recorder.ops.clear()
    with recorder:
        if backward:
            flash_cuda.backward(q, inputs, found, runs, scaling, kernels)
        else:
            flash_cuda.forward(inputs, runs, scaling, kernels)
    launched = [op.name for op in recorder.ops if op.kind == KERNEL]
    fused = [name for name in launched if name.startswith("flash")]
    assert len(fused) == 2
    assert len(launched) - 2 <= most, launched


def test_the_step_is_as_fast_as_promised():
    rows = [row for entry in json.loads(roofline.CHANGES.read_text()) for row in entry["rows"]]
    now = {(row["name"], row["length"]): row["seconds"] for row in rows}
    assert now[steps.OURS, 4096] <= 0.235
    assert now[steps.OURS, 32768] <= 2.4


def test_what_is_recorded_now_is_what_is_committed(step):
    rows = [row for entry in json.loads(roofline.CHANGES.read_text()) for row in entry["rows"]]
    committed = [r for r in rows if (r["name"], r["length"]) == (steps.OURS, 4096)][-1]
    # Another version of torch or transformers may add a few operations.
    assert H200.seconds(step.ops) == pytest.approx(committed["seconds"], rel=0.05)
