"""One FocuSFT step against the official code, and against plain fine-tuning.

    python benchmarks/focusft_step.py --official PATH --vocabulary 32000 [--checkpointing]

PATH is a checkout of the official repository (its commit c924c48 was measured); none of it is
here. Qwen2 of 12 layers, hidden 256, two rows of 512 tokens of which a quarter are answers, two
inner steps, the paper's rank and clipping. Both start from the same fast weights when gradients are
compared. The plain steps score the same answers without an inner loop: with the same mask here, and
as transformers does it, causal and with `labels`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from harness import Contenders, main
from torch import Tensor, nn

import metafocus as mf
from metafocus.training import plain_sft

NAMES = ("gate_proj", "up_proj", "down_proj")
FRACTION = 0.35


@dataclass(frozen=True)
class Size:
    """Of the model and of a batch."""

    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 704
    layers: int = 12
    heads: int = 8
    kv_heads: int = 4
    tied: bool = True
    rows: int = 2
    length: int = 512
    device: str = "cpu"


def build(size: Size, checkpointing: bool) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=size.tied,
        attn_implementation="sdpa",
    )
    with torch.device(size.device):
        model = transformers.Qwen2ForCausalLM(config)
    model = model.to(torch.get_default_dtype()).train()
    if torch.get_default_dtype() == torch.float64:
        exact_norms(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def exact_norms(model: nn.Module) -> None:
    """Exchange norms that round to float32, and so turn a last bit into 1e-8, for torch's own."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen2RMSNorm":
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)


def data(size: Size) -> dict[str, Tensor]:
    """Two turns a row; the answers are a quarter of the tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size.vocabulary, (size.rows, size.length), generator=generator)
    index = torch.arange(size.length).expand(size.rows, -1)
    turn = size.length // 2
    answer = index % turn >= turn * 3 // 4
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "answer_mask": answer,
        "turn_ids": index // turn * 2 + answer,
    }
    return {name: x.to(size.device) for name, x in batch.items()}


def gradient(model: nn.Module) -> Tensor:
    """The gradients of the trained parameters as one vector, which are then forgotten.

    In float32, where time and memory are measured, their norms: a copy of all would be the peak.
    """
    kept = [p for name, p in model.named_parameters() if "mem_inner" not in name]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in kept]
    if torch.get_default_dtype() == torch.float64:
        result = torch.cat([g.flatten() for g in found])
    else:
        result = torch.stack([g.norm() for g in found])
    model.zero_grad()
    return result


def official(size: Size, checkpointing: bool, path: str) -> tuple[Any, dict[str, Tensor]]:
    """The official step, and the fast weights that it starts from after `manual_seed(7)`."""
    sys.path.insert(0, path)
    from focusft import FocuSFTConfig, FocuSFTTrainer  # pyright: ignore

    model, batch = build(size, checkpointing), data(size)
    config = FocuSFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=size.device == "cpu",
        report_to=[],
        logging_steps=10**9,
        gradient_checkpointing=checkpointing,
        inner_gradient_checkpointing=checkpointing,
    )
    trainer = FocuSFTTrainer(config, model=model)
    trainer.state.global_step = 1  # Otherwise it logs at every call.
    inputs = {**batch, "loss_mask": batch["answer_mask"].long()}

    def step() -> Tensor:
        torch.manual_seed(7)
        trainer.compute_loss(model, inputs).backward()
        return gradient(model)

    torch.manual_seed(7)
    trainer.memory.reset_inner()
    start = {
        name.replace("mem_inner_A", "lora_A").replace("mem_inner_B", "lora_B"): p.detach().clone()
        for name, p in model.named_parameters()
        if "mem_inner" in name
    }
    return step, start


@dataclass(frozen=True)
class Given(mf.LoRA):
    """LoRA that starts from given fast weights."""

    start: Mapping[str, Tensor] | None = None

    def init(self, model: nn.Module, generator: torch.Generator | None = None) -> mf.Params:
        assert self.start is not None
        super().init(model, generator)
        return {name: x.clone() for name, x in self.start.items()}


def ours(size: Size, checkpointing: bool, start: Mapping[str, Tensor]) -> Any:
    model, batch = build(size, checkpointing), data(size)
    adapter = Given(mf.top_layers(FRACTION, NAMES), 32, 64.0, start=start)
    meta = mf.recipes.focusft(model, adapter=adapter)

    def step() -> Tensor:
        meta({}, mf.Episode(batch, batch))[0].backward()
        return gradient(model)

    return step


def plain(size: Size, checkpointing: bool) -> Any:
    model, batch = build(size, checkpointing), data(size)
    meta = plain_sft(model, mf.masks.context_bidirectional)

    def step() -> Tensor:
        meta({}, mf.Episode(batch, batch))[0].backward()
        return gradient(model)

    return step


def transformers_sft(size: Size, checkpointing: bool) -> Any:
    model, batch = build(size, checkpointing), data(size)
    labels = torch.where(batch["answer_mask"], batch["input_ids"], -100)

    def step() -> Tensor:
        model(input_ids=batch["input_ids"], labels=labels).loss.backward()
        return gradient(model)

    return step


def contenders(args: argparse.Namespace) -> Contenders:
    given = Size(vocabulary=args.vocabulary), args.checkpointing
    # One model at a time where memory is measured.
    if args.peak in ("plain SFT, same mask", "plain SFT, transformers"):
        make = plain if "mask" in args.peak else transformers_sft
        return {args.peak: make(*given)}
    step, start = official(*given, args.official)
    if args.peak == "official":
        return {"official": step}
    if args.peak:
        del step
        return {"metafocus": ours(*given, start)}
    return {
        "official": step,
        "metafocus": ours(*given, start),
        "plain SFT, same mask": plain(*given),
        "plain SFT, transformers": transformers_sft(*given),
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--official", required=True, help="checkout of the official code")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--checkpointing", action="store_true")


if __name__ == "__main__":
    # Compared in float64: the same products, summed in another order.
    main(__file__, contenders, reference="official", tolerance=1e-11, options=options)
