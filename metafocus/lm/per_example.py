"""The loss and the solver for batches in which each example has fast weights of its own.

Row `b` of a batch sees slice `b` of every fast weight, so one forward pass adapts all examples. For
that to be the same as B runs with one example each, two things must not mix them: the inner loss is
the *sum* over examples of the mean over the example's own tokens, and the solver (its clipping
norms, its moments) sees one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metafocus.lm.cross_entropy import IGNORED
from metafocus.lm.hf.attention import read_spans
from metafocus.lm.hf.logit_head import logit_head_of
from metafocus.lm.loss import LMLoss
from metafocus.lm.prepared import current
from metafocus.lm.targets import Targets, next_tokens, targets_of
from metafocus.lm.tokens import TokenPolicy, predicted
from metafocus.masks import Batch
from metafocus.types import Params, Solver, State


@dataclass(frozen=True)
class PerExampleSolver:
    """A solver that treats each slice of the leading dimension as a problem of its own.

    `update(p, g)[b] = solver.update(p[b], g[b])`, by `vmap`: whatever the solver does with norms,
    moments or matrices stays within an example. Learned rates are shared by all of them.

    Example:
        >>> import metafocus as mf
        >>> solver = PerExampleSolver(mf.SGD(1.0, steps=1, clip=mf.clip_per_tensor(1.0)))
        >>> start, grads = {"w": torch.zeros(2, 1)}, {"w": torch.tensor([[8.0], [0.5]])}
        >>> solver.update(start, grads, solver.init(start), 0, {})[0]["w"].tolist()
        [[-1.0], [-0.5]]
    """

    solver: Solver

    @property
    def steps(self) -> int:
        """How many inner steps to take."""
        return self.solver.steps

    def init(self, params: Params) -> State:
        """Return the state of each example."""
        return torch.vmap(self.solver.init)(params) if params else self.solver.init(params)

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and the state of each example after one step."""

        def one(params: Params, grads: Params, state: State) -> tuple[Params, State]:
            return self.solver.update(params, grads, state, step, outer)

        return torch.vmap(one)(params, grads, state)


class Each(NamedTuple):
    """What the loss of each example needs to know."""

    policy: TokenPolicy
    """Which tokens are scored."""
    parts: list[Targets]
    """For each example with scored tokens (where that cannot be asked: for each)."""


@dataclass(frozen=True)
class PerExampleLoss(LMLoss):
    """Sum over the examples of a batch of the mean cross entropy of each example's own tokens.

    `loss = sum_b loss_b / n_b`, with the summed cross entropy and the number of scored tokens of
    row `b`. Its gradient by the fast weights of an example is that of the example alone. An
    example without scored tokens adds nothing.
    """

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with masks, positions and the scored rows of each example."""
        batch = current(self.mask, batch)
        each = batch.get("each")
        if each is not None and each.policy == self.tokens:
            return batch
        batch = self._with_inputs(batch)
        logit_head_of(self.model)
        read_spans(self.model, batch["model_inputs"]["attention_mask"])
        return {**batch, "each": self._each(batch)}

    def _rows(self, batch: Batch) -> Tensor | None:
        found = [part.rows for part in batch["each"].parts]
        return None if any(rows is None for rows in found) else torch.cat(found)  # pyright: ignore

    def _restriction(self, batch: Batch) -> None:
        return None

    def _mean(self, batch: Batch, total: Callable[[Targets], Tensor]) -> Tensor:
        return torch.stack([total(part) / part.number for part in batch["each"].parts]).sum()

    def _each(self, batch: Batch) -> Each:
        scored = targets_of(self.tokens, batch, self.sequence_group)
        # These are numbers of whole rows; what follows is this rank's share of the rows.
        numbers = (next_tokens(self.tokens, batch) != IGNORED).sum(1).clamp(min=1).unbind()
        rows, length = batch["model_inputs"]["input_ids"].shape
        if scored.rows is None:
            index = torch.arange(rows * length, device=scored.targets.device).split(length)
            targets = scored.targets.split(length)
        else:
            sizes = torch.bincount(scored.rows // length, minlength=rows).tolist()
            index, targets = scored.rows.split(sizes), scored.targets.split(sizes)
        parts = [Targets(self.tokens, *part) for part in zip(index, targets, numbers, strict=True)]
        # A batch without any scored token keeps one, for a loss of 0 that has a graph.
        return Each(self.tokens, [part for part in parts if len(part.targets)] or parts[:1])


def mean_loss(total: Tensor, tokens: TokenPolicy, batch: Batch) -> Tensor:
    """Return the mean over examples with scored tokens, from what `PerExampleLoss` returned."""
    return total / predicted(tokens, batch).any(1).sum().clamp(min=1)
