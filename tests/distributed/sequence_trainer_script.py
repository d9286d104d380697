"""Trainers that share sequences: `python sequence_trainer_script.py RANKS SIZE DIR`.

One process trains alone with as many micro-batches; then RANKS processes train, of which SIZE share
each sequence.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import replace_norms
from processes import environments, failed, forked
from trainer_script import SAMPLES, tiny, trainer

import metafocus as mf

METHODS = {
    "sft": {"method": "sft", "mask": "context-bidirectional"},
    "focusft": {},
    "second order": {"estimator": "unrolled-recompute"},
    "per example": {"per_example": True, "per_device_train_batch_size": 2},
}


def model():
    network = tiny(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    replace_norms(network)
    return network


def trained(folder: Path, groups: int, **changes) -> dict:
    """Two optimiser steps, each of four micro-batches on all groups together."""
    network = model()
    settings = {"per_device_train_batch_size": 1, **changes}
    run = trainer(
        network, folder / "run", max_steps=2, gradient_accumulation_steps=4 // groups,
        heldout=SAMPLES[:5], per_device_eval_batch_size=2, ddp_timeout=60, **settings,
    )  # fmt: skip
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    heldout = run.heldout_losses()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in run.model.parameters()]
    found = torch.cat([p.detach().flatten() for p in whole])
    sharded = any(hasattr(p, "full_tensor") for p in run.model.parameters())
    return {"weights": found, "logs": logs, "heldout": heldout, "sharded": sharded}


def fsdp_on_cpus() -> None:
    """Let accelerate, which turns FSDP into DDP on a CPU, run its own path of FSDP2 over gloo."""
    import accelerate.state as state
    from accelerate.utils import DistributedType

    made = state.AcceleratorState.__init__

    def make(self, *args, **settings):
        made(self, *args, **settings)
        plugin = settings.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = make
    # Forget what the trainers before this one have set.
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def prompts(folder: Path, size: int) -> float:
    """The loss after adapting to each prompt, whatever the ranks."""
    run = trainer(model(), folder / "run", heldout=SAMPLES[:3], evaluate_on="prompt",
                  per_device_eval_batch_size=1, sequence_parallel=size)  # fmt: skip
    return run.evaluate()["eval_loss"]


def refused(folder: Path) -> dict[str, str]:
    """What is refused, and why."""
    found = {}
    cases = {
        "compute_metrics": lambda: predicting(folder),
        "factory": lambda: trainer(
            model(), folder / "run", sequence_parallel=2,
            kept={"meta_loss_factory": lambda model, generator: None},
        ),
        "size": lambda: trainer(model(), folder / "run", sequence_parallel=3),
        "stream": lambda: streaming(folder),
    }  # fmt: skip
    for name, case in cases.items():
        try:
            case()
        except mf.errors.MetafocusError as error:
            found[name] = str(error)
    return found


def predicting(folder: Path) -> None:
    trainer(model(), folder / "run", sequence_parallel=2).predict(SAMPLES[:2])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(SAMPLES)


def streaming(folder: Path) -> None:
    trainer(model(), folder / "run", samples=Stream(), max_steps=1, sequence_parallel=2).train()


def facts(folder: Path, groups: int, size: int) -> dict:
    found: dict = {
        name: trained(folder, groups, sequence_parallel=size, **changes)
        for name, changes in METHODS.items()
    }
    found["prompts"] = prompts(folder, size)
    if size > 1:
        found["refused"] = refused(folder)
        found["parametrised"] = trained(
            folder, groups, sequence_parallel=size, sharding="parametrised",
            **METHODS["second order"],
        )  # fmt: skip
        fsdp_on_cpus()
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
        found["fsdp"] = trained(
            folder, groups, sequence_parallel=size, fsdp=True, fsdp_config=config
        )
    return found


def main(ranks: int, size: int, folder: Path) -> int:
    pids = [forked(lambda: torch.save(facts(folder / "alone", 1, 1), folder / "alone.pt"))]
    for r, env in enumerate(environments(ranks)):

        def work(r: int = r) -> None:
            torch.save(facts(folder, ranks // size, size), folder / f"rank{r}.pt")
            torch.distributed.barrier()

        pids.append(forked(work, env))
    return int(failed(pids))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
