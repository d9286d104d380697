"""How large the experiment is, and which cells it has."""

from __future__ import annotations

from dataclasses import dataclass

import metafocus as mf
from metafocus.adapters import LoRA, top_layers

MLP = ("gate_proj", "up_proj", "down_proj")
MASKS = {"causal": mf.masks.causal, "bidirectional": mf.masks.context_bidirectional}
TOKENS = {"answer": mf.answer_tokens, "context": mf.context_tokens}


@dataclass(frozen=True)
class Cell:
    """One way to fine-tune: a mask, and an inner loop or none."""

    mask: str
    steps: int = 0
    fraction: float = 0.35
    estimator: str = "first-order"
    tokens: str = "answer"

    @property
    def inner(self) -> bool:
        """Whether there are fast weights that move."""
        return self.steps > 0 and self.fraction > 0

    @property
    def name(self) -> str:
        """A name that is also one of a file."""
        if not self.inner:
            return f"{self.mask}-none"
        words = [self.mask, f"K{self.steps}", f"top{self.fraction:g}", self.estimator, self.tokens]
        return "-".join(words)

    @property
    def adapter(self) -> LoRA:
        """The fast weights; on no layer for plain fine-tuning."""
        return LoRA(top_layers(self.fraction if self.inner else 0.0, MLP), rank=8, alpha=16.0)

    @property
    def solver(self) -> mf.SGD:
        """FocuSFT's: SGD with learning rate 1 and each tensor's gradient clipped."""
        return mf.SGD(1.0, steps=max(self.steps, 1), clip=mf.clip_per_tensor(1.0))


CAUSAL, BIDIRECTIONAL = Cell("causal"), Cell("bidirectional")
CAUSAL_INNER, FOCUSFT = Cell("causal", 2), Cell("bidirectional", 2)
MAIN = (CAUSAL, BIDIRECTIONAL, CAUSAL_INNER, FOCUSFT)
# Each differs from FocuSFT in one thing.
SWEEPS: dict[str, tuple[Cell, ...]] = {
    "inner steps K": (
        BIDIRECTIONAL,
        Cell("bidirectional", 1),
        FOCUSFT,
        Cell("bidirectional", 4),
    ),
    "layer fraction": (
        BIDIRECTIONAL,
        Cell("bidirectional", 2, 0.2),
        FOCUSFT,
        Cell("bidirectional", 2, 0.5),
        Cell("bidirectional", 2, 1.0),
    ),
    "estimator": (FOCUSFT, Cell("bidirectional", 2, estimator="unrolled")),
    "inner tokens": (FOCUSFT, Cell("bidirectional", 2, tokens="context")),
}


@dataclass(frozen=True)
class Scale:
    """Sizes and budgets; tasks by name, lengths in tokens."""

    name: str
    layers: int
    hidden: int
    pretrain_steps: int
    pretrain_rows: int
    pretrain_length: int
    seeds: int
    sweep_seeds: int
    steps: int
    rows: int
    length: int
    samples: int
    lengths: tuple[int, ...]
    questions: int
    profiled: int
    lr: float = 5e-4
    pretrain_lr: float = 2e-3
    vocabulary: int = 1024
    trained: tuple[str, ...] = ("qa1", "niah")
    held_out: tuple[str, ...] = ("qa4",)

    def cells(self) -> list[tuple[Cell, int]]:
        """Every cell with every seed, the main ones of all seeds first."""
        main = [(cell, seed) for seed in range(self.seeds) for cell in MAIN]
        more = dict.fromkeys(c for sweep in SWEEPS.values() for c in sweep if c not in MAIN)
        return main + [(cell, seed) for seed in range(self.sweep_seeds) for cell in more]


QUICK = Scale(
    "quick",
    layers=3,
    hidden=128,
    pretrain_steps=30,
    pretrain_rows=4,
    pretrain_length=128,
    seeds=1,
    sweep_seeds=0,
    steps=4,
    rows=2,
    length=192,
    samples=16,
    lengths=(192, 256),
    questions=4,
    profiled=2,
)
CPU = Scale(
    "cpu",
    layers=6,
    hidden=128,
    pretrain_steps=6000,
    pretrain_rows=8,
    pretrain_length=192,
    seeds=5,
    sweep_seeds=3,
    steps=120,
    rows=4,
    length=512,
    samples=480,
    lengths=(192, 512, 1024, 2048),
    questions=32,
    profiled=6,
)
FULL = Scale(
    "full",
    layers=8,
    hidden=256,
    pretrain_steps=20_000,
    pretrain_rows=64,
    pretrain_length=256,
    seeds=5,
    sweep_seeds=5,
    steps=1000,
    rows=8,
    length=1024,
    samples=8000,
    lengths=(512, 1024, 2048, 4096, 8192),
    questions=200,
    profiled=32,
    vocabulary=2048,
)
SCALES = {scale.name: scale for scale in (QUICK, CPU, FULL)}
