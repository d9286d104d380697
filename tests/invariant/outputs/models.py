"""FocuSFT and its relatives, the loss of a language model and the kernels of attention."""

from __future__ import annotations

import torch
from outputs.networks import normal
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import metafocus as mf
from metafocus import masks

MLP = ("gate_proj", "up_proj", "down_proj")
ADAPTER = mf.LoRA(mf.top_layers(0.5, MLP), rank=2, alpha=5.0)
QUERIES = mf.LoRA(mf.top_layers(1.0, ("q_proj",)), rank=2, alpha=5.0)
SOLVER = mf.SGD(0.7, steps=2, clip=mf.clip_per_tensor(1.0))
POLICIES = ("causal", "full", "prefix_lm", "context_bidirectional")


def model_of(dtype: torch.dtype, attn: str = "sdpa", *, checkpointing: int = 0, **changes):
    """A tiny model; `checkpointing` is how often its embeddings are made to require grad."""
    mf.attention.register()
    torch.manual_seed(0)
    config = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True, attn_implementation=attn, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**{**config, **changes})).to(dtype).train()
    if checkpointing:
        # The second is its older name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
        # Transformers from 5.23 on does so by itself.
        for _ in range(checkpointing - bool(getattr(model, "_require_grads_hooks", None))):
            model.enable_input_require_grads()
    return model


def batch_of(length: int = 24) -> dict[str, Tensor]:
    """Two chats of two questions and two answers; the second is padded on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (2, length), generator=generator)
    turns = torch.full((2, length), -1)
    answers = torch.zeros(2, length, dtype=torch.bool)
    for row, edges in enumerate(((8, 12, 18, length), (5, 9, 15, length - 4))):
        for turn, (start, stop) in enumerate(zip((0, *edges[:-1]), edges, strict=True)):
            turns[row, start:stop] = turn
            answers[row, start:stop] = turn % 2 == 1
    valid = turns >= 0
    return {
        "input_ids": ids * valid,
        "attention_mask": valid.long(),
        "answer_mask": answers,
        "turn_ids": turns,
        "needle_mask": (turns == 0) & (torch.arange(length) >= 2) & (torch.arange(length) < 5),
    }


def stepped(model, meta, batch, steps: int = 2):
    """A few steps of gradient descent on a meta loss of the model's own parameters."""
    told = []
    for _ in range(steps):
        model.zero_grad()
        loss, aux = meta({}, mf.Episode(batch, batch))
        loss.backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        told.append({"loss": loss, "grads": grads, "inner": aux.inner_losses,
                     "adapted": aux.params})  # fmt: skip
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    return told


# --- recipes -------------------------------------------------------------------------------------


def focusft(estimator=None, attn="sdpa", *, checkpointing=0, **settings):
    def run(dtype):
        model = model_of(dtype, attn, checkpointing=checkpointing)
        chosen = {"adapter": ADAPTER, "solver": SOLVER, "estimator": estimator, **settings}
        return stepped(model, mf.recipes.focusft(model, **chosen), batch_of())

    return run


def explicit(dtype):
    """The hypergradient of explicit parameters, with separate batches for the two levels."""
    model, batch = model_of(dtype), batch_of()
    meta = mf.recipes.focusft(
        model, adapter=ADAPTER, solver=SOLVER, estimator=mf.Implicit(mf.CG(2))
    )
    outer = {k: v.detach() for k, v in model.named_parameters()}
    query = {k: v.flip(0) for k, v in batch.items()}
    grads, (loss, aux) = mf.hypergrad(meta)(outer, mf.Episode(batch, query))
    return {"loss": loss, "grads": grads, "adapted": aux.params}


def qttt(dtype):
    model = model_of(dtype)
    meta = mf.recipes.qttt(model, adapter=QUERIES, solver=mf.SGD(0.1, steps=3))
    return stepped(model, meta, batch_of())


def ttt_e2e(dtype):
    model = model_of(dtype)
    meta = mf.recipes.ttt_e2e(model, chunk=7, window=10, solver=mf.SGD(0.5, steps=1))
    return stepped(model, meta, {k: v[:1] for k, v in batch_of().items()})


def language_model_loss(dtype):
    """The loss alone, with each mask and each choice of tokens."""
    found = {}
    for policy in POLICIES:
        for tokens in (mf.answer_tokens, mf.context_tokens, mf.all_tokens):
            model = model_of(dtype)
            loss = mf.lm_loss(model, adapter=ADAPTER, mask=getattr(masks, policy), tokens=tokens)
            fast = ADAPTER.init(model)
            value = loss(fast, {}, batch_of())
            value.backward()
            grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
            name = f"{policy}, {tokens.__name__}"
            found[name] = {"loss": value, "grads": grads, "start": fast}
    return found


def attention(dtype):
    """The kernels, their gradients, and the gradient of these where there is one."""
    spans, shape = masks.context_bidirectional(batch_of(80)), (2, 4, 80, 8)
    found = {}
    for backend in ("dense", "tiled", "flash", "auto"):
        q, k, v = (normal(dtype, i, *shape).requires_grad_() for i in range(3))
        out = mf.attention.span_attention(q, k, v, spans, backend=backend)
        weight = normal(dtype, 3, *shape)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v), create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))
        found[backend] = {"out": out, "grads": dict(zip("qkv", grads, strict=True)),
                          "again": dict(zip("qkv", again, strict=True))}  # fmt: skip
    return found


FORWARD, RECOMPUTE = mf.Unrolled(hvp=mf.hvp_forward), mf.Unrolled(recompute=True)
ATTENTIONS = ("eager", "sdpa", "metafocus")
OUTPUTS = {
    **{f"focusft, {x}": focusft(attn=x) for x in ATTENTIONS},
    **{f"focusft, second order, {x}": focusft(mf.Unrolled(), x) for x in ATTENTIONS},
    "focusft, metafocus_tiled": focusft(RECOMPUTE, "metafocus_tiled"),
    "focusft, recompute": focusft(RECOMPUTE),
    "focusft, hvp_forward": focusft(FORWARD),
    "focusft, truncated": focusft(mf.Unrolled(last=1)),
    "focusft, per example": focusft(per_example=True),
    "focusft, per example, second order": focusft(mf.Unrolled(), per_example=True),
    "focusft, checkpointing": focusft(checkpointing=1),
    "focusft, checkpointing, second order": focusft(RECOMPUTE, checkpointing=1),
    "focusft, checkpointing, two hooks": focusft(checkpointing=2),
    "focusft, context tokens": focusft(inner_tokens=mf.context_tokens, mask=masks.causal),
    "focusft, full weights": focusft(
        mf.Unrolled(), adapter=mf.FullWeights(mf.top_layers(0.25, ("mlp",)))
    ),
    "focusft, explicit, implicit": explicit,
    "qttt": qttt,
    "ttt-e2e": ttt_e2e,
    "language model loss": language_model_loss,
    "attention": attention,
}
