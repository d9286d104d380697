"""What FocuSFT costs, on paper: `python examples/cost_model.py` prints the table of the docs.

Arithmetic only, nothing is measured. Floating-point operations of one sequence, the bytes one GPU
holds at the peak, and the time that follows from a share of the peak speed.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        return self.operations(ours=True) / self.speed

    def memory(self) -> dict[str, float]:
        """Bytes on one GPU: float32 weights, gradients and two moments are sharded over all."""
        s = self.shape
        state = 16 * s.parameters / self.gpus
        gathered = 2 * 2 * s.layer  # two layers in bfloat16: one computes, the next one arrives
        kept = 2 * self.tokens * s.hidden * (s.layers + self.fast_layers)  # checkpointed inputs
        working = 2 * self.tokens * (10 * s.hidden + 4 * s.mlp)  # one layer's graph
        sizes = 2 * (s.hidden + s.mlp) + (s.mlp + s.hidden)
        fast = 3 * 4 * self.fast_layers * self.rank * sizes  # start, current, gradient
        return {
            "state": state,
            "gathered": gathered,
            "kept": kept,
            "working": working,
            "fast": fast,
        }


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


def table() -> str:
    """The table, in Markdown."""
    lines = [
        "| model | tokens | GPUs | PFLOP a sequence: SFT | shared prefix | prefix each step | "
        "s a sequence | GiB: weights and Adam | checkpoints | one layer | gathered | fast | sum | "
        "dense mask |",
        "|" + "---|" * 14,
    ]
    for run in RUNS:
        memory = run.memory()
        cells = [
            run.shape.name,
            f"{run.tokens // 1024}k",
            str(run.gpus),
            f"{run.sft() / 1e15:.2f}",
            f"{run.operations(ours=True) / 1e15:.2f}",
            f"{run.operations(ours=False) / 1e15:.2f}",
            f"{run.seconds():.1f}",
            *(
                f"{memory[name] / GIB:.1f}"
                for name in ("state", "kept", "working", "gathered", "fast")
            ),
            f"{sum(memory.values()) / GIB:.1f}",
            f"{run.tokens**2 / GIB:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
