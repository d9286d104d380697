"""One FocuSFT step, of the official code and of this library, and plain steps beside them.

What `benchmarks/rivals` races on a CPU as W6, and `focusft_gpu.py` on a GPU. The official code
comes from a checkout of its repository (its commit c924c48 was measured); none of it is here. The
plain steps score the same answers without an inner loop: with the same mask here, and as
transformers does it, causal and with `labels`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import metafocus as mf

NAMES = ("gate_proj", "up_proj", "down_proj")
FRACTION = 0.35
RANK = 32


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


def start(size: Size) -> dict[str, Tensor]:
    """Fast weights to start from, of both."""
    model = build(size, checkpointing=False)
    return mf.LoRA(mf.top_layers(FRACTION, NAMES), RANK, 2.0 * RANK).init(model)


def official(
    size: Size, checkpointing: bool, path: str, start: Mapping[str, Tensor], rank: int = RANK
) -> Any:
    """The official step, started from given fast weights instead of random ones."""
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
        inner_rank=rank,
        inner_alpha=2.0 * rank,
    )
    trainer = FocuSFTTrainer(config, model=model)
    trainer.state.global_step = 1  # Otherwise it logs at every call.
    inputs = {**batch, "loss_mask": batch["answer_mask"].long()}
    fast = {
        name.replace("mem_inner_A", "lora_A").replace("mem_inner_B", "lora_B"): p
        for name, p in model.named_parameters()
        if "mem_inner" in name
    }

    @torch.no_grad()
    def reset() -> None:
        for name, p in fast.items():
            p.copy_(start[name])

    trainer.memory.reset_inner = reset

    def step() -> Tensor:
        trainer.compute_loss(model, inputs).backward()
        return gradient(model)

    return step


@dataclass(frozen=True)
class Given(mf.LoRA):
    """LoRA that starts from given fast weights."""

    start: Mapping[str, Tensor] | None = None

    def init(self, model: nn.Module, generator: torch.Generator | None = None) -> mf.Params:
        assert self.start is not None
        super().init(model, generator)
        return {name: x.clone() for name, x in self.start.items()}


def ours(size: Size, checkpointing: bool, start: Mapping[str, Tensor], rank: int = RANK) -> Any:
    model, batch = build(size, checkpointing), data(size)
    adapter = Given(mf.top_layers(FRACTION, NAMES), rank, 2.0 * rank, start=start)
    meta = mf.recipes.focusft(model, adapter=adapter)

    def step() -> Tensor:
        meta({}, mf.Episode(batch, batch))[0].backward()
        return gradient(model)

    return step


def plain(size: Size, checkpointing: bool) -> Any:
    model, batch = build(size, checkpointing), data(size)
    nothing, mask = mf.NoAdapter(), mf.masks.context_bidirectional
    meta = mf.recipes.focusft(model, adapter=nothing, mask=mask)

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


def flop(size: Size, name: str, rank: int = RANK, steps: int = 2, last: float = 1.0) -> float:
    """Products of one step, each two operations: forward 1, to the inputs 1, to the weights 1.

    Args:
        last: the part of positions at which the last layer has queries and an MLP.
    """
    kv = 2 * size.hidden * (size.hidden * size.kv_heads // size.heads)
    # Half of the pairs of queries and keys, about, of scores and of values.
    scored = 2 * size.hidden**2 + size.length * size.hidden + 3 * size.hidden * size.intermediate
    fast = size.layers - int(size.layers * (1 - FRACTION) + 1e-9)
    # Layers, with the last one as a part of one.
    layers, adapted = (n * kv + (n - 1 + last) * scored for n in (size.layers, fast))
    lora = 3 * rank * (size.hidden + size.intermediate) * (fast - 1 + last)
    per_token = 3 * layers
    if not name.startswith("plain"):
        per_token += steps * (2 * adapted + 3 * lora) + 2 * lora
    # The head, where the next token is scored: a quarter.
    head = size.vocabulary * size.hidden / 4
    per_token += head * (3 if name.startswith("plain") else 3 + 2 * steps)
    return 2 * per_token * size.rows * size.length
