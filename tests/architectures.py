"""Tiny models of the architectures in transformers, and a naive oracle of a meta-gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

import metafocus as mf

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Experts and recurrent layers.
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "residual_dropout": 0.0,
    "dropout": 0.0,
    "input_jitter_noise": 0.0,
    "router_jitter_noise": 0.0,
    "activation_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
# What a configuration needs besides.
OWN: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "deepseek_v3": {
        "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        "num_key_value_heads": 4, "head_dim": 8,
    },
    "deepseek_v2": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "head_dim": 8,
    },
    "glm4_moe": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "qwen3_5": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
    },
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"],
    },
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
    "falcon_h1": {
        "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "xglm": {"ffn_dim": 48, "attention_heads": 4, "num_layers": 2, "d_model": 32},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "cohere2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "falcon": {"head_dim": None},
    "minicpm3": {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                 "v_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8},
    "phimoe": {"sliding_window": None},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"num_experts": 4},
}  # fmt: skip

# Attention takes any mask.
MASKED = (
    "apertus arcee bitnet biogpt codegen cohere cohere2 deepseek_v2 deepseek_v3 doge ernie4_5 "
    "exaone4 falcon flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode "
    "gpt_neox gpt_oss gptj granite granitemoe helium hunyuan_v1_dense jetmoe llama minicpm3 "
    "ministral mistral mixtral mpt nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 "
    "phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma"
).split()
# The model makes its causal mask itself.
CAUSAL = (
    "bamba bloom falcon_h1 falcon_mamba gpt_neo granitemoehybrid jamba lfm2 mamba mamba2 minimax "
    "qwen3_5 qwen3_next recurrent_gemma xlstm"
).split()


def build(name: str, attention: str = "sdpa") -> Any:
    """Return a model of two layers in float64."""
    kind = type(AutoConfig.for_model(name).get_text_config())
    known = kind()
    given = {k: v for k, v in SIZES.items() if hasattr(known, k)} | OWN.get(name, {})
    config = kind(**{k: v for k, v in given.items() if v is not None})
    torch.manual_seed(0)
    # Grouped products of experts have no float64.
    options = {"experts_implementation": "eager"}
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **options)
    except ValueError:  # it has eager attention only
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **options)
    return model.double().eval()


def batch(*, packed: bool = False) -> dict[str, torch.Tensor]:
    """Return two chats of sixteen tokens, the second one padded; packed: of two documents."""
    generator = torch.Generator().manual_seed(1)
    place = torch.arange(16).expand(2, 16)
    made = {
        "input_ids": torch.randint(3, 60, (2, 16), generator=generator),
        "attention_mask": torch.ones(2, 16, dtype=torch.int64),
        "turn_ids": place // 4,
        "answer_mask": (place // 4) % 2 == 1,
    }
    if packed:
        made["document_ids"] = (place >= 8).long()
    else:
        made["attention_mask"][1, 13:] = 0
        made["answer_mask"][1, 13:] = False
        made["turn_ids"][1, 13:] = -1
        made["turn_ids"] = made["turn_ids"].clone()
    return made


RATE = 0.3
ADAPTER = mf.LoRA(mf.all_linear, rank=2)


def generator() -> torch.Generator:
    """Return what draws the fast weights."""
    return torch.Generator().manual_seed(3)


def masks_of(model: Any, data: Any, mask: Any) -> Any:
    """Return what an eager model takes: a dense mask, one for each type of layer, or padding."""
    if mask is None:
        return data["attention_mask"]
    config = model.config.get_text_config()
    seen = mask(data).dense()
    seen = seen | ~seen.any(-1, keepdim=True)
    place = torch.arange(seen.shape[-1])
    window = getattr(config, "sliding_window", None) or seen.shape[-1]
    near = seen & (place[None] > place[:, None] - window)
    least = torch.finfo(torch.float32).min
    full, narrow = (torch.where(x, 0.0, least).double() for x in (seen, near))
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds:
        return {"full_attention": full, "sliding_attention": narrow}
    return full if kinds else narrow


def oracle(model: Any, data: Any, mask: Any, second: bool) -> dict[str, torch.Tensor]:
    """Return the meta-gradient: W + scale B A by functional_call, one eager step, a dense mask.

    Without a mask the model makes its own from the padding.
    """
    slow = dict(model.named_parameters())
    fast = {k: v.clone().requires_grad_() for k, v in ADAPTER.init(model, generator()).items()}
    modules = dict(model.named_modules())
    dense = masks_of(model, data, mask)

    def loss(fast: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = dict(slow)
        for name in {key.rpartition(".")[0] for key in fast}:
            update = ADAPTER.scale * fast[f"{name}.lora_B"] @ fast[f"{name}.lora_A"]
            transposed = type(modules[name]).__name__ == "Conv1D"
            weights[f"{name}.weight"] = slow[f"{name}.weight"] + (
                update.T if transposed else update
            )
        inputs = {
            "input_ids": data["input_ids"],
            "attention_mask": dense,
            "use_cache": False,
        }
        if mask is not None:
            inputs["position_ids"] = mf.masks.positions(data)
        logits = functional_call(model, weights, (), inputs, tie_weights=True).logits
        scored = data["answer_mask"][:, 1:].clone()
        if "document_ids" in data:
            scored &= data["document_ids"][:, 1:] == data["document_ids"][:, :-1]
        return torch.nn.functional.cross_entropy(
            logits[:, :-1][scored], data["input_ids"][:, 1:][scored]
        )

    gradients = torch.autograd.grad(loss(fast), list(fast.values()), create_graph=second)
    adapted = {k: v - RATE * g for (k, v), g in zip(fast.items(), gradients, strict=True)}
    found = torch.autograd.grad(loss(adapted), list(slow.values()), allow_unused=True)
    return {
        k: torch.zeros_like(v) if g is None else g
        for (k, v), g in zip(slow.items(), found, strict=True)
    }


def ours(model: Any, data: Any, mask: Any, second: bool) -> dict[str, torch.Tensor]:
    """Return the meta-gradient of `recipes.focusft`."""
    meta = mf.recipes.focusft(
        model,
        adapter=ADAPTER,
        mask=mask,
        solver=mf.SGD(RATE, 1),
        estimator=mf.Unrolled() if second else mf.FirstOrder(),
        generator=generator(),
    )
    model.zero_grad()
    meta({}, mf.Episode(data, data))[0].backward()
    return {
        k: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for k, p in model.named_parameters()
    }


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of the gradient."""
    size = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[k] - expected[k]).abs().max()) for k in expected) / size


def errors(name: str) -> dict[str, float | None]:
    """Return the relative errors of an architecture; None where packing is refused."""
    own = name in CAUSAL
    reference, model = build(name, "eager"), build(name)
    mask = mf.masks.causal if own else mf.masks.context_bidirectional
    theirs = None if own else mask
    found: dict[str, float | None] = {}
    for what, second in (("first order", False), ("second order", True), ("packing", True)):
        data = batch(packed=what == "packing")
        if own and what == "packing":
            found[what] = None
            continue
        found[what] = error(
            ours(model, data, mask, second), oracle(reference, data, theirs, second)
        )
    if not model.supports_gradient_checkpointing:
        return {**found, "checkpointing": None}
    model.train()
    model.gradient_checkpointing_enable()
    data = batch()
    found["checkpointing"] = error(
        ours(model, data, mask, True), oracle(reference, data, theirs, True)
    )
    return found


COLUMNS = ("first order", "second order", "checkpointing", "packing")


def line(name: str) -> str:
    """Return the line of docs/architectures.md about an architecture."""
    found = errors(name)
    cells = ["-" if found[c] is None else f"{found[c]:.0e}" for c in COLUMNS]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for architecture in (*MASKED, *CAUSAL):
        print(line(architecture), flush=True)
