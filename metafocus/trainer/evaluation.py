"""The held-out loss of a model as it is deployed, or adapted on each prompt: never on labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafocus import masks
from metafocus.adapters import NoAdapter
from metafocus.estimators import Estimator
from metafocus.lm import Adapter, Batch, all_tokens, answer_tokens, lm_loss
from metafocus.lm.tokens import predicted
from metafocus.masks import MaskPolicy, positions
from metafocus.parallel.collectives import Group
from metafocus.problem import trainable
from metafocus.sharding import HOOKED, local_parts, sharding_of
from metafocus.trainer.batch import prompts, rows
from metafocus.trainer.config import FocusOptions
from metafocus.types import Params, Solver


class Way(NamedTuple):
    """How a held-out loss is measured: the mask, and whether fast weights adapt to each prompt."""

    mask: MaskPolicy
    adapt: bool


def configured(focus: FocusOptions) -> Way:
    """Return the way of `eval_loss`: by the settings `eval_mask` and `evaluate_on`.

    Example:
        >>> from metafocus.trainer import FocusOptions
        >>> configured(FocusOptions()) == Way(masks.causal, adapt=False)
        True
    """
    return Way(focus.evaluation_mask(), focus.evaluate_on == "prompt" and focus.method != "sft")


def ways(focus: FocusOptions) -> dict[str, Way]:
    """Return the ways that a run reports by name; of equal ones, the first.

    A saved checkpoint runs causally and without fast weights, whatever it was trained with: that
    is "deployed". Under the training mask the loss may fall where the deployed one does not.

    Example:
        >>> from metafocus.trainer import FocusOptions
        >>> list(ways(FocusOptions())), list(ways(FocusOptions(method="sft")))
        (['deployed', 'training mask'], ['deployed'])
    """
    named = {
        "deployed": Way(masks.causal, adapt=False),
        "training mask": Way(focus.policy(), adapt=False),
        "as evaluated": configured(focus),
    }
    found: dict[str, Way] = {}
    for name, way in named.items():
        if way not in found.values():
            found[name] = way
    return found


class AnswerLoss(NamedTuple):
    """The summed answer loss of a batch, how many tokens it sums, and the logits if asked for."""

    total: Tensor
    tokens: Tensor
    logits: Tensor | None


def score(
    model: nn.Module,
    batch: Batch,
    *,
    mask: MaskPolicy,
    adapter: Adapter | None = None,
    fast: Params | None = None,
    logits: bool = False,
    sequence_group: Group = None,
) -> AnswerLoss:
    """Return the answer loss of a batch, without fast weights or with given ones.

    Args:
        model: a Hugging Face causal language model.
        batch: with `answer_mask`.
        mask: which keys a query sees.
        adapter: what `fast` belongs to; None: no fast weights.
        fast: the fast weights.
        logits: return the logits too, which takes a forward pass of its own.
        sequence_group: the ranks that share each sequence of the loss; each returns all of it.
    """
    adapter, fast = adapter or NoAdapter(), fast or {}
    count = predicted(answer_tokens, batch).sum()
    with torch.no_grad():
        loss = lm_loss(model, adapter=adapter, mask=mask, sequence_group=sequence_group)
        total = loss(fast, {}, batch) * count
        if not logits:
            return AnswerLoss(total, count, None)
        if "document_ids" in batch:
            # transformers' own mask would let packed documents see each other.
            causal = lm_loss(model, adapter=adapter, mask=masks.causal)
            return AnswerLoss(total, count, causal.logits(fast, causal.prepare(batch)))
        with adapter.bind(model, fast):
            # As generation runs the model: causal, with transformers' own mask.
            out = model(
                input_ids=batch["input_ids"],
                attention_mask=batch.get("attention_mask"),
                position_ids=positions(batch),
                use_cache=False,
            )
    return AnswerLoss(total, count, out.logits)


def score_adapted(
    model: nn.Module,
    batch: Batch,
    *,
    mask: MaskPolicy,
    adapter: Adapter,
    solver: Solver,
    estimator: Estimator,
    seed: int,
    logits: bool = False,
    sequence_group: Group = None,
) -> AnswerLoss:
    """Return the answer loss after adapting to each prompt: test-time training on context tokens.

    Each row gets fast weights of its own, from the same start, adapted on the next-token loss of
    what comes before its first answer. Answers are cut off before, so that no label can leak
    through any mask.

    Args:
        model: a Hugging Face causal language model.
        batch: with `answer_mask`; not packed.
        mask: in both losses; a bidirectional one shows the inner loss the tokens it predicts.
        adapter: the fast weights.
        solver: the inner optimiser.
        estimator: runs the inner loop; its derivatives are not used.
        seed: of the fast weights' start.
        logits: return the logits too.
        sequence_group: the ranks that share each sequence, in both losses.

    Raises:
        DataError: for packed rows.
    """
    shared: Any = {"adapter": adapter, "mask": mask, "sequence_group": sequence_group}
    inner = lm_loss(model, tokens=all_tokens, **shared)
    # Where hooks gather the weights, they are read and not passed.
    slow = {} if sharding_of(model) & HOOKED else local_parts(trainable(model))
    found = []
    for row in rows(batch):
        generator = torch.Generator().manual_seed(seed)
        start = adapter.init(model, generator)
        support = inner.prepare(prompts(row))
        with torch.no_grad():
            fast = estimator(inner, solver, start, slow, support).params
        found.append(score(model, row, fast=fast, logits=logits, **shared))
    return AnswerLoss(
        torch.stack([x.total for x in found]).sum(),
        torch.stack([x.tokens for x in found]).sum(),
        torch.cat([x.logits for x in found if x.logits is not None]) if logits else None,
    )
