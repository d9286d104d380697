"""Inner optimisers that are networks: one small rule, applied to every entry of every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus.checks import positive, whole
from metafocus.types import Params, State

FEATURES = 3
"""What a rule sees of an entry: log size and sign of its gradient, and its momentum."""


@dataclass(frozen=True)
class LearnedOptimiser:
    """A solver whose update is a network of the gradient, entry by entry, learned as `outer`.

    `update = -scale * out(hidden)`, with `hidden` an LSTM over the steps (`recurrent=True`,
    arXiv 1606.04474) or a hidden layer of the entry's features (arXiv 2009.11243's small MLP). The
    network's weights are `outer` under the names `optimiser.*`; `start` draws them. Train it with
    `mf.Unrolled(store=...)` over whole runs, or with `mf.algorithms.Windows` or `PES`.

    Args:
        steps: how many inner steps to take.
        recurrent: an LSTM with a state for each entry, or an MLP without one.
        hidden: width of the network.
        scale: size of an update of one.
        decay: decay of the momentum that is one of the features.

    Example:
        >>> rule = LearnedOptimiser(steps=3)
        >>> slow = rule.start(torch.Generator().manual_seed(0))
        >>> w = {"w": torch.ones(4, 2)}
        >>> moved, state = rule.update(w, {"w": torch.ones(4, 2)}, rule.init(w), 0, slow)
        >>> moved["w"].shape
        torch.Size([4, 2])
    """

    steps: int
    recurrent: bool = False
    hidden: int = 16
    scale: float = 0.01
    decay: float = 0.9

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("hidden", self.hidden, 1)
        positive("scale", self.scale)

    def start(self, generator: torch.Generator, dtype: torch.dtype | None = None) -> Params:
        """Return weights for the network: small, so that it starts near plain descent."""
        gates = 4 if self.recurrent else 1
        inputs = FEATURES + (self.hidden if self.recurrent else 0)
        shapes = {"in": (inputs, gates * self.hidden), "out": (self.hidden, 1)}
        drawn = {
            f"optimiser.{k}": torch.randn(shape, generator=generator).to(dtype)
            / math.sqrt(shape[0])
            for k, shape in shapes.items()
        }
        zeros = torch.zeros(gates * self.hidden, dtype=dtype)
        return {**drawn, "optimiser.bias": zeros, "optimiser.skip": torch.ones((), dtype=dtype)}

    def init(self, params: Params) -> State:
        """Return zero momenta and, for an LSTM, zero states for every entry."""
        state = {"momentum": {k: torch.zeros_like(v) for k, v in params.items()}}
        if self.recurrent:
            for part in ("memory", "hidden"):
                state[part] = {k: v.new_zeros(*v.shape, self.hidden) for k, v in params.items()}
        return state

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and the state after one step."""
        after: dict[str, Params] = {part: {} for part in state}
        moved = {}
        for k, g in grads.items():
            m = self.decay * state["momentum"][k] + (1 - self.decay) * g
            after["momentum"][k] = m
            features = torch.stack([_log(g), g / (g.abs() + 1e-8), m / (m.abs() + 1e-3)], -1)
            if self.recurrent:
                seen = torch.cat([features, state["hidden"][k]], -1)
                i, f, o, c = (seen @ outer["optimiser.in"] + outer["optimiser.bias"]).chunk(4, -1)
                memory = f.sigmoid() * state["memory"][k] + i.sigmoid() * c.tanh()
                hidden = o.sigmoid() * memory.tanh()
                after["memory"][k], after["hidden"][k] = memory, hidden
            else:
                hidden = (features @ outer["optimiser.in"] + outer["optimiser.bias"]).tanh()
            out = (hidden @ outer["optimiser.out"]).squeeze(-1)
            direction = 0.1 * out + outer["optimiser.skip"] * features[..., 2]
            moved[k] = params[k] - self.scale * direction
        return moved, after


def _log(g: Tensor) -> Tensor:
    # Of gradients between 1e-8 and 1, about -1 to 0; smooth at zero.
    return 0.05 * torch.log(g**2 + 1e-16)
