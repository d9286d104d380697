"""The table {layout} x {tied, untied} x {method}: the gradient of FocuSFT on two processes.

`python sharding_table.py DIR [CELL ...]` runs cells and writes what each rank found to DIR.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import rank_pool as pool
from trainer_script import ADAPTER, COLLATOR, SAMPLES, tiny

import metafocus as mf
from metafocus.trainer.distributed import parametrise, through

LAYER = "Qwen2DecoderLayer"


def by_accelerate(model, *, reshard=True, checkpointing=False, efficient=False, precision="no"):
    """accelerate's own layout, by the functions that its `prepare` calls."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=reshard,
        transformer_cls_names_to_wrap=[LAYER], activation_checkpointing=checkpointing,
        cpu_ram_efficient_loading=efficient, state_dict_type="FULL_STATE_DICT",
    )  # fmt: skip
    if precision != "no":
        plugin.set_mixed_precision(precision)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision,
        device=torch.device("cpu"), is_main_process=dist.get_rank() == 0,
    )  # fmt: skip
    if checkpointing:
        model = fsdp2_apply_ac(accelerator, model)
    return fsdp2_prepare_model(accelerator, model)


def by_hand(model, *, reshard=None, keep=False):
    """Layers and model, as torch's own tutorial does; `keep` leaves all weights gathered."""
    for module in (*model.model.layers, model):
        fully_shard(module, reshard_after_forward=reshard)
    if keep:
        model.set_reshard_after_backward(False)
    return model


def parametrised(model, **others):
    return parametrise(model, init_device_mesh("cpu", (dist.get_world_size(),)))


LAYOUTS = {
    "accelerate": by_accelerate,
    "accelerate, no reshard": partial(by_accelerate, reshard=False),
    "accelerate, wrappers": partial(by_accelerate, checkpointing=True),
    "accelerate, efficient": partial(by_accelerate, efficient=True),
    "own": by_hand,
    "own, reshard": partial(by_hand, reshard=True),
    "own, no reshard": partial(by_hand, reshard=False),
    "own, kept": partial(by_hand, reshard=False, keep=True),
    "parametrised": parametrised,
    "ddp": DistributedDataParallel,
}
METHODS = {
    "first order": {},
    "sft": {"adapter": mf.NoAdapter(), "mask": mf.masks.causal},
    "per example": {"per_example": True},
    "no answers": {},
    "checkpointing": {},
    "unrolled": {"estimator": mf.Unrolled()},
    "recompute": {"estimator": mf.Unrolled(recompute=True)},
    "forward": {"estimator": mf.Unrolled(recompute=True, hvp=mf.hvp_forward)},
    "implicit": {"estimator": mf.Implicit(mf.CG(3))},
    "penalty": {"estimator": mf.Penalty(1e-2)},
    "evograd": {"estimator": mf.EvoGrad(0.1)},
}
FIRST = ("first order", "sft", "per example", "no answers", "checkpointing")
SECOND = tuple(name for name in METHODS if name not in FIRST)


def batch_of(method: str, rank: int):
    if method == "no answers" and rank == 1:
        return COLLATOR([SAMPLES[6]])
    return COLLATOR(SAMPLES[:2] if rank == 0 else SAMPLES[2:4])


def gradient(method: str, model, rank: int, wrapped=None):
    """The loss, and the gradient of every parameter by its plain name."""
    settings = {"adapter": ADAPTER, **METHODS[method]}
    if method == "checkpointing":
        # The second is its older name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    generator = torch.Generator().manual_seed(rank)
    meta = mf.recipes.focusft(model, generator=generator, **settings)
    batch = batch_of(method, rank)
    seen = []
    head = model.get_output_embeddings()
    watch = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    loss = through(wrapped or model, lambda b: meta({}, mf.Episode(b, b))[0], batch)
    loss.backward()
    watch.remove()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    grads = {}
    for name, p in model.named_parameters():
        value = torch.zeros_like(p) if p.grad is None else p.grad
        plain = name.replace("parametrizations.", "").removesuffix(".original")
        plain = plain.replace("_checkpoint_wrapped_module.", "")
        grads[plain] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return {"loss": loss.item(), "grads": grads, "head": max(seen, default=0)}


def tried(model, method: str, rank: int):
    """The model after the trial of its last layer, which shows the head two positions."""
    batch = batch_of(method, rank)
    with torch.no_grad():
        mf.recipes.focusft(model, adapter=ADAPTER)({}, mf.Episode(batch, batch))
    return model


def cell(layout: str, tied: bool, method: str, rank: int):
    model = tiny(tie_word_embeddings=tied)
    if layout == "ddp":
        tried(model, method, rank)
    wrapped = LAYOUTS[layout](model)
    return gradient(method, model, rank, wrapped if layout == "ddp" else None)


def reference(tied: bool, method: str, rank: int):
    model = tried(tiny(tie_word_embeddings=tied), method, rank)
    return gradient(method, model, rank)


def tie(tied: bool) -> str:
    return "tied" if tied else "untied"


CELLS = {
    f"{layout}, {tie(tied)}, {method}": partial(cell, layout, tied, method)
    for layout, tied, method in itertools.product(LAYOUTS, (True, False), METHODS)
}
REFERENCES = {
    f"{tie(tied)}, {method}, {rank}": partial(reference, tied, method, rank)
    for tied, method, rank in itertools.product((True, False), METHODS, (0, 1))
}

if __name__ == "__main__":
    folder, chosen = Path(sys.argv[1]), sys.argv[2:] or list(CELLS)
    pool.alone(REFERENCES, folder)
    pool.run({name: CELLS[name] for name in chosen}, folder)
