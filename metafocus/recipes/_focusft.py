"""FocuSFT (arXiv 2605.09932): fine-tuning with fast weights that adapt to the context."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metafocus import masks
from metafocus.adapters import LoRA, for_each, top_layers
from metafocus.calls import attempted, draws_from, holding, refuse_nested, using
from metafocus.engine import MetaLoss, bilevel
from metafocus.episodes import as_episode
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator, FirstOrder
from metafocus.factories import picklable
from metafocus.lm import Adapter, TokenPolicy, answer_tokens, lm_loss
from metafocus.lm.hf.inner_memory import Fitting
from metafocus.lm.per_example import PerExampleLoss, PerExampleSolver, mean_loss
from metafocus.lm.shared_prefix import SharedPrefix
from metafocus.masks import Batch, MaskPolicy
from metafocus.parallel.collectives import Group
from metafocus.parallel.sequence import refuse_other_starts
from metafocus.problem import Problem, trainable
from metafocus.recipes._sharded import hooked, refuse_outer, refuse_sharded
from metafocus.solvers import SGD, clip_per_tensor
from metafocus.types import Aux, Episode, Params, Solver

PAPER_ADAPTER = LoRA(top_layers(0.35, ("gate_proj", "up_proj", "down_proj")), rank=32, alpha=64.0)
PAPER_SOLVER = SGD(1.0, steps=2, clip=clip_per_tensor(1.0))


def focusft_problem(
    model: nn.Module,
    *,
    adapter: Adapter = PAPER_ADAPTER,
    mask: MaskPolicy = masks.context_bidirectional,
    inner_tokens: TokenPolicy = answer_tokens,
    outer_tokens: TokenPolicy = answer_tokens,
    generator: torch.Generator | None = None,
    examples: int | None = None,
    sequence_group: Group = None,
    inner_checkpointing: bool | str = True,
) -> Problem:
    """Return FocuSFT's bilevel problem; see `focusft`.

    Args:
        model: a Hugging Face causal language model, as for `focusft`; so are the arguments
            that are not described here.
        adapter: defines the fast weights.
        mask: the mask policy of both losses.
        inner_tokens: the tokens that the inner loss scores.
        outer_tokens: the tokens that the outer loss scores.
        generator: draws the start.
        examples: the number of rows in a batch, if each has fast weights of its own (to be solved
            by a `PerExampleSolver`). None: the batch shares its fast weights.
        sequence_group: the ranks that share each sequence.
        inner_checkpointing: whether the inner loss checkpoints as the model does.
    """
    choice = _choice(inner_checkpointing)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    common: Any = {"adapter": adapter, "mask": mask, "sequence_group": sequence_group}
    inner = lm_loss(model, tokens=inner_tokens, **common)
    outer = lm_loss(model, tokens=outer_tokens, **common)
    if examples is not None:
        inner = PerExampleLoss(model, tokens=inner_tokens, **common)
    inner = replace(inner, checkpointing=choice)
    shared = SharedPrefix(inner)

    start = _Start(model, adapter, generator, examples, sequence_group)
    return Problem(inner, outer, start, _Prepare(inner, outer, shared))


@dataclass(frozen=True)
class _Prepare:
    """Runs the layers below the first fast weight once, for both losses."""

    inner: Any
    outer: Any
    shared: SharedPrefix

    def __call__(self, slow: Params, episode: Episode) -> Episode:
        support = self.shared(slow, self.inner.prepare(episode.support))
        if episode.query is episode.support:
            # Both losses share the masks, but they may score different tokens.
            return Episode(support, self.outer.prepare(support))
        return Episode(support, self.outer.prepare(episode.query))


@dataclass(frozen=True)
class _Start:
    """Draws the fast weights."""

    model: nn.Module
    adapter: Adapter
    generator: torch.Generator
    examples: int | None
    sequence_group: Group

    def __call__(self, slow: Params, support: Any) -> Params:
        # Fast weights that start as copies of slow weights must be copied from `slow`.
        draws_from(self.generator)
        with using(self.model), holding(self.model, slow, tie_weights=True):
            fast = self.adapter.init(self.model, self.generator)
        refuse_other_starts(fast, self.sequence_group)
        return fast if self.examples is None else for_each(fast, self.examples)


@picklable
def focusft(
    model: nn.Module,
    *,
    adapter: Adapter = PAPER_ADAPTER,
    mask: MaskPolicy = masks.context_bidirectional,
    solver: Solver = PAPER_SOLVER,
    estimator: Estimator | None = None,
    inner_tokens: TokenPolicy = answer_tokens,
    generator: torch.Generator | None = None,
    per_example: bool = False,
    sequence_group: Group = None,
    inner_checkpointing: bool | str = "auto",
) -> MetaLoss:
    """Return FocuSFT's training loss; the defaults are the paper's.

    Before each outer step, newly drawn LoRA fast weights take a few steps of SGD on the batch's
    inner tokens. The outer loss is the cross entropy of the answers, computed with these fast
    weights. The fast weights are then dropped, so the trained model is a plain one.

    Args:
        model: a Hugging Face causal language model (see `lm_loss`). Its parameters that
            require grad are trained.
        adapter: default `LoRA` of rank 32 and alpha 64 on the MLPs of the top 35 % of layers.
            `mf.NoAdapter()` makes this plain fine-tuning.
        mask: the mask policy of both losses. Default: bidirectional inside each context turn,
            causal over answers.
        solver: the inner optimiser. Default: two steps of SGD with learning rate 1, where the
            gradient of each tensor is clipped to norm 1.
        estimator: default `FirstOrder()`. For the exact hypergradient, pass
            `mf.Unrolled(recompute=True)`. Of a model that `fully_shard` has sharded, the weights
            are read where its hooks gather them, which `FirstOrder()` allows; for the others,
            `metafocus.trainer.distributed.parametrise(model, mesh)`.
        inner_tokens: the tokens that the inner loss scores. Default: the answers, as in the
            official code.
        generator: draws a new start of the fast weights at every call. Default: a generator
            seeded with 0. The global random state does not change.
        per_example: gives each row of a batch fast weights of its own, which start equal and
            adapt to the tokens of this row, exactly as if it were alone. `Aux.inner_losses` are
            then means over the rows. Default: one set for the batch, as in the official code.
        sequence_group: the ranks that share each sequence (`mf.parallel.sequence_group`). Each is
            given the same batch, and computes the loss and the derivatives of all of it. Their
            generators must have the same seed. Default: this rank runs all tokens.
        inner_checkpointing: whether the inner loop checkpoints its activations, if
            `gradient_checkpointing_enable()` was called. "auto": with `FirstOrder()` only if they
            do not fit into half of the free memory (in a distributed run, always), which saves a
            forward pass of the adapted layers in each inner step; with other estimators, always.

    Returns:
        `meta_loss(outer, Episode(batch, batch)) -> (loss, Aux)`. With `outer={}` the model's own
        parameters are trained, and `loss.backward()` fills their `.grad`.

    Raises:
        ProblemError: as for `lm_loss`; for an estimator that cannot work with the hooks of a
            sharded model; at the call, if no parameter requires grad.
        PlacementError: at the first call, if the adapter's placement matches nothing.

    Example:
        >>> import metafocus as mf
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> model = Qwen2ForCausalLM(Qwen2Config(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16))
        >>> batch = {
        ...     "input_ids": torch.tensor([[1, 2, 3, 4]]),
        ...     "attention_mask": torch.tensor([[1, 1, 1, 1]]),
        ...     "answer_mask": torch.tensor([[False, False, True, True]]),
        ...     "turn_ids": torch.tensor([[0, 0, 1, 1]])}
        >>> meta = mf.recipes.focusft(model)
        >>> loss, aux = meta({}, mf.Episode(batch, batch))
        >>> loss.backward()
        >>> aux.inner_losses.shape
        torch.Size([2])

    References:
        FocuSFT, arXiv 2605.09932.
    """
    if not isinstance(model, nn.Module):
        raise ProblemError(
            "model must be a Hugging Face causal language model, such as "
            f'mf.models.load("smollm2")[0], got {model!r:.80}.'
        )
    chosen = estimator or FirstOrder()
    refuse_sharded(model, chosen)
    # What wraps an estimator, as the trainer does, holds it.
    first_order = isinstance(getattr(chosen, "estimator", chosen), FirstOrder)
    if inner_checkpointing == "auto" and not first_order:
        inner_checkpointing = True
    generator = torch.Generator().manual_seed(0) if generator is None else generator

    @functools.cache
    def of(examples: int | None) -> MetaLoss:
        problem = focusft_problem(
            model,
            adapter=adapter,
            mask=mask,
            inner_tokens=inner_tokens,
            generator=generator,
            examples=examples,
            sequence_group=sequence_group,
            inner_checkpointing=inner_checkpointing,
        )
        inner = solver if examples is None else PerExampleSolver(solver)
        return bilevel(problem, solver=inner, estimator=chosen)

    @attempted
    def meta_loss(outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        with using(model):
            refuse_nested(model)
            return evaluate(outer, episode)

    def evaluate(outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        support = as_episode(episode).support
        trained = trainable(model)
        if hooked(model):
            # The model may have been sharded since.
            refuse_sharded(model, chosen)
            refuse_outer(outer)
        else:
            # Every estimator accepts explicit parameters, and with them a first-order inner loop
            # builds no graph below its fast weights.
            outer = outer or trained
        if not (outer or trained) and torch.is_grad_enabled():
            raise ProblemError(
                "no parameter of the model requires grad, so nothing would be trained: call "
                "model.requires_grad_(True), or evaluate under torch.no_grad()."
            )
        if not per_example:
            return of(None)(outer, episode)
        loss, aux = of(len(support["input_ids"]))(outer, episode)
        return loss, Aux(aux.params, mean_loss(aux.inner_losses, inner_tokens, support))

    return meta_loss


def _choice(inner_checkpointing: bool | str) -> Callable[[nn.Module, Batch], bool] | None:
    if inner_checkpointing is True:
        return None
    if inner_checkpointing is False:
        return _never
    if inner_checkpointing != "auto":
        raise ProblemError(
            f"inner_checkpointing={inner_checkpointing!r} must be 'auto', True or False."
        )
    return Fitting()


def _never(model: nn.Module, batch: Batch) -> bool:
    return False
