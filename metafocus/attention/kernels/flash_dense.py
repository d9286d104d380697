"""cuDNN's attention on CUDA, and which kernels are the faster ones there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from metafocus.attention.kernels.kernel import QKV
from metafocus.torch_internals import cudnn, cudnn_backward

REPEATS = 3


class CuDNN:
    """cuDNN's attention of whole tensors, a `Dense`: about twice as fast as flash-attn 2 on Hopper.

    It was written from torch's declarations and has not run on a GPU yet: `flash.fault` compares
    it with tiles at its first use, and where it is wrong or fails, it is left out.
    """

    def forward(self, inputs: QKV, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return the output and the logsumexp of each row."""
        out, lse, *_ = cudnn(*inputs, None, True, 0.0, causal, False, scale=scale)
        return out, lse.reshape(out.shape[:-1])

    def backward(
        self, do: Tensor, inputs: QKV, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients."""
        # This is the state of random numbers; only dropout would read it.
        seed = torch.zeros((), dtype=torch.long, device=do.device)
        lengths = inputs.q.shape[2], inputs.k.shape[2]
        rest = seed, seed, None, None, None, *lengths, 0.0, causal
        stats = lse.contiguous().unsqueeze(-1)
        return cudnn_backward(do, *inputs, o.contiguous(), stats, *rest, scale=scale)


class Fastest:
    """Remembers which of several ways to the same result took the least time."""

    def __init__(self, clock: Callable[[Callable[[], object]], float]):
        self.clock = clock
        self.chosen: dict[Hashable, int] = {}

    def __call__(self, key: Hashable, ways: Sequence[Callable[[], object]]) -> int:
        """Return the index of the fastest way.

        Args:
            key: What the answer depends on. Each way is run a few times for a new key.
            ways: The ways.

        Example:
            >>> fastest = Fastest(lambda run: float(run()))
            >>> fastest("here", [lambda: 2.0, lambda: 1.0])
            1
        """
        if key not in self.chosen:
            times = [min(self.clock(way) for _ in range(REPEATS)) for way in ways]
            self.chosen[key] = times.index(min(times))
        return self.chosen[key]


def device_seconds(run: Callable[[], object]) -> float:
    """Return how long the current CUDA device works on what is run."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
