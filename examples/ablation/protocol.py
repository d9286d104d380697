"""The protocol: which cells the experiment has, and how each of them is trained and measured.

It was fixed before any cell was trained, but for the number of steps: two cells of 32 steps were
trained, seen, and thrown away because autocast had reused stale weights; then the number was cut to
24, for the budget alone. The scale of 100 steps came later, with all else the same. No rate or task
was chosen by its result. The three seeds of the four main cells come first, so that a run that ends
early still has paired seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import metafocus as mf
from metafocus.adapters import LoRA, top_layers

MLP = ("gate_proj", "up_proj", "down_proj")
MASKS = {"causal": mf.masks.causal, "bidirectional": mf.masks.context_bidirectional}
TOKENS = {"answer": mf.answer_tokens, "context": mf.context_tokens}
ESTIMATORS = {"first-order": mf.FirstOrder(), "exact": mf.Unrolled(recompute=True)}


@dataclass(frozen=True)
class Cell:
    """One way to fine-tune: a mask, and an inner loop or none.

    Attributes:
        mask: of both losses, one of `MASKS`.
        steps: the number of inner steps; 0 is plain fine-tuning.
        rate: the learning rate of the inner loop.
        estimator: one of `ESTIMATORS`.
        tokens: what the inner loss scores, one of `TOKENS`.
        support: whose tokens the fast weights adapt to: those of the sample itself ("own"), or
            those of another sample of the same task ("another").
    """

    mask: str
    steps: int = 0
    rate: float = 1.0
    estimator: str = "first-order"
    tokens: str = "answer"
    support: str = "own"

    @property
    def name(self) -> str:
        """A name that says all of it, and is one of a file."""
        if not self.steps:
            return f"{self.mask}-none"
        parts = (self.mask, f"K{self.steps}", f"rate{self.rate:g}", self.estimator)
        return "-".join((*parts, self.tokens, self.support))

    @property
    def adapter(self) -> LoRA:
        """The paper's fast weights; on no layer for plain fine-tuning."""
        return LoRA(top_layers(0.35 if self.steps else 0.0, MLP), rank=32, alpha=64.0)

    @property
    def solver(self) -> mf.SGD:
        """The paper's inner optimiser: SGD, the gradient of each tensor clipped to norm 1."""
        return mf.SGD(self.rate, steps=max(self.steps, 1), clip=mf.clip_per_tensor(1.0))


CAUSAL, BIDIRECTIONAL = Cell("causal"), Cell("bidirectional")
CAUSAL_INNER, FOCUSFT = Cell("causal", 2), Cell("bidirectional", 2)
MAIN = (CAUSAL, BIDIRECTIONAL, CAUSAL_INNER, FOCUSFT)

# Each control differs from FocuSFT in one thing. They run in this order; the last ones cost most.
CONTROLS: dict[str, tuple[Cell, ...]] = {
    "inner rate": (Cell("bidirectional", 2, rate=0.1), Cell("bidirectional", 2, rate=0.01)),
    "whose tokens": (Cell("bidirectional", 2, support="another"),),
    "inner tokens": (Cell("bidirectional", 2, tokens="context"),),
    "inner steps": (Cell("bidirectional", 1), Cell("bidirectional", 4)),
    "estimator": (Cell("bidirectional", 2, estimator="exact"),),
}


@dataclass(frozen=True)
class Scale:
    """Sizes and budgets.

    Attributes:
        name: of the scale.
        model: what `metafocus.models.load` takes; "" makes a tiny model from scratch.
        steps: the number of outer steps, with one chat each.
        length: the number of tokens of a chat in training, at most.
        lr: the peak learning rate of AdamW (linear warm-up over a tenth, then a cosine to zero).
        seeds: for the main cells.
        control_seeds: for the controls.
        chats: for each length, how many chats of each task are asked about.
        as_trained: the lengths at which the training mask is measured beside the causal one.
        profiled: how many chats of each task are profiled, and used for the fast weights' control.
        turns: the largest number of questions in a chat.
    """

    name: str
    model: str
    steps: int
    length: int
    lr: float
    seeds: int
    control_seeds: int
    chats: dict[int, int] = field(hash=False)
    as_trained: tuple[int, ...]
    profiled: int = 1
    turns: int = 3
    trained: tuple[str, ...] = ("qa1", "stdlib")
    held_out: tuple[str, ...] = ("qa2", "qa3", "niah")

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks."""
        return self.trained + self.held_out

    def cells(self) -> list[tuple[Cell, int]]:
        """Every cell with every seed, in the order in which they run."""
        main = [(cell, seed) for seed in range(self.seeds) for cell in MAIN]
        more = [cell for control in CONTROLS.values() for cell in control]
        return main + [(cell, seed) for cell in more for seed in range(self.control_seeds)]


QUICK = Scale(
    "quick",
    model="",
    steps=2,
    length=320,
    lr=1e-4,
    seeds=1,
    control_seeds=0,
    chats={320: 1, 400: 1},
    as_trained=(320,),
    turns=2,
)
# A step costs 3.3 CPU seconds without and 5.5 with an inner loop (AMD EPYC, bfloat16 autocast,
# 471 tokens), measuring a cell 60 to 140: all main cells with three seeds take 42 CPU minutes.
SMOLLM2 = Scale(
    "smollm2",
    model="smollm2",
    steps=24,
    length=512,
    lr=1e-4,
    seeds=3,
    control_seeds=2,
    chats={512: 3, 1024: 1, 2048: 1},
    as_trained=(512, 1024),
)
# The same cells with four times the steps, fixed before any of them was trained: do the findings at
# 24 steps hold when each cell has learnt more?
LONGER = replace(SMOLLM2, name="smollm2-100", steps=100)
# For a GPU: not run.
FULL = replace(
    SMOLLM2,
    name="full",
    steps=400,
    seeds=5,
    control_seeds=5,
    chats={512: 50, 1024: 50, 2048: 50, 4096: 25},
    as_trained=(512, 1024, 2048),
    profiled=8,
)
SCALES = {scale.name: scale for scale in (QUICK, SMOLLM2, LONGER, FULL)}
