"""Adaptation while reading: each chunk of a sequence is scored, and then a step is taken on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.recompute import recompute
from metafocus.autodiff.safe_operators.swapping import Swapped, differentiable_once
from metafocus.calls import attempted
from metafocus.checks import check_finite, whole
from metafocus.engine import MetaLoss
from metafocus.episodes import as_episode
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator
from metafocus.factories import picklable
from metafocus.lm import Batch, TokenPolicy
from metafocus.lm.tokens import predicted
from metafocus.preflight import preflight
from metafocus.problem import Problem
from metafocus.torch_internals import transforming
from metafocus.types import Aux, Episode, Params, Solver, State


@dataclass(frozen=True)
class InChunk:
    """A token policy, restricted to the chunk that `chunks` marks."""

    tokens: TokenPolicy

    def __call__(self, batch: Batch) -> Tensor:
        """Return which tokens are scored, `[B, S]`."""
        return self.tokens(batch) & batch["chunk"]


def chunks(batch: Batch, size: int, window: int) -> Iterator[Batch]:
    """Cut a batch into chunks of tokens, each together with the `window` tokens before it.

    Args:
        batch: tensors `[B, S]`.
        size: the number of tokens in a chunk; the last chunk may be shorter.
        window: the number of earlier tokens that a chunk can see, at least 1.

    Returns:
        Batches with an additional mask `chunk`, which is True on the tokens of the chunk itself.
        Positions count from the first token of the window.

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
    """A solver whose step numbers continue those of earlier chunks."""

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


@picklable
def stream(
    problem: Problem, *, solver: Solver, estimator: Estimator, chunk: int, window: int
) -> MetaLoss:
    """Return the mean loss of a sequence that the fast weights adapt to while it is read.

    `loss = sum_k n_k outer_loss(fast_k, slow, chunk_k) / sum_k n_k`, where `fast_{k+1}` results
    from `solver.steps` inner steps on `chunk_k` from `fast_k`. So each chunk is scored before a
    step is taken on it. The derivative goes through all chunks, as the estimator defines it.

    Args:
        problem: its two losses are language-model losses over `InChunk` tokens.
        solver: an inner optimiser without a state, because a state would be lost between chunks.
            Step numbers continue over chunks, and so do rates of `per_step`.
        estimator: `Unrolled(recompute=True)` keeps the fast weights of each chunk, and only the
            graph of the layers below the first fast weight.
        chunk: the number of tokens in a chunk.
        window: the number of tokens before a chunk that it can see.

    Returns:
        `meta_loss(outer, episode) -> (loss, Aux)`, with explicit `outer`. The inner steps use the
        support, and the scores use the query; both are the same sequence.

    Raises:
        ProblemError: if a size is below 1; at the call, if the batch has several sequences or the
            solver has a state.
    """
    whole("chunk", chunk, 1, error=ProblemError)
    whole("window", window, 1, error=ProblemError)
    explicit = getattr(estimator, "explicit", False)
    checked = False

    def learn(solver: Solver, fast: Params, slow: Params, support: Batch) -> Any:
        nonlocal checked
        if not checked and not torch.compiler.is_compiling():
            twice = getattr(estimator, "twice", True)
            preflight(
                problem.inner_loss, solver, fast, slow, support, explicit=explicit, twice=twice
            )
            checked = True
        solution = estimator(differentiable_once(problem.inner_loss), solver, fast, slow, support)
        if not transforming():
            check_finite(solution.losses)
        return solution

    def score(fast: Params, slow: Params, query: Batch) -> Tensor:
        with Swapped(once=True):
            return problem.evaluate(fast, slow, query)[0]

    @attempted
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
        # The same object is prepared once.
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
