"""Tiny Hugging Face models of every supported family, and batches of chats for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3", "gpt2")
MLP = {"gpt2": ("c_fc", "mlp.c_proj")}
NAMES = ("gate_proj", "up_proj", "down_proj")


def build(
    family: str = "qwen2",
    attn: str = "sdpa",
    *,
    tied: bool = True,
    layers: int = 4,
    dtype: torch.dtype = torch.float64,
    checkpointing: bool = False,
    **changes,
):
    """Return a random causal language model: 4 layers, hidden 32, vocabulary 64."""
    import transformers as t

    torch.manual_seed(0)
    common = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation=attn,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    gemma = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=6)
    if family == "gpt2":
        config = t.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=layers, n_head=4, n_positions=64, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=tied, attn_implementation=attn,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = t.GPT2LMHeadModel(config)
    elif family == "gemma2":
        model = t.Gemma2ForCausalLM(t.Gemma2Config(**{**common, **gemma, **changes}))
    elif family == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * (layers // 2)
        config = t.Gemma3TextConfig(**{**common, **gemma, "layer_types": kinds, **changes})
        model = t.Gemma3ForCausalLM(config)
    elif family == "mistral":
        model = t.MistralForCausalLM(t.MistralConfig(**{**common, "sliding_window": 6, **changes}))
    else:
        name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family]
        extra = {"head_dim": 8} if family == "qwen3" else {}
        config = getattr(t, f"{name}Config")(**{**common, **extra, **changes})
        model = getattr(t, f"{name}ForCausalLM")(config)
    model = model.to(dtype).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
        if not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()
    return model


def replace_norms(model):
    """Swap Hugging Face's RMSNorm, which rounds to float32, for torch's own."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                new = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                new.weight = child.weight
                setattr(parent, name, new)


def build_exact(**options):
    model = build(**options)
    replace_norms(model)
    return model


def chat_batch(length: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Return two chats of two questions and two answers; the second is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 64, (2, length), generator=generator)
    turns = torch.zeros(2, length, dtype=torch.int64)
    answers = torch.zeros(2, length, dtype=torch.bool)
    attention = torch.ones(2, length, dtype=torch.int64)
    for row, edges in enumerate(((8, 12, 18, length), (5, 9, 15, length - 4))):
        for turn, (start, stop) in enumerate(zip((0, *edges[:-1]), edges, strict=True)):
            turns[row, start:stop] = turn
            answers[row, start:stop] = turn % 2 == 1
        attention[row, edges[-1] :] = 0
        turns[row, edges[-1] :] = -1
        ids[row, edges[-1] :] = 0
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "answer_mask": answers,
        "turn_ids": turns,
    }


def grads(model) -> Tensor:
    """Return the gradients of all parameters as one vector; zeros where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def default_attn(family: str) -> str:
    """Return sdpa, or eager for Gemma-2, whose soft-capping transformers has in eager only."""
    return "eager" if family == "gemma2" else "sdpa"


families = pytest.mark.parametrize("family", FAMILIES)
with_attn = pytest.mark.parametrize(
    ("family", "attn"),
    [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if f != "gemma2" or a == "eager"],
)
