"""What FocuSFT costs, on paper: `python examples/cost_model.py` prints the tables of the docs.

Arithmetic only. Floating-point operations of one sequence, the bytes one GPU holds at the peak,
term by term, and the time that follows from a share of the peak speed, without communication.
`CHECKED` are rows that were measured on one H200, beside which the sums are held by a test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLPs and grouped-query attention."""

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    vocab: int

    @property
    def layer(self) -> int:
        """Parameters of one layer: query and output, key and value, three MLP matrices."""
        attention = 2 * self.hidden * self.head * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def parameters(self) -> int:
        """All of them; embedding and head are not tied."""
        return self.layers * self.layer + 2 * self.vocab * self.hidden


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    shape: Shape
    tokens: int
    gpus: int
    inner_steps: int = 2
    fraction: float = 0.35
    rank: int = 32
    answers: float = 0.25
    sharers: int = 1  # GPUs that share a sequence
    # Half of the dense bfloat16 peak of an H100 would be very good; 0.4 is usual.
    speed: float = 0.4 * 989e12

    @property
    def fast_layers(self) -> int:
        n = self.shape.layers
        return n - int(n * (1 - self.fraction) + 1e-9)

    def forward(self) -> float:
        """Of all layers: 2 operations per parameter and token, 4 S d per token of attention."""
        s = self.shape
        attention = 4 * self.tokens * s.heads * s.head
        return self.tokens * s.layers * (2 * s.layer + attention)

    def units(self, *, shared: bool) -> float:
        """Layer passes of a step in forwards: 4 outside; inside, forward and backward to the fast
        weights through the top layers, and the layers below, once per step unless shared."""
        top = self.fast_layers / self.shape.layers
        return 4 + self.inner_steps * (2 * top + (0 if shared else 1 - top))

    def head(self, *, answers_only: bool) -> float:
        """Of the head: 2 operations forward, 4 backward, K more passes with 2 backward."""
        s = self.shape
        scored = self.tokens * (self.answers if answers_only else 1)
        return scored * s.hidden * s.vocab * (6 + 4 * self.inner_steps)

    def operations(self, *, ours: bool) -> float:
        return self.forward() * self.units(shared=ours) + self.head(answers_only=ours)

    def sft(self) -> float:
        s = self.shape
        return 4 * self.forward() + 6 * self.tokens * s.hidden * s.vocab

    def seconds(self) -> float:
        return self.operations(ours=True) / self.speed / self.sharers

    def memory(self) -> dict[str, float]:
        """Bytes on one GPU: float32 weights, gradients and two moments are sharded over all."""
        s = self.shape
        tokens = self.tokens / self.sharers
        whole = self.gpus > 1  # otherwise nothing is gathered, and autocast casts alone
        table = s.vocab * s.hidden
        sizes = 2 * (s.hidden + s.mlp) + (s.mlp + s.hidden)
        logits = min(tokens * self.answers * s.vocab, 2**26)  # a chunk of rows at a time
        return {
            "weights, gradients, Adam": 16 * s.parameters / self.gpus,
            # Float32 as it arrives, and its bfloat16 copy.
            "gathered layer": (4 * whole + 2) * s.layer,
            "gathered embedding and head": 4 * whole * 2 * table + 2 * table,
            # Before they are averaged over the GPUs, and cut.
            "gradients of embedding and head": 4 * whole * 2 * table,
            "logits at answers": 2 * 4 * logits,  # they, and their gradient
            "inputs of layers": 2 * tokens * s.hidden * (s.layers + self.fast_layers),
            "graph of one layer": 2 * tokens * (10 * s.hidden + 4 * s.mlp),
            "fast weights": 3 * 4 * self.fast_layers * self.rank * sizes,  # start, now, gradient
        }

    def peak(self) -> float:
        """All terms at once, which is a little more than any moment holds."""
        return sum(self.memory().values())


SEVEN = Shape("7B (Qwen2.5)", 28, 3584, 18944, 28, 4, 128, 152064)
SEVENTY = Shape("70B (Llama-3)", 80, 8192, 28672, 64, 8, 128, 128256)
RUNS = [
    Run(SEVEN, 4096, 8),
    Run(SEVEN, 32768, 8),
    Run(SEVEN, 131072, 16),
    Run(SEVENTY, 4096, 64),
    Run(SEVENTY, 32768, 64),
    Run(SEVENTY, 131072, 128),
]


# One H200, 8 layers of the 7B model, weights and gradients in bfloat16 and no optimiser:
# `benchmarks/focusft_gpu.py`. Tokens, bytes at the peak.
CHECKED = {4096: 12_027_665_408, 32768: 21_545_507_328}


def as_measured(tokens: int) -> float:
    """Return the bytes of such a row: bfloat16 throughout, so nothing is cast or gathered."""
    run = Run(replace(SEVEN, layers=8), tokens, 1)
    terms = run.memory()
    names = ("logits at answers", "inputs of layers", "graph of one layer", "fast weights")
    return 4 * run.shape.parameters + sum(terms[name] for name in names)


def table() -> str:
    """The table of operations, in Markdown."""
    lines = [
        "| model | tokens | GPUs | PFLOP a sequence: SFT | shared prefix | prefix each step | "
        "s a sequence | GiB | dense mask, GiB |",
        "|" + "---|" * 9,
    ]
    for run in RUNS:
        cells = [
            run.shape.name,
            f"{run.tokens // 1024}k",
            str(run.gpus),
            f"{run.sft() / 1e15:.2f}",
            f"{run.operations(ours=True) / 1e15:.2f}",
            f"{run.operations(ours=False) / 1e15:.2f}",
            f"{run.seconds():.1f}",
            f"{run.peak() / GIB:.1f}",
            f"{run.tokens**2 / GIB:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


GRID = [
    Run(SEVEN, tokens, gpus, sharers=sharers)
    for tokens in (4096, 32768, 131072)
    for gpus in (1, 8, 64)
    for sharers in (1, 4)
    if sharers <= gpus
]


def short_names() -> dict[str, str]:
    """The terms of `Run.memory`, by the letters that the table has for them."""
    return dict(zip("ABCDEFGH", GRID[0].memory(), strict=True))


def memory_table() -> str:
    """What a GPU holds for the 7B model, term by term in GiB, in Markdown."""
    lines = [
        "| tokens | GPUs | share a sequence | s a sequence | "
        + " | ".join(short_names())
        + " | sum |",
        "|" + "---|" * (5 + len(short_names())),
    ]
    for run in GRID:
        terms = [f"{size / GIB:.1f}" for size in run.memory().values()]
        sum_ = f"{run.peak() / GIB:.1f}"
        first = [f"{run.tokens // 1024}k", str(run.gpus), str(run.sharers), f"{run.seconds():.1f}"]
        lines.append("| " + " | ".join([*first, *terms, sum_]) + " |")
    return "\n".join(lines)


TASKS = [
    (tasks, Run(SEVEN, 4096, gpus, sharers=sharers))
    for tasks in (1_000, 10_000)
    for gpus, sharers in ((8, 1), (64, 1), (64, 4))
]


def tasks_table() -> str:
    """One step over many tasks of the 7B model, a sequence each, in Markdown."""
    lines = [
        "| tasks | GPUs | share a sequence | tasks a GPU | s a step | GiB | adapted weights, GiB |"
    ]
    lines.append("|" + "---|" * 7)
    for tasks, run in TASKS:
        each = math.ceil(tasks / (run.gpus // run.sharers))
        kept = each * run.memory()["fast weights"] / 3  # of the three copies one stays
        numbers = (each * run.seconds(), run.peak() / GIB, kept / GIB)
        cells = [f"{tasks:,}", str(run.gpus), str(run.sharers), str(each)]
        lines.append("| " + " | ".join([*cells, *(f"{x:.1f}" for x in numbers)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    print("\n" + "; ".join(f"{letter}: {name}" for letter, name in short_names().items()))
    print(memory_table())
    print(f"\n{tasks_table()}\n")
    for tokens, measured in CHECKED.items():
        found = as_measured(tokens)
        print(f"{tokens} tokens, 8 layers: {found / GIB:.1f} GiB, measured {measured / GIB:.1f}")
