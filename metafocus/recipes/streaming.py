"""Adaptation while reading: a sequence in chunks, each scored and then learned from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.recompute import recompute
from metafocus.autodiff.safe_operators.swapping import Swapped
from metafocus.checks import check_finite
from metafocus.engine import MetaLoss
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator
from metafocus.lm import Batch, TokenPolicy
from metafocus.lm.tokens import predicted
from metafocus.preflight import preflight
from metafocus.problem import Problem, as_episode
from metafocus.torch_internals import transforming
from metafocus.types import Aux, Episode, Params, Solver, State


@dataclass(frozen=True)
class InChunk:
    """A token policy within the chunk that `chunks` marks."""

    tokens: TokenPolicy

    def __call__(self, batch: Batch) -> Tensor:
        """Return which tokens are scored, `[B, S]`."""
        return self.tokens(batch) & batch["chunk"]


def chunks(batch: Batch, size: int, window: int) -> Iterator[Batch]:
    """Cut a batch into chunks of tokens, each behind the `window` tokens before it.

    Args:
        batch: tensors `[B, S]`.
        size: tokens in a chunk; the last one may be shorter.
        window: how many earlier tokens a chunk can see, at least 1.

    Returns:
        Batches with a further mask, `chunk`, that is True on the chunk's own tokens. Positions
        count from the first token of the window.

    Example:
        >>> batch = {"input_ids": torch.arange(5)[None]}
        >>> for part in chunks(batch, size=2, window=1):
        ...     print(part["input_ids"].tolist(), part["chunk"].long().tolist())
        [[0, 1]] [[1, 1]]
        [[1, 2, 3]] [[0, 1, 1]]
        [[3, 4]] [[0, 1]]
    """
    for start in range(0, batch["input_ids"].shape[-1], size):
        first = max(start - window, 0)
        part = {k: v[..., first : start + size] for k, v in batch.items()}
        index = torch.arange(part["input_ids"].shape[-1], device=part["input_ids"].device)
        yield {**part, "chunk": (index >= start - first).expand_as(part["input_ids"])}


@dataclass(frozen=True)
class _From:
    """A solver whose steps are counted on from those of earlier chunks."""

    solver: Solver
    first: int

    @property
    def steps(self) -> int:
        return self.solver.steps

    def init(self, params: Params) -> State:
        return self.solver.init(params)

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        return self.solver.update(params, grads, state, self.first + step, outer)


def stream(
    problem: Problem, *, solver: Solver, estimator: Estimator, chunk: int, window: int
) -> MetaLoss:
    """Return the mean loss of a sequence that is adapted to while it is read.

    `loss = sum_k n_k outer_loss(fast_k, slow, chunk_k) / sum_k n_k`, and `fast_{k+1}` is what
    `solver.steps` inner steps on `chunk_k` make of `fast_k`: every chunk is scored before it is
    learned from. The derivative goes through all chunks, in the way of the estimator.

    Args:
        problem: of two language-model losses over `InChunk` tokens.
        solver: without a state, which would be lost between chunks. Its steps are counted
            through, so that `per_step` rates go on.
        estimator: `Unrolled(recompute=True)` keeps the fast weights of each chunk, and no graph
            but that of the layers below the first fast weight.
        chunk: tokens in a chunk.
        window: how many tokens before it a chunk can see.

    Returns:
        `meta_loss(outer, episode) -> (loss, Aux)`, with `outer` explicit. The support is learned
        from, the query scored; both are the same sequence.

    Raises:
        ProblemError: for sizes below 1; at the call for a batch of several sequences, and for a
            solver with a state.
    """
    if chunk < 1 or window < 1:
        raise ProblemError(f"chunk={chunk} and window={window} must be at least 1.")
    explicit = getattr(estimator, "explicit", False)
    checked = False

    def learn(solver: Solver, fast: Params, slow: Params, support: Batch) -> Any:
        nonlocal checked
        if not checked and not torch.compiler.is_compiling():
            preflight(problem.inner_loss, solver, fast, slow, support, explicit=explicit)
            checked = True
        solution = estimator(problem.inner_loss, solver, fast, slow, support)
        if not transforming():
            check_finite(solution.losses)
        return solution

    def score(fast: Params, slow: Params, query: Batch) -> Tensor:
        with Swapped(once=True):
            return problem.evaluate(fast, slow, query)[0]

    def meta_loss(outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        whole = as_episode(episode)
        fast = problem.start(outer, whole.support)
        _check(solver, fast, whole.support)
        total, count, inner = [], [], []
        for k, part in enumerate(_parts(whole, chunk, window)):
            support, query = problem.prepared(outer, part)
            number = predicted(problem.outer_loss.tokens, query).sum()  # pyright: ignore
            args = (fast, outer, query)
            loss = recompute(score, *args) if explicit else score(*args)
            total.append(number * loss)
            count.append(number)
            solution = learn(_From(solver, k * solver.steps), fast, outer, support)
            fast = solution.params
            inner.append(solution.losses)
        loss = torch.stack(total).sum() / torch.stack(count).sum().clamp(min=1)
        return loss, Aux(pt.detach(fast), torch.cat(inner).detach())

    return meta_loss


def _parts(episode: Episode, size: int, window: int) -> Iterator[Episode]:
    support = chunks(episode.support, size, window)
    if episode.query is episode.support:
        # The same object, which is then prepared once.
        yield from (Episode(part, part) for part in support)
        return
    for pair in zip(support, chunks(episode.query, size, window), strict=True):
        yield Episode(*pair)


def _check(solver: Solver, fast: Params, batch: Batch) -> None:
    if len(batch["input_ids"]) != 1:
        raise ProblemError(
            f"a batch of {len(batch['input_ids'])} sequences: each must have fast weights of its "
            "own. Give one at a time, or stack episodes of one and use mf.over_tasks."
        )
    if pt.tensors(solver.init(fast)):
        raise ProblemError(
            f"{solver} has a state, which would be lost between chunks. Use SGD without momentum."
        )
