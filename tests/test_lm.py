"""The language-model loss on every supported family, by every way of running it."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from models import (
    MLP,
    NAMES,
    build,
    chat_batch,
    default_attn,
    families,
    grads,
    relative,
    with_attn,
)

import metafocus as mf
from metafocus import masks
from metafocus.autodiff.safe_operators.swapping import differentiable_twice
from metafocus.lm.hf import heads
from metafocus.lm.hf.checkpointing import checkpoint_layer
from metafocus.masks.spans import windowed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # torch's fused CPU attention has no batching rule and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def adapter_for(family, fraction=0.5):
    return mf.LoRA(mf.top_layers(fraction, MLP.get(family, NAMES)), 4, 8.0)


def fast_for(model, adapter):
    """Fast weights whose B is not zero, so that both halves of LoRA act."""
    generator = torch.Generator().manual_seed(5)
    fast = adapter.init(model, generator)
    return {
        k: v + 0.02 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for k, v in fast.items()
    }


def windows(model, spans):
    """Return the spans that each layer should use, from the configuration alone."""
    config = model.config
    width = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    count = config.num_hidden_layers
    if width is None:
        return [spans] * count
    if kinds is None:
        return [windowed(spans, width)] * count
    return [windowed(spans, width) if k == "sliding_attention" else spans for k in kinds]


@with_attn
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_equals_a_naive_one(family, tied, attn):
    """Logits under per-layer masks forced by hooks, and a log-softmax token by token."""
    batch = chat_batch()
    model = build(family, attn, tied=tied)
    adapter = adapter_for(family)
    fast = fast_for(model, adapter)
    loss = mf.lm_loss(model, adapter=adapter, mask=masks.context_bidirectional)
    got = loss(fast, {}, batch)

    spans = masks.context_bidirectional(batch)
    layers = next(
        m for n, m in model.named_modules() if n.endswith((".layers", ".h")) and len(m) == 4
    )

    def force(own):
        def hook(module, args, kwargs):
            mask = own.dense(model.dtype if attn == "eager" else None)
            if "attention_mask" in kwargs:
                return args, {**kwargs, "attention_mask": mask}
            return (args[0], args[1], mask, *args[3:]), kwargs

        return hook

    handles = [
        layer.register_forward_pre_hook(force(own), with_kwargs=True)
        for layer, own in zip(layers, windows(model, spans), strict=True)
    ]
    with adapter.bind(model, fast):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    for handle in handles:
        handle.remove()
    total = [
        -F.log_softmax(logits[b, t - 1], -1)[batch["input_ids"][b, t]]
        for b in range(2)
        for t in range(1, logits.shape[1])
        if batch["answer_mask"][b, t]
    ]
    # The same float64 arithmetic; the positions of left-aligned rows are those of the model.
    assert got.item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-12)


def from_all_logits(monkeypatch, run):
    """Return `run()` with the head applied to every position, as the model itself does."""
    with monkeypatch.context() as patch:
        patch.setattr("metafocus.lm.loss.logit_head_of", lambda model: None)
        return run()


@families
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_head_on_scored_positions_equals_all_logits(family, tied, checkpointing, monkeypatch):
    """Value, gradients by fast and slow weights, and the hypergradient of two inner steps."""
    batch = chat_batch()
    model = build(family, default_attn(family), tied=tied, checkpointing=checkpointing)
    adapter = adapter_for(family)
    loss = mf.lm_loss(model, adapter=adapter, mask=masks.context_bidirectional)
    fast = {k: v.requires_grad_() for k, v in fast_for(model, adapter).items()}
    slow = dict(model.named_parameters())
    problem = mf.Problem(
        loss, loss, init=lambda _, support: {k: v.detach() for k, v in fast.items()}
    )
    meta = mf.bilevel(problem, solver=mf.SGD(0.5, steps=2), estimator=mf.Unrolled(recompute=True))

    def run():
        value = loss(fast, slow, batch)
        first = torch.autograd.grad(value, [*fast.values(), *slow.values()])
        outer, _ = meta(slow, mf.Episode(batch, batch))
        second = torch.autograd.grad(outer, list(slow.values()))
        flat = [torch.cat([g.flatten() for g in found]) for found in (first, second)]
        return value.item(), *flat

    got = run()
    assert None not in heads.install(model.get_output_embeddings()).logit_heads.values()
    expected = from_all_logits(monkeypatch, run)
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    # float64 in another order; inside the models float32 norms round the hidden gradients, in the
    # second derivative twice.
    assert relative(got[1], expected[1]) < (1e-12 if family == "gpt2" else 1e-9)
    assert relative(got[2], expected[2]) < 1e-6


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fast_weights_on_the_head(tied, monkeypatch):
    """The head is called, a few rows at a time, with its fast weights and swapped weights."""
    monkeypatch.setattr(heads, "_ROWS", 5)
    batch = chat_batch()
    model = build(tied=tied)
    adapter = mf.LoRA(mf.matching(r"lm_head|layers\.3\.mlp\.up_proj"), 2, 4.0)
    loss = mf.lm_loss(model, adapter=adapter, mask=masks.causal)
    fast = fast_for(model, adapter)
    assert "lm_head.lora_A" in fast
    slow = {k: 1.1 * v.detach() for k, v in model.named_parameters()}

    def run():
        def inner(f, s):
            return loss(f, s, batch)

        first = torch.func.grad(inner, (0, 1))(fast, slow)
        product = torch.func.jvp(torch.func.grad(inner), (fast, slow), (fast, slow))[1]

        def size(f):
            return sum((g * g).sum() for g in torch.func.grad(inner)(f, slow).values())

        second = torch.func.grad(size)(fast)
        leaves = {k: v.clone().requires_grad_() for k, v in fast.items()}
        tape = torch.autograd.grad(inner(leaves, slow), list(leaves.values()))
        flat = [*first[0].values(), *first[1].values(), *product.values(), *second.values(), *tape]
        return torch.cat([g.flatten() for g in flat])

    composed = differentiable_twice(run)
    assert relative(composed(), from_all_logits(monkeypatch, composed)) < 1e-6


@with_attn
def test_checkpointing_is_exact(family, attn):
    """First and second order, with swapped slow weights and bound fast weights."""
    batch = chat_batch()

    def gradients(checkpointing):
        model = build(family, attn, checkpointing=checkpointing)
        adapter = adapter_for(family)
        loss = mf.lm_loss(model, adapter=adapter, mask=masks.causal)
        fast = {k: v.requires_grad_() for k, v in fast_for(model, adapter).items()}
        slow = dict(model.named_parameters())
        value = loss(fast, slow, batch)
        first = torch.autograd.grad(value, list(fast.values()))
        problem = mf.Problem(
            loss, loss, init=lambda _, support: {k: v.detach() for k, v in fast.items()}
        )
        meta = mf.bilevel(
            problem, solver=mf.SGD(0.5, steps=2), estimator=mf.Unrolled(recompute=True)
        )
        meta(slow, mf.Episode(batch, batch))[0].backward()
        return torch.cat([g.flatten() for g in first]), grads(model)

    plain, checkpointed = gradients(False), gradients(True)
    assert plain[0].norm() > 1e-4
    assert relative(checkpointed[0], plain[0]) < 1e-12
    # Second derivatives pass Hugging Face's float32 norms and softmax: rounding near 6e-8,
    # which recomputation repeats in another order.
    assert relative(checkpointed[1], plain[1]) < 1e-6


def test_huggingface_checkpointing_alone_would_be_wrong():
    """Why the routing exists: the plain checkpoint loses the swapped weights, or raises."""
    model = build(checkpointing=True)
    slow = {k: (1.5 * v.detach()).requires_grad_() for k, v in model.named_parameters()}
    ids = chat_batch()["input_ids"]

    def loss():
        out = torch.func.functional_call(model, slow, (), {"input_ids": ids, "use_cache": False})
        return out.logits.square().mean()

    name = "model.layers.1.mlp.up_proj.weight"
    wrong = torch.autograd.grad(loss(), slow[name], allow_unused=True)[0]
    right_model = build()
    out = torch.func.functional_call(right_model, slow, (), {"input_ids": ids, "use_cache": False})
    right = torch.autograd.grad(out.logits.square().mean(), slow[name])[0]
    assert wrong is None or relative(wrong, right) > 0.5


def test_hooks_of_a_layer_run_outside_of_what_is_recomputed():
    """Older transformers checkpoint the whole call; FSDP's hooks in it exchange parameters."""
    model = build(checkpointing=True)
    layer = torch.nn.Linear(32, 32).double()
    shard, gathered = layer.weight, torch.nn.Parameter(2 * layer.weight.detach())
    calls = []

    def gather(module, args):
        calls.append("gather")
        module.weight = gathered

    def release(module, args, out):
        calls.append("release")
        module.weight = shard

    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(release)
    x = torch.randn(3, 32, dtype=torch.float64)
    out = checkpoint_layer(model, functools.partial(layer.__call__), x)
    assert relative(out, torch.nn.functional.linear(x, gathered, layer.bias)) < 1e-14
    found = torch.autograd.grad(out.sum(), gathered)[0]
    assert relative(found, x.sum(0).expand(32, 32)) < 1e-14
    assert calls == ["gather", "release"]
    assert "forward" not in vars(layer) and layer.weight is shard
    # A forward that another library put in place is kept.
    layer.forward = own = functools.partial(type(layer).forward, layer)
    checkpoint_layer(model, functools.partial(layer.__call__), x)
    assert layer.forward is own


def test_routing_restores_everything():
    model = build(checkpointing=True)
    layer = model.model.layers[0]
    before = layer._gradient_checkpointing_func
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    assert hooks
    loss = mf.lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal)
    fast = fast_for(model, loss.adapter)
    torch.func.grad(lambda f: loss(f, {}, chat_batch()))(fast)
    with pytest.raises(mf.errors.ProblemError):
        loss({}, {}, chat_batch())
    assert layer._gradient_checkpointing_func is before
    assert dict(model.get_input_embeddings()._forward_hooks) == hooks


@families
def test_transforms(family):
    """func.grad, grad of grad, vmap over tasks and jvp of grad equal the tape."""
    model = build(family, default_attn(family))
    adapter = adapter_for(family, 0.75)
    loss = mf.lm_loss(model, adapter=adapter, mask=masks.context_bidirectional)
    fast = fast_for(model, adapter)
    problem = mf.Problem(loss, loss)
    meta = mf.bilevel(problem, solver=mf.SGD(0.5, steps=2), estimator=mf.Unrolled(recompute=True))
    model.requires_grad_(False)
    batches = [chat_batch(seed=s) for s in (0, 1)]
    stacked = {k: torch.stack([b[k] for b in batches]) for k in batches[0]}

    loop = [mf.hypergrad(meta)(fast, mf.Episode(b, b))[0] for b in batches]
    func = [torch.func.grad(lambda f, b=b: meta(f, mf.Episode(b, b))[0])(fast) for b in batches]
    many = torch.func.vmap(lambda b: torch.func.grad(lambda f: meta(f, mf.Episode(b, b))[0])(fast))(
        stacked
    )
    for k in fast:
        for i in range(2):
            # The float32 norms and softmax inside the models round at 6e-8.
            assert relative(func[i][k], loop[i][k]) < 1e-6
            assert relative(many[k][i], loop[i][k]) < 1e-6


def test_token_policies():
    batch = chat_batch()
    answers, context = mf.answer_tokens(batch), mf.context_tokens(batch)
    valid = batch["attention_mask"].bool()
    assert torch.equal(mf.all_tokens(batch), valid)
    assert torch.equal(answers, batch["answer_mask"])
    assert torch.equal(answers | context, valid) and not (answers & context).any()


def test_token_losses_add_up():
    """The loss over all tokens is the weighted mean of those over answers and context."""
    batch = chat_batch()
    model = build()
    adapter = adapter_for("qwen2")
    fast = fast_for(model, adapter)

    def total(tokens):
        loss = mf.lm_loss(model, adapter=adapter, mask=masks.causal, tokens=tokens)
        scored = (tokens(batch) & (masks.positions(batch) > 0)).sum()
        return loss(fast, {}, batch) * scored

    parts = total(mf.answer_tokens) + total(mf.context_tokens)
    assert total(mf.all_tokens).item() == pytest.approx(parts.item(), rel=1e-12)


@families
def test_packed_documents_do_not_see_each_other(family):
    """Two chats in one row give the token-weighted mean of their own losses."""
    one, two = chat_batch(seed=1), chat_batch(seed=2)
    model = build(family, default_attn(family))
    adapter = adapter_for(family)
    fast = fast_for(model, adapter)
    loss = mf.lm_loss(model, adapter=adapter, mask=masks.context_bidirectional)
    rows = [{k: v[:1] for k, v in b.items()} for b in (one, two)]
    packed = {k: torch.cat([r[k] for r in rows], 1) for k in rows[0]}
    size = rows[0]["input_ids"].shape[1]
    packed["document_ids"] = torch.arange(2).repeat_interleave(size)[None]
    separate = [loss(fast, {}, r) for r in rows]
    assert rows[0]["answer_mask"].sum() == rows[1]["answer_mask"].sum()
    # Rotary tables are computed in float32 from positions, the same in both forms.
    assert loss(fast, {}, packed).item() == pytest.approx(
        torch.stack(separate).mean().item(), rel=1e-6
    )


@families
def test_left_padding_equals_right_padding(family):
    batch = {k: v[1:] for k, v in chat_batch().items()}
    left = {k: v.roll(4, 1) for k, v in batch.items()}
    model = build(family, default_attn(family))
    adapter = adapter_for(family)
    fast = fast_for(model, adapter)
    loss = mf.lm_loss(model, adapter=adapter, mask=masks.context_bidirectional)
    expected = loss(fast, {}, batch).item()
    assert loss(fast, {}, left).item() == pytest.approx(expected, rel=1e-6)


def test_no_scored_token_gives_zero_loss_and_gradient():
    batch = chat_batch()
    batch["answer_mask"] = torch.zeros_like(batch["answer_mask"])
    model = build()
    loss = mf.lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal)
    value = loss(fast_for(model, loss.adapter), {}, batch)
    value.backward()
    assert value.item() == 0 and grads(model).norm() == 0


@pytest.mark.parametrize("how", ["tape", "func", "vmap"])
def test_no_scored_token_in_every_form(how):
    """Zero gradients that are tensors, also of fast weights, also in the second derivative."""
    batch = chat_batch()
    batch["answer_mask"] = torch.zeros_like(batch["answer_mask"])
    model = build()
    loss = mf.lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal)
    fast = {k: v.requires_grad_() for k, v in fast_for(model, loss.adapter).items()}
    if how == "tape":
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            value = loss(fast, dict(model.named_parameters()), batch)
        wanted = [*fast.values(), *model.parameters()]
        found = torch.autograd.grad(value, wanted, create_graph=True)
        found += torch.autograd.grad(sum((g * g).sum() for g in found), wanted)
    elif how == "func":
        found = torch.func.grad(lambda f: loss(f, {}, batch))(fast).values()
    else:
        batches = {k: v[None] for k, v in batch.items()}
        found = torch.func.vmap(lambda b: torch.func.grad(lambda f: loss(f, {}, b))(fast))(batches)
        found = found.values()
    assert not any(g.any() for g in found)


def test_losses_with_other_tokens_share_a_prepared_batch():
    """The masks are kept, the rows are those of each loss."""
    batch = chat_batch()
    model = build()
    answers, context = (
        mf.lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal, tokens=tokens)
        for tokens in (mf.answer_tokens, mf.context_tokens)
    )
    fast = fast_for(model, answers.adapter)
    prepared = answers.prepare(batch)
    again = context.prepare(prepared)
    assert again["model_inputs"] is prepared["model_inputs"]
    assert context(fast, {}, prepared).item() == context(fast, {}, batch).item()
    assert context(fast, {}, again).item() == context(fast, {}, batch).item()
    assert answers(fast, {}, again).item() == answers(fast, {}, batch).item()


def test_compiled_gradient():
    """Checked before: on scored rows; not checked yet: on all logits. Both without a break."""
    batch = chat_batch()
    for ready in (True, False):
        torch._dynamo.reset()
        model = build(attn="eager").requires_grad_(False)
        adapter = adapter_for("qwen2")
        loss = mf.lm_loss(model, adapter=adapter, mask=masks.causal)
        fast = fast_for(model, adapter)
        given = loss.prepare(batch) if ready else batch
        step = torch.func.grad(lambda f, b, loss=loss: loss(f, {}, b))
        compiled = torch.compile(
            lambda f, b, step=step: step(f, b), backend="aot_eager", fullgraph=True
        )
        got = compiled(fast, given)
        expected = step(fast, batch)
        for k in fast:
            assert relative(got[k], expected[k]) < 1e-6


def test_float32_model_and_bfloat16_autocast():
    batch = chat_batch()
    model = build(dtype=torch.float32)
    adapter = adapter_for("qwen2")
    meta = mf.recipes.focusft(model, adapter=adapter, estimator=mf.Unrolled(recompute=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in aux.params.values())
    recomputed = grads(model)
    model = build(dtype=torch.float32)
    meta = mf.recipes.focusft(model, adapter=adapter, estimator=mf.Unrolled())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        meta({}, mf.Episode(batch, batch))[0].backward()
    # bfloat16 keeps 8 bits; both forms round the same products, sums differ in order.
    assert relative(recomputed, grads(model)) < 2e-2


def test_refusals():
    batch = chat_batch()
    model = build()
    adapter = adapter_for("qwen2")
    fast = fast_for(model, adapter)
    with pytest.raises(
        mf.errors.ProblemError, match=r"model must be a Hugging Face model, got Linear"
    ):
        mf.lm_loss(torch.nn.Linear(1, 1), adapter=adapter, mask=masks.causal)
    loss = mf.lm_loss(model, adapter=adapter, mask=masks.context_bidirectional)
    for key in ("input_ids", "answer_mask", "turn_ids"):
        part = {k: v for k, v in batch.items() if k != key}
        with pytest.raises(mf.errors.MetafocusError, match=key):
            loss(fast, {}, part)
    model.config._attn_implementation = "flash_attention_2"
    # Dropout keeps a model from attending to spans.
    model.config.attention_dropout = 0.1
    with pytest.raises(mf.errors.ProblemError, match=r"'flash_attention_2' takes no explicit mask"):
        loss(fast, {}, batch)


def test_prepare_is_shared_and_changes_nothing():
    batch = chat_batch()
    model = build()
    adapter = adapter_for("qwen2")
    fast = fast_for(model, adapter)
    loss = mf.lm_loss(model, adapter=adapter, mask=masks.context_bidirectional)
    prepared = loss.prepare(batch)
    assert loss.prepare(prepared) is prepared and "model_inputs" not in batch
    assert loss(fast, {}, prepared).item() == loss(fast, {}, batch).item()
