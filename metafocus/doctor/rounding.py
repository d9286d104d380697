"""How near attention and norms on this machine come to float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metafocus import masks
from metafocus.attention import span_attention
from metafocus.doctor.environment import HEADS, LENGTH, WIDTH, turns, types
from metafocus.doctor.findings import Finding

BOUND = 8
"""Units in the last place, relative to the norm, by which a result may be off. Measured are up to 3
for sums of 256 terms; float32 products in TensorFloat32 are off by thousands."""


def precision(device: torch.device) -> list[Finding]:
    """Return the relative errors of operators against the same ones in float64 on the CPU.

    The inputs are rounded to the type first, so that only the arithmetic is judged.
    """
    return [
        _judged(name, run, inputs, dtype, device)
        for name, (run, inputs) in _operators(device).items()
        for dtype in types(device)
    ]


def _operators(
    device: torch.device,
) -> dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]]:
    heads, rows = (1, HEADS, LENGTH, WIDTH), (LENGTH, 8 * WIDTH)

    def spans(backend: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            return span_attention(
                x, x.flip(-1), x.roll(1, -1), masks.causal(turns(x.device)), backend=backend
            )

        return run

    def sdpa(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x.flip(-1), x.roll(1, -1), is_causal=True)

    width = rows[-1:]
    return {
        "attention of torch (sdpa)": (sdpa, heads),
        "attention over spans (auto)": (spans("auto"), heads),
        "attention over spans (tiled)": (spans("tiled"), heads),
        "layer norm": (lambda x: F.layer_norm(x, width), rows),
        "RMS norm": (lambda x: F.rms_norm(x, width, eps=1e-6), rows),
        "softmax": (lambda x: x.softmax(-1), rows),
    }


def _judged(
    name: str,
    run: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Finding:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    along = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    exact = _both(run, x.double(), along.double())
    found = _both(run, x.to(device), along.to(device))
    errors = [_error(a, b) for a, b in zip(found, exact, strict=True)]
    kind = str(dtype).removeprefix("torch.")
    rounding = torch.finfo(dtype).eps
    return Finding(
        f"{name}, {kind}",
        f"value {errors[0]:.1e}, gradient {errors[1]:.1e}",
        max(errors) <= BOUND * rounding,
    )


def _both(run: Callable[[Tensor], Tensor], x: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = run(x)
        return y.detach(), torch.autograd.grad(y, x, along)[0]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).norm() / exact.norm())
