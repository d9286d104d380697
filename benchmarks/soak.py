"""Does training leak? `python benchmarks/soak.py --steps 1000` ends with 1 if it does.

FocuSFT in `FocusTrainer` on a tiny model, batches of changing length, with evaluations. Every
`--every` steps: the resident memory of the process, and how many tensors are alive. After the
warm-up neither may grow: tensors not by one, memory not by more than `--slack` MiB, which the
allocator takes for fragments.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from metafocus.comparison.report import environment
from metafocus.data import Collator
from metafocus.trainer import FocusArguments, FocusTrainer


@dataclass(frozen=True)
class Reading:
    """What is alive after a step."""

    step: int
    rss_mib: float
    tensors: int


class Gauge(TrainerCallback):
    """Reads memory every so many steps; `leak`, for a test of the gauge, keeps a tensor a step."""

    def __init__(self, every: int, leak: bool = False):
        self.every, self.readings = every, list[Reading]()
        self._kept: list[torch.Tensor] | None = [] if leak else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read, and print."""
        if self._kept is not None:
            self._kept.append(torch.zeros(4096))
        if state.global_step % self.every:
            return
        reading = Reading(state.global_step, resident(), alive())
        self.readings.append(reading)
        print(
            f"step {reading.step}: {reading.rss_mib:.1f} MiB, {reading.tensors} tensors", flush=True
        )


def resident() -> float:
    """The resident memory of this process, in MiB."""
    return psutil.Process().memory_info().rss / 2**20


def alive() -> int:
    """How many tensors the interpreter can reach, after a collection."""
    gc.collect()
    # By type, not isinstance: proxies answer that by importing what they stand for.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def growth(readings: list[Reading], warm_up: int, slack: float) -> list[str]:
    """Return what grew after the warm-up, in words; nothing if nothing did."""
    warm = [r for r in readings if r.step >= warm_up]
    if len(warm) < 2:
        raise SystemExit(f"{len(warm)} readings after the warm-up of {warm_up} steps: run longer.")
    first, last = warm[0], warm[-1]
    found = []
    if last.tensors > first.tensors:
        found.append(
            f"live tensors grew from {first.tensors} at step {first.step} to {last.tensors} at "
            f"step {last.step}"
        )
    if last.rss_mib > first.rss_mib + slack:
        found.append(
            f"memory grew from {first.rss_mib:.1f} MiB at step {first.step} to "
            f"{last.rss_mib:.1f} MiB at step {last.step}, more than {slack:g} MiB"
        )
    return found


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    """Context and answer of random tokens, 12 to 60 long, the last third the answer."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        length = int(torch.randint(12, 61, (), generator=generator))
        answer = torch.arange(length) >= 2 * length // 3
        ids = torch.randint(1, 256, (length,), generator=generator)
        found.append({"input_ids": ids, "turn_ids": answer.long(), "answer_mask": answer})
    return found


def soak(args: argparse.Namespace, folder: str) -> list[Reading]:
    """Train; return the readings."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    gauge = Gauge(args.every, args.leak)
    settings = FocusArguments(
        folder,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        layer_fraction=0.5,
        lora_rank=8,
        lora_alpha=16.0,
        estimator=args.estimator,
        per_example=args.per_example,
        # A log entry and an evaluation between any two readings.
        logging_steps=args.every,
        eval_strategy="steps",
        eval_steps=args.every,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = samples(264)
    trainer = FocusTrainer(
        model,
        settings,
        train_dataset=data[:256],
        eval_dataset=data[256:],
        data_collator=Collator(0),
        callbacks=[gauge],
    )
    trainer.train()
    return gauge.readings


def parser() -> argparse.ArgumentParser:
    """The settings of a soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--every", type=int, default=100, help="steps from reading to reading")
    parser.add_argument("--warm-up", type=int, help="steps; default: a fifth")
    parser.add_argument("--slack", type=float, default=8.0, help="MiB; default %(default)s")
    parser.add_argument("--estimator", default="first-order", help="default %(default)s")
    parser.add_argument("--per-example", action="store_true", help="fast weights for each sample")
    parser.add_argument("--leak", action="store_true", help="keep a tensor a step: must be found")
    parser.add_argument("--output", type=Path, help="write the readings as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Soak; return 1 if something grew."""
    args = parser().parse_args(argv)
    warm_up = args.steps // 5 if args.warm_up is None else args.warm_up
    with tempfile.TemporaryDirectory() as folder:
        readings = soak(args, folder)
    found = growth(readings, warm_up, args.slack)
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k != "output"}
        report = {
            "settings": {**settings, "warm_up": warm_up},
            "environment": environment(torch.float32),
            "readings": [asdict(reading) for reading in readings],
            "growth": found,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    print("; ".join(found) or f"flat after {warm_up} steps", flush=True)
    return bool(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
