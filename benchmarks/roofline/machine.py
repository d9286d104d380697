"""The time that recorded operations take: a device that works and a host that feeds it.

The host issues operations one after another; the device works through them in order, each not
before it is issued. Where the host waits for the device, the queue runs empty, and the device then
waits for what the host issues next: that is what a synchronisation costs, and it is large where
many small kernels follow.

The constants describe an H200 with torch 2.11. They were fitted to the eight measured rows of
`benchmarks/results/focusft_gpu.json`, so that these agree is no proof; what they say of other
steps is a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.roofline.record import SYNC, VIEW, Op


@dataclass(frozen=True)
class Machine:
    """Rates in operations or bytes per second, times in seconds.

    Attributes:
        products: Of bfloat16 matrix products, 68 % of the peak of 989e12.
        float32: Of float32 matrix products without TF32.
        masked: Of torch's attention with a mask.
        causal: Of torch's causal attention without a mask (cuDNN).
        varlen: Of torch's variable-length attention.
        memory: Bytes read and written, 80 % of the peak.
        gap: Between the end of a kernel and the start of the next.
        least: The shortest kernel.
        issue: What the host needs for an operation.
        view: What the host needs for an operation without a kernel.
        latency: From the host's call to the start of a kernel on an idle device.
        wait: What the host needs to come back from waiting.
        layout: What the host needs to find the runs of spans that it has read, and to send the
            layouts of their calls back.
    """

    products: float = 672e12
    float32: float = 25e12
    masked: float = 300e12
    causal: float = 543e12
    varlen: float = 302e12
    memory: float = 3.84e12
    gap: float = 2.5e-6
    least: float = 2e-6
    issue: float = 10e-6
    view: float = 3e-6
    latency: float = 5e-6
    wait: float = 20e-6
    layout: float = 1.5e-3

    def kernel(self, op: Op) -> float:
        """Return how long the device works on an operation."""
        rate = self.products if op.dtype != "float32" else self.float32
        for name, attention in (
            ("sdpa_mask", self.masked),
            ("sdpa_causal", self.causal),
            ("flash", self.varlen),
            ("cudnn", self.causal),
        ):
            if op.name.startswith(name):
                rate = attention
        return max(op.flops / rate, op.bytes / self.memory, self.least)

    def seconds(self, ops: Iterable[Op]) -> float:
        """Return the time from the first operation's issue to the end of the last."""
        host = device = 0.0
        for op in ops:
            if op.kind == VIEW:
                host += self.view
            elif op.kind == SYNC:
                host = max(host, device)
                host += self.layout if op.name.startswith("copy") else self.wait
            else:
                host += self.issue
                device = max(device, host + self.latency) + self.kernel(op) + self.gap
        return max(host, device)


H200 = Machine()
WITHOUT_WAITING: Machine = replace(H200, issue=0.0, view=0.0, latency=0.0, wait=0.0, layout=0.0)
"""The same device, fed by a host that costs nothing: what is left for the kernels to save."""
