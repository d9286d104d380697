"""The points of the study, and how one of them is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import metafocus as mf
from metafocus.data import Collator, encode_chats, stdlib_qa

MASKS = {"causal": mf.masks.causal, "bidirectional": mf.masks.context_bidirectional}
EPSILON = 5e-4
"""The Euclidean distance that the weights move in a central difference, each way."""


@dataclass(frozen=True)
class Point:
    """One setting of FocuSFT's inner loop, on one chat about the standard library.

    Attributes:
        rate: the inner learning rate.
        steps: the number of inner steps, K.
        tokens: the largest number of tokens of the chat.
        mask: one of `MASKS`.
        sample: the number of the chat.
    """

    rate: float = 1.0
    steps: int = 2
    tokens: int = 240
    mask: str = "bidirectional"
    sample: int = 0

    @property
    def name(self) -> str:
        """A name that says all of it, and is one of a file."""
        parts = (self.mask, f"K{self.steps}", f"rate{self.rate:g}", f"{self.tokens}tokens")
        return "-".join((*parts, f"sample{self.sample}"))


def grid() -> list[Point]:
    """Every point, in the order in which they run: what decides most comes first."""
    points = [Point(rate, sample=i) for i in range(3) for rate in (1.0, 0.1, 0.3)]
    points += [Point(rate, steps=k) for k in (1, 4) for rate in (1.0, 0.1)]
    points += [Point(rate, mask="causal") for rate in (1.0, 0.1, 0.3)]
    points += [Point(rate, tokens=480) for rate in (1.0, 0.1)]
    points += [Point(rate, sample=i) for i in range(3) for rate in (0.01, 0.03)]
    points += [Point(rate, steps=k, sample=1) for k in (1, 4) for rate in (1.0, 0.1)]
    points += [Point(rate, mask="causal", sample=1) for rate in (1.0, 0.1, 0.3)]
    points += [Point(rate, tokens=480, sample=1) for rate in (1.0, 0.1)]
    return points


def chat(tokenizer: Any, tokens: int, sample: int) -> dict[str, Tensor]:
    """Return one chat with one question, of at most so many tokens, as a batch of one row."""
    chats = stdlib_qa.generate(
        tokenizer, split="train", n=sample + 1, context_tokens=tokens - 90, seed=11
    )
    (encoded,) = encode_chats(chats[sample:], tokenizer, max_length=tokens).samples
    return Collator(tokenizer.pad_token_id)([encoded])


def measure(model: Any, batch: dict[str, Tensor], point: Point) -> dict[str, Any]:
    """Return how the first-order hypergradient compares with the exact one at a point.

    Central differences of the loss, along both directions, are the referee at the first chat.
    """
    started = time.process_time()
    first, loss, inner = hypergradient(model, batch, point, mf.FirstOrder())
    exact, _, _ = hypergradient(model, batch, point, mf.Unrolled(recompute=True))
    norms = dot(first, first) ** 0.5, dot(exact, exact) ** 0.5
    along = dot(first, exact)
    found: dict[str, Any] = {
        "cosine": along / (norms[0] * norms[1]),
        "norm": {"first-order": norms[0], "exact": norms[1]},
        # The batch is support and query with the same tokens, so the outer loss is what the inner
        # loss is after its last step.
        "losses": [*inner, loss],
        "slope": None,
    }
    if point.sample == 0:
        # Four more losses; one chat of each setting is enough for a referee.
        found["slope"] = {
            "along exact": {
                "exact": norms[1],
                "first-order": along / norms[1],
                "measured": slope(model, batch, point, exact, norms[1]),
            },
            "along first-order": {
                "exact": along / norms[0],
                "first-order": norms[0],
                "measured": slope(model, batch, point, first, norms[0]),
            },
        }
    size = {
        "tokens": batch["input_ids"].shape[1],
        "answer tokens": int(batch["answer_mask"].sum()),
    }
    return {
        "point": asdict(point),
        **size,
        **found,
        "cpu_seconds": time.process_time() - started,
    }


def meta_loss(model: Any, point: Point, estimator: mf.Estimator) -> mf.MetaLoss:
    """Return FocuSFT's loss with the point's settings, and always the same start."""
    return mf.recipes.focusft(
        model,
        mask=MASKS[point.mask],
        solver=mf.SGD(point.rate, steps=point.steps, clip=mf.clip_per_tensor(1.0)),
        estimator=estimator,
        generator=torch.Generator().manual_seed(point.sample),
    )


def hypergradient(
    model: Any, batch: dict[str, Tensor], point: Point, estimator: mf.Estimator
) -> tuple[dict[str, Tensor], float, list[float]]:
    """Return the hypergradient, the outer loss, and the inner losses before each step."""
    model.zero_grad(set_to_none=True)
    loss, aux = meta_loss(model, point, estimator)({}, mf.Episode(batch, batch))
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads, float(loss.detach()), aux.inner_losses.tolist()


def slope(
    model: Any,
    batch: dict[str, Tensor],
    point: Point,
    direction: dict[str, Tensor],
    norm: float,
) -> float:
    """Return the derivative of the outer loss along a direction of the weights, measured."""
    values = []
    for sign in (1.0, -1.0):
        with moved(model, direction, sign * EPSILON / norm), torch.no_grad():
            loss, _ = meta_loss(model, point, mf.FirstOrder())({}, mf.Episode(batch, batch))
            values.append(float(loss))
    return (values[0] - values[1]) / (2 * EPSILON)


@contextmanager
def moved(model: Any, direction: dict[str, Tensor], by: float) -> Iterator[None]:
    """Move the weights inside a `with` block, and put the very same numbers back."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in direction:
                    p.add_(direction[name], alpha=by)
        yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])


def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the inner product, summed in float64."""
    return sum(float((a[k].double() * b[k].double()).sum()) for k in a.keys() & b.keys())
