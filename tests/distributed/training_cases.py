"""Short runs of `FocusTrainer` on two processes: what they reach, save, and resume.

`python training_cases.py DIR [CASE ...]` runs cases and writes what each rank found to DIR.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import rank_pool as pool
from trainer_script import SAMPLES, tiny, trainer

LAYER = "Qwen2DecoderLayer"


def fsdp_on_cpus() -> None:
    """Let accelerate run its own path of FSDP2 over gloo.

    accelerate turns FSDP into DDP on a CPU: this lifts that check and nothing else.
    """
    import accelerate.state as state
    from accelerate.utils import DistributedType

    made = state.AcceleratorState.__init__

    def make(self, *args, **settings):
        made(self, *args, **settings)
        plugin = settings.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = make


def fsdp(**config) -> dict:
    config = {"version": 2, "transformer_layer_cls_to_wrap": [LAYER], **config}
    return {"fsdp": True, "fsdp_config": config}


WAYS = {
    "ddp": {},
    "fsdp": fsdp(),
    "fsdp, no reshard": fsdp(reshard_after_forward=False),
    "fsdp, efficient": fsdp(cpu_ram_efficient_loading=True),
    "fsdp, wrappers": fsdp(activation_checkpointing=True),
    "fsdp, sharded state": fsdp(state_dict_type="SHARDED_STATE_DICT"),
    "parametrised": {"sharding": "parametrised"},
}
METHODS = {
    "first order": {},
    "sft": {"method": "sft"},
    "second order": {"estimator": "unrolled-recompute"},
    "bf16": {"bf16": True},
    "prompts": {"evaluate_on": "prompt"},
}


def fresh() -> None:
    """Forget what accelerate and transformers remember of the case before."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]


def run(folder: Path, way: str, method: str, tied: bool, accumulation: int, **changes):
    """Two steps of four samples, with one sample that has no answer; then what was reached."""
    fresh()
    dtype = torch.float32 if method == "bf16" else torch.float64
    settings = {**WAYS.get(way, {}), **METHODS[method], **changes}
    resume = settings.pop("resume", None)
    made = trainer(
        tiny(dtype, tie_word_embeddings=tied), folder, max_steps=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation, heldout=SAMPLES[:5],
        per_device_eval_batch_size=2, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        made.train(resume)
    made.save_model(str(folder / "final"))
    found = {"eval": made.evaluate()["eval_loss"], "type": type(made.model_wrapped).__name__}
    found["warned"] = " ".join(str(one.message) for one in warned)
    found["logs"] = [entry for entry in made.state.log_history if "loss" in entry]
    return found


def pair(folder: Path, way: str, method: str, tied: bool, rank: int):
    return run(folder / f"{way}, {method}, {tied}", way, method, tied, 2)


def resumed(folder: Path, way: str, rank: int):
    """Save after the first of two steps on two processes, and resume there."""
    place = folder / f"{way}, saved"
    saving = {"save_strategy": "steps", "save_steps": 1}
    run(place, way, "first order", True, 2, **saving)
    return run(
        place, way, "first order", True, 2, **saving, resume=str(place / "checkpoint-1"),
    )  # fmt: skip


def alone(folder: Path, method: str, tied: bool):
    return run(folder / f"alone, {method}, {tied}", "alone", method, tied, 4)


def resumed_alone(folder: Path, way: str):
    """Resume in one process what two have saved."""
    place = folder / f"{way}, saved"
    return run(
        folder / f"{way}, resumed alone", "alone", "first order", True, 4,
        resume=str(place / "checkpoint-1"),
    )  # fmt: skip


def resumed_by_four(folder: Path, way: str, rank: int):
    """Resume in four processes what two have saved; each takes one sample of a step."""
    place = folder / f"{way}, saved"
    return run(
        folder / f"{way}, resumed by four", way, "first order", True, 1,
        resume=str(place / "checkpoint-1"),
    )  # fmt: skip


MORE = ("fsdp", "fsdp, sharded state", "parametrised")


def cases(folder: Path) -> dict:
    found = {
        f"{way}, {method}, {'tied' if tied else 'untied'}": partial(pair, folder, way, method, tied)
        for way in WAYS
        for method in METHODS
        for tied in (True, False)
    }
    return found | {f"{way}, resumed": partial(resumed, folder, way) for way in WAYS}


def references(folder: Path) -> dict:
    return {
        f"{method}, {'tied' if tied else 'untied'}": partial(alone, folder, method, tied)
        for method in METHODS
        for tied in (True, False)
    }


if __name__ == "__main__":
    fsdp_on_cpus()
    place = Path(sys.argv[1])
    every = cases(place)
    chosen = sys.argv[2:] or list(every)
    pool.alone(references(place), place)
    pool.run({name: every[name] for name in chosen}, place)
    later = {
        f"{way}, resumed": partial(resumed_alone, place, way)
        for way in ("ddp", "parametrised")
        if f"{way}, resumed" in chosen
    }
    pool.alone(later, place)
    more = {
        f"{way}, resumed by four": partial(resumed_by_four, place, way)
        for way in MORE
        if f"{way}, resumed" in chosen
    }
    pool.run(more, place, ranks=4)
