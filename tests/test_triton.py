"""Triton's attention: the choice of it, its numbers in the interpreter, and that it compiles."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metafocus import precision
from metafocus.attention import span_attention
from metafocus.attention.kernels import complete
from metafocus.attention.kernels.flash import Flash
from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.attention.kernels.tiled import Tiled
from metafocus.attention.kernels.triton.launch import Triton
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
QUICK = ("narrow", "random", "wide values", "bfloat16", "beyond")
SLOW = (
    *("causal", "prefix", "runs", "full", "window", "packed", "gradgradcheck"),
    *("no groups", "three heads for one"),
    *("option plain", "option scale", "option softcap", "option sinks", "option both"),
    *("float32", "float16", "vmap"),
)
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")


# --- the numbers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted():
    """Errors of the cases that are asked for, each computed once."""
    found = {}

    def of(name: str):
        if name not in found:
            names = QUICK if name in QUICK else SLOW
            script = Path(__file__).parent / "triton_cases.py"
            done = subprocess.run(
                [sys.executable, str(script), *names],
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
                env={**os.environ, "TRITON_INTERPRET": "1"},
            )
            assert done.returncode == 0, done.stderr
            found.update(json.loads(done.stdout))
        return found[name]

    return of


def check(name: str, found) -> None:
    if name == "gradgradcheck":
        assert found is True
    elif name == "beyond":
        assert "the span of query 2 in row 0 reaches beyond the 3 keys" in found
    elif name in TYPES:
        eps = torch.finfo(TYPES[name]).eps
        for ours, tiles in zip(found["Triton"], found["Tiled"], strict=True):
            # Tiles round results only. Triton rounds what enters the second product of bfloat16
            # too, and its interpreter cuts digits off instead of rounding to the nearest.
            assert ours < max(3 * tiles, eps) and ours < 4 * eps
    else:
        # Sums of some dozen products in another order, in float64.
        assert max(found) < 1e-13


@needs_triton
@pytest.mark.parametrize("name", QUICK)
def test_interpreted(name, interpreted):
    """Loss, first and second derivatives against the dense form in float64, in blocks of 16."""
    check(name, interpreted(name))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_interpreted_at_length(name, interpreted):
    check(name, interpreted(name))


@needs_triton
@pytest.mark.parametrize("dtype, size", [("bfloat16", 64), ("bfloat16", 128)])
def test_compiles_for_a_gpu(dtype, size):
    """For compute capability 9.0, by the compiler that triton brings along; no device is asked."""
    compiled(dtype, size)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, size", [("bfloat16", 256), ("float16", 64), ("float16", 128), ("float32", 64)]
)
def test_compiles_for_a_gpu_in_other_types(dtype, size):
    compiled(dtype, size)


def compiled(dtype: str, size: int) -> None:
    script = Path(__file__).parent / "triton_compiled.py"
    done = subprocess.run(
        [sys.executable, str(script), dtype, str(size)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 6
    for name, (shared, products) in found.items():
        # The shared memory of a multiprocessor of capability 9.0, per program.
        assert shared <= 232448, name
        assert products > 0, f"{name} has no product on tensor cores"


# --- the choice --------------------------------------------------------------------------------


def some() -> tuple[QKV, Spans, Scaling]:
    g = torch.Generator().manual_seed(0)
    inputs = QKV(*(torch.randn(1, h, 70, 8, generator=g) for h in (2, 1, 1)))
    stop = torch.arange(1, 71)[None]
    return inputs, Spans(torch.zeros_like(stop), stop), Scaling(0.4)


def test_an_explicit_call_is_served_or_says_why():
    inputs, spans, _ = some()
    why = "the tensors are on cpu, and Triton's kernels need cuda" if INSTALLED else "not installed"
    with pytest.raises(ProblemError, match=why):
        span_attention(*inputs, spans, backend="triton")


def test_what_completes_a_kernel(monkeypatch):
    inputs, _, scaling = some()
    assert isinstance(complete.complete(Flash(), inputs, scaling), Tiled)
    monkeypatch.setattr(complete, "unchecked", lambda *_: None)
    assert isinstance(complete.complete(Flash(), inputs, scaling), Triton)
    # A back end that was asked for by name completes itself.
    assert isinstance(complete.complete(Tiled(), inputs, scaling), Tiled)
    mine = Triton(side=32)
    assert complete.complete(mine, inputs, scaling) is mine


class NoCotangentOfSums(Tiled):
    """Forgets `dl`, in the gradient only."""

    def backward(self, do, inputs, found, spans, scaling, dl=None):
        return super().backward(do, inputs, found, spans, scaling)


class FirstOrderOnly(Tiled):
    """Has no second derivative, as a Function whose backward builds no graph."""

    def double_backward(self, *args):
        return tuple(torch.zeros_like(x) for x in super().double_backward(*args))


class NoSpans(Tiled):
    """Takes the last window for one key longer."""

    def forward(self, inputs, spans, scaling):
        stop = torch.where(spans.start > 0, (spans.stop + 1).clamp(max=150), spans.stop)
        return super().forward(inputs, Spans(spans.start, stop), scaling)


class NotANumber(Tiled):
    """One number is NaN."""

    def forward_mode(self, *args):
        out, mu = super().forward_mode(*args)
        out[0, 0, 0, 0] = torch.nan
        return Attended(out, mu)


class DoesNotCompile(Tiled):
    """Fails as a compiler does."""

    def double_backward(self, *args):
        raise RuntimeError("PassManager::run failed")


@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
@pytest.mark.parametrize(
    "kernel, says",
    [
        (Tiled(), None),
        (NoCotangentOfSums(), "it is wrong on a small example"),
        (FirstOrderOnly(), "it is wrong on a small example"),
        (NoSpans(), "it is wrong on a small example"),
        (NotANumber(), "it is wrong on a small example"),
        (DoesNotCompile(), "failed on a small example: RuntimeError: PassManager::run failed"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_check(kernel, says, dtype, monkeypatch, caplog):
    """What `fault` finds is said once, and tiles are used then."""
    monkeypatch.setattr(complete, "Triton", lambda: kernel)
    complete.fault.cache_clear()
    with caplog.at_level(logging.INFO, "metafocus.attention"):
        found = [complete.fault(CPU, dtype, (8, 4), capped, False) for capped in (False, True)]
    complete.fault.cache_clear()
    assert len(caplog.records) == 2
    for reason, record in zip(found, caplog.records, strict=True):
        if says is None:
            assert reason is None and "is used" in record.message
        else:
            assert reason is not None and says in reason
            assert record.levelno == logging.WARNING and "tiles are" in record.message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@needs_triton
@pytest.mark.parametrize("capped", (False, True))
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (80, 48)])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
def test_on_a_device(dtype, sizes, capped):
    device = torch.device("cuda", 0)
    if dtype == torch.float32 and max(sizes) > complete.FULL:
        pytest.skip("tiles serve large heads of float32")
    assert complete.fault(device, dtype, sizes, capped, False) is None


# --- products of tiles -------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Notes the precision in which products would be taken on a device, and takes them so."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            self.settings.add(torch.backends.cuda.matmul.fp32_precision)
            if precision.tf32_products():
                args = [rounded(x) for x in args]
        return func(*args, **(kwargs or {}))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the 11 digits of TF32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
def test_half_precision_in_tf32(dtype):
    """The setting is put back, and results are no farther from float64 than rounding makes them."""
    inputs, spans, scaling = some()
    # Logits of some dozens, where a rounded factor would move probabilities by percents.
    args = QKV(*(x.to(dtype) for x in (inputs.q * 8, inputs.k * 4, inputs.v)))
    draw = torch.Generator().manual_seed(1)
    tangents = QKV(*(torch.randn(x.shape, generator=draw).to(dtype) for x in args))
    do, dl = args.q.flip(-1), inputs.q[..., 0]
    before = torch.backends.cuda.matmul.fp32_precision
    with Products() as seen:
        got = complete.every_derivative(Tiled(), spans, scaling, args, tangents, do, dl)
    assert seen.settings == {before if dtype == torch.float32 else "tf32"}
    assert torch.backends.cuda.matmul.fp32_precision == before
    exact = complete.every_derivative(
        Tiled(),
        spans,
        scaling,
        QKV(*(x.double() for x in args)),
        QKV(*(x.double() for x in tangents)),
        do.double(),
        dl.double(),
    )
    for x, y in zip(got, exact, strict=True):
        # Float32 sums over logits of dozens, with their digits in the exponent.
        bound = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert (x.double() - y).norm() < bound * y.norm()


def test_the_setting_of_products_is_put_back():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    with precision.half_in_tf32(torch.bfloat16):
        with pytest.raises(ZeroDivisionError), precision.half_in_tf32(torch.float16):
            raise ZeroDivisionError
        # The block around the one that failed still has it.
        assert settings.fp32_precision == "tf32"
    assert settings.fp32_precision == before
    with precision.half_in_tf32(torch.float64):
        assert settings.fp32_precision == before
