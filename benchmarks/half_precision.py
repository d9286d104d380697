"""The error of a FocuSFT step in bfloat16, against the same step in float64.

    python benchmarks/half_precision.py    # writes results/half_precision.json and the figure

The products of fast weights are in the type of the activations. That spares float32 tensors as
large as the activations, and it rounds more. This measures what it costs: the gradient of all
parameters, with these products in bfloat16 and in float32, each against float64 at the same
numbers. Everything else is the same code in the same types.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import metafocus as mf
from metafocus.adapters import low_rank, slots
from metafocus.comparison.report import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/half_precision.json"
FIGURES = ROOT / "docs/figures/benchmarks"
ESTIMATORS = {"FirstOrder()": mf.FirstOrder(), "Unrolled()": mf.Unrolled()}
LORA = mf.LoRA(mf.top_layers(0.5, ("gate_proj", "up_proj", "down_proj")), 8, 16.0)


def narrow(
    module: nn.Module, args: Any, output: Tensor, tensors: dict[str, Tensor], scale: float
) -> Tensor:
    """Return what the library does: the update in the type of the activations."""
    return low_rank.update(module, args, output, tensors, scale=scale)


def wide(
    module: nn.Module, args: Any, output: Tensor, tensors: dict[str, Tensor], scale: float
) -> Tensor:
    """Return the same with products in the type of the fast weights, rounded once at the end."""
    a, b = tensors["lora_A"], tensors["lora_B"]
    low = functional.linear(args[0].to(a.dtype), a)
    return output + (scale * functional.linear(low, b)).to(output.dtype)


@dataclass(frozen=True)
class Products:
    """LoRA whose start is given and whose update is computed by a function."""

    start: dict[str, Tensor]
    update: Callable[..., Tensor]

    def init(self, model: nn.Module, generator: Any = None) -> dict[str, Tensor]:
        """Return the given start."""
        return dict(self.start)

    def bind(self, model: nn.Module, fast: Any) -> AbstractContextManager[None]:
        """Let the model see the fast weights."""
        apply = partial(self.update, scale=LORA.scale)
        names = ("lora_A", "lora_B")
        paths = dict.fromkeys(name.rpartition(".")[0] for name in fast)
        return slots.bind(
            (model.get_submodule(p), slots.Binding(apply, {n: fast[f"{p}.{n}"] for n in names}))
            for p in paths
        )


def model_of(hidden: int, seed: int) -> Any:
    """Return a random model of 4 layers, whose parameters are numbers of bfloat16."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    return transformers.Qwen2ForCausalLM(config).bfloat16()


def batch_of(length: int, seed: int) -> dict[str, Tensor]:
    """Return two chats of two turns, whose second halves are answers."""
    draw = torch.Generator().manual_seed(seed)
    place = torch.arange(length).expand(2, -1)
    ids = torch.randint(1, 512, (2, length), generator=draw)
    half = length // 2
    answer = place % half >= half // 2
    turns = place // half * 2 + answer
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "answer_mask": answer,
        "turn_ids": turns,
    }


def gradient(
    model: Any, start: dict[str, Tensor], batch: Any, estimator: Any, update: Callable[..., Tensor]
) -> Tensor:
    """Return the gradient of all parameters as one vector in float64."""
    model.zero_grad()
    meta = mf.recipes.focusft(model, adapter=Products(start, update), estimator=estimator)
    meta({}, mf.Episode(batch, batch))[0].backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def errors(hidden: int, length: int, seed: int, estimator: Any) -> dict[str, float]:
    """Return the relative errors of the gradient with narrow and with wide products."""
    model, batch = model_of(hidden, seed), batch_of(length, seed)
    start = LORA.init(model, torch.Generator().manual_seed(seed))
    found = {f.__name__: gradient(model, start, batch, estimator, f) for f in (narrow, wide)}
    exact = {name: value.double() for name, value in start.items()}
    reference = gradient(model.double(), exact, batch, estimator, wide)
    return {
        name: float((value - reference).norm() / reference.norm()) for name, value in found.items()
    }


def figure(rows: list[dict[str, Any]]) -> Any:
    """Return the figure: one point for each model, with both errors."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes = drawn.subplots()
    for label in ESTIMATORS:
        chosen = [row for row in rows if row["estimator"] == label]
        axes.loglog(
            [row["wide"] for row in chosen], [row["narrow"] for row in chosen], "o", label=label
        )
    ends = [min(row["wide"] for row in rows) / 1.1, max(row["wide"] for row in rows) * 1.1]
    axes.plot(ends, ends, color="0.6", label="equal")
    axes.set_xlabel("error with float32 products")
    axes.set_ylabel("error with bfloat16 products")
    axes.legend()
    return drawn


def section(report: dict[str, Any]) -> list[str]:
    """Return the lines of docs/benchmarks.md."""
    rows = report["rows"]
    lines = []
    for label in ESTIMATORS:
        chosen = [row for row in rows if row["estimator"] == label]
        ratios = sorted(row["narrow"] / row["wide"] for row in chosen)
        middle = ratios[len(ratios) // 2]
        size = sorted(row["wide"] for row in chosen)[len(chosen) // 2]
        lines.append(
            f"| `{label}` | {size:.1e} | {middle:.3f} | {ratios[0]:.3f}-{ratios[-1]:.3f} |"
        )
    return [
        "",
        "## The error of a step in bfloat16",
        "",
        "The products of fast weights are computed in the type of the activations, while the fast "
        "weights themselves stay in float32. The figure and the table compare the gradient of all "
        "parameters, against float64 at the same numbers, with these products in bfloat16 and with "
        "these products in float32. All other operations are the same. "
        f"{len(rows) // len(ESTIMATORS)} random Qwen2 models of 4 layers, hidden size "
        f"{report['hidden']}, {report['length']} tokens, two inner steps; "
        "`python benchmarks/half_precision.py` measures it.",
        "",
        "![Errors with both kinds of products](figures/benchmarks/half_precision.svg)",
        "",
        "| estimator | error with float32 products, median | ratio, median | smallest to largest |",
        "|---|---:|---:|---:|",
        *lines,
    ]


def main() -> None:
    """Measure all models, and write the figure."""
    from benchmarks.rivals.plots import saved

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--models", type=int, default=8)
    args = parser.parse_args()
    rows = []
    for label, estimator in ESTIMATORS.items():
        for seed in range(args.models):
            row = {"estimator": label, "seed": seed}
            rows.append({**row, **errors(args.hidden, args.length, seed, estimator)})
            print(rows[-1], flush=True)
    report = {"benchmark": "half_precision", "environment": environment(torch.bfloat16)}
    report |= {"hidden": args.hidden, "length": args.length, "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    saved(figure(rows), FIGURES / "half_precision.svg")


if __name__ == "__main__":
    main()
