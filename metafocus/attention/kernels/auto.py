"""The kernel of `backend="auto"`, and the table of all whose derivatives are completed."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from metafocus.attention.kernels.complete import unfused
from metafocus.attention.kernels.flash import Flash, prepare
from metafocus.attention.kernels.kernel import QKV, Attended, Kernel, Scaling
from metafocus.attention.kernels.tiled import Tiled
from metafocus.attention.kernels.triton.launch import Triton
from metafocus.calls import note
from metafocus.masks.spans import Spans

SMALL = 64
"""Up to this length "auto" is "dense", the faster one there by `benchmarks/attention.py`."""

log: logging.Logger = logging.getLogger("metafocus.attention")


class Auto:
    """The fused kernel where it can serve the spans, `unfused` where it cannot; a `Kernel`.

    Made anew for each call, so that the gradient need not look at the spans again.
    """

    def __init__(self) -> None:
        self.chosen: Kernel | None = None

    def forward(self, inputs: QKV, spans: Spans, scaling: Scaling) -> Attended:
        """Return the output and the logsumexp of each row; see `Kernel`."""
        self.chosen = self._choose(inputs, spans, scaling)
        return self.chosen.forward(inputs, spans, scaling)

    def backward(
        self, do: Tensor, inputs: QKV, found: Attended, spans: Spans, scaling: Scaling
    ) -> QKV:
        """Return the gradients; see `Kernel`."""
        kernel = self.chosen or self._choose(inputs, spans, scaling)
        return kernel.backward(do, inputs, found, spans, scaling)

    def _choose(self, inputs: QKV, spans: Spans, scaling: Scaling) -> Kernel:
        found = prepare(inputs, spans, scaling)
        served = isinstance(found, Flash)
        what = f"flash, {len(found.runs)} runs" if served else f"not fused, since {found}"
        log.debug("span_attention %s %s: %s", tuple(inputs.q.shape), inputs.q.dtype, what)
        note("attention", f"over spans: {what}")
        return found if served else unfused(inputs, scaling)


KERNELS: dict[str, Callable[[], Kernel]] = {
    "auto": Auto,
    "tiled": Tiled,
    "flash": Flash,
    "triton": Triton,
}
"""The back ends whose derivatives `function.Attention` completes."""
