"""An inner objective of your own: adapt to inputs without labels.

The inner loss is any function `(fast, slow, support) -> scalar`; it may differ from the outer loss.
Here the inner loop lowers the entropy of the predictions on unlabelled inputs. The outer loss
measures on labelled inputs whether that helped, so the slow weights learn a start that suits this
adaptation. For language models the inner objective is a *token policy*, `batch -> [B, S]` booleans.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import metafocus as mf


def logits(weights, x):
    return x @ weights["w"] + weights["b"]


def entropy(fast, slow, x):
    """Mean entropy of the predictions for `x`, in nats."""
    p = logits(fast, x).log_softmax(-1)
    return -(p.exp() * p).sum(-1).mean()


def supervised(fast, slow, data):
    """Cross entropy on labelled data."""
    x, label = data
    return F.cross_entropy(logits(fast, x), label)


problem = mf.Problem(entropy, supervised)


def last_context_turn(batch):
    """A token policy: score the tokens of the last turn before each answer, such as a question."""
    turns = batch.get("document_ids", torch.zeros_like(batch["turn_ids"])), batch["turn_ids"]
    context = mf.context_tokens(batch)
    before_answer = F.pad(batch["answer_mask"][:, 1:], (0, 1)) & context
    # Number the runs of tokens of one turn. Then find the runs that an answer follows.
    every = torch.stack((*turns, context.long()))
    begins = (every[..., 1:] != every[..., :-1]).any(0)
    run = F.pad(begins, (1, 0)).cumsum(-1)
    asked = torch.zeros_like(run).scatter_add(-1, run, before_answer.long())
    return context & (asked.gather(-1, run) > 0)


def main() -> list[float]:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(60) % 3
    x = torch.eye(3)[label] * 2 + torch.randn(60, 3, generator=generator)
    outer = {"w": torch.zeros(3, 3).fill_diagonal_(0.1), "b": torch.zeros(3)}
    meta = mf.bilevel(problem, solver=mf.SGD(0.5, steps=3), estimator=mf.Unrolled())
    losses = []
    for step in range(30):
        grads, (loss, aux) = mf.hypergrad(meta)(outer, mf.Episode(x, (x, label)))
        outer = {k: v - 0.5 * grads[k] for k, v in outer.items()}
        losses.append(loss.item())
        if step % 10 == 0:
            before, after = aux.inner_losses[0], aux.inner_losses[-1]
            print(f"step {step}: entropy {before:.3f} -> {after:.3f}, outer loss {loss:.3f}")
    return losses


if __name__ == "__main__":
    main()
