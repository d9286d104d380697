"""What an attention kernel is: the two raw computations that every derivative builds on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from metafocus.masks.spans import Spans


class Scaling(NamedTuple):
    """How logits come from products: `z = scale q.k`, and `cap tanh(z / cap)` with a soft cap."""

    scale: float
    softcap: float | None = None


class Kernel(Protocol):
    """Attention and its gradient on plain tensors, outside of autograd and of every transform.

    `q` is `[B, H, S, D]`, `k` is `[B, Hkv, S, D]` and `v` is `[B, Hkv, S, Dv]`, where `H` is a
    multiple of `Hkv`.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        """Return the output `[B, H, S, Dv]` and the logsumexp of each row's logits `[B, H, S]`.

        The logsumexp is in float32, or float64 for float64 inputs. A row without keys has the
        output 0 and the logsumexp 0.
        """
        ...

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        spans: Spans,
        scaling: Scaling,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `<do, output>` with respect to `q`, `k` and `v`."""
        ...
