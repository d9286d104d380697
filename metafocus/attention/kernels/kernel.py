"""What an attention kernel is: the raw computations that every derivative builds on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from metafocus.masks.spans import Spans


class Scaling(NamedTuple):
    """How logits come from products: `z = scale q.k`, and `cap tanh(z / cap)` with a soft cap."""

    scale: float
    softcap: float | None = None


class QKV(NamedTuple):
    """Queries `[B, H, S, D]`, keys `[B, Hkv, S, D]` and values `[B, Hkv, S, Dv]`, or the like.

    `H` is a multiple of `Hkv`. Gradients and tangents of them have the same form.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class Attended(NamedTuple):
    """The output `[B, H, S, Dv]` and the logsumexp of each row's logits `[B, H, S]`.

    The logsumexp is in float32, or float64 for float64 inputs. Both are 0 in rows without keys.
    """

    o: Tensor
    lse: Tensor


class Kernel(Protocol):
    """Attention and its gradient on plain tensors, outside of autograd and of every transform."""

    def forward(self, inputs: QKV, spans: Spans, scaling: Scaling) -> Attended:
        """Return the output and the logsumexp of each row."""
        ...

    def backward(
        self, do: Tensor, inputs: QKV, found: Attended, spans: Spans, scaling: Scaling
    ) -> QKV:
        """Return the gradients of `<do, output>`, given what `forward` found."""
        ...


class TwiceKernel(Kernel, Protocol):
    """A kernel with forward mode and second derivatives, which completes those without."""

    def backward(
        self,
        do: Tensor,
        inputs: QKV,
        found: Attended,
        spans: Spans,
        scaling: Scaling,
        dl: Tensor | None = None,
    ) -> QKV:
        """Return the gradients of `<do, output> + <dl, lse>`."""
        ...

    def forward_mode(
        self, inputs: QKV, lse: Tensor, tangents: QKV, spans: Spans, scaling: Scaling
    ) -> Attended:
        """Return the tangents of the output and of the logsumexp for tangents of the inputs."""
        ...

    def double_backward(
        self,
        do: Tensor,
        dl: Tensor | None,
        inputs: QKV,
        found: Attended,
        tangents: QKV,
        spans: Spans,
        scaling: Scaling,
    ) -> tuple[Tensor, ...]:
        """Return the gradients of `<(dq, dk, dv), tangents>` with respect to `do, dl, q, k, v`.

        The last three are also the derivative of `(dq, dk, dv)` along the tangents, since second
        derivatives are symmetric.
        """
        ...
