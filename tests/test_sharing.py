"""Layers below the fast weights, run once: the same gradient, and fewer forward passes."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from models import (
    FAMILIES,
    MLP,
    NAMES,
    build,
    build_exact,
    chat_batch,
    default_attn,
    grads,
    relative,
)
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

import metafocus as mf
from metafocus import masks
from metafocus.errors import ProblemError
from metafocus.lm import lm_loss
from metafocus.lm.hf.prefix import fast_layers, has_own_call, hidden_before
from metafocus.lm.shared_prefix import SharedPrefix
from metafocus.recipes._focusft import focusft_problem, trainable

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SOLVER = mf.SGD(0.5, 2, clip=mf.clip_per_tensor(1.0))
# The same operations on the same numbers, summed in another order; transformers' norms, which
# round to float32, turn a last bit into 1e-8 here and there once they are differentiated twice.
ONCE, TWICE = 1e-12, 1e-6


def adapter_for(family, fraction=0.5):
    return mf.LoRA(mf.top_layers(fraction, MLP.get(family, NAMES)), 4, 8.0)


def problems(model, adapter, **options):
    """FocuSFT's problem, and the same without anything shared."""
    problem = focusft_problem(model, adapter=adapter, **options)
    plain = mf.Problem(
        problem.inner_loss,
        problem.outer_loss,
        lambda slow, support: adapter.init(model, torch.Generator().manual_seed(0)),
    )
    return problem, plain


def gradient(model, problem, estimator, batch):
    model.zero_grad()
    meta = mf.bilevel(problem, solver=SOLVER, estimator=estimator)
    loss, aux = meta(trainable(model), mf.Episode(batch, batch))
    loss.backward()
    return loss.detach(), aux.inner_losses, grads(model)


@contextlib.contextmanager
def counted(layers):
    """How often each layer really runs: its attention is called. A hook would stop the sharing."""
    calls = [0] * len(layers)
    attentions = [layer.self_attn for layer in layers]
    kind = type(attentions[0])
    forward = kind.forward

    def count(self, *args, **kwargs):
        calls[attentions.index(self)] += 1
        return forward(self, *args, **kwargs)

    kind.forward = count
    yield calls
    kind.forward = forward


def with_more(forward, layer, *args, **kwargs):
    return forward(layer, *args, **kwargs), None


def decoded(decoder, layer_of, input_ids, attention_mask=None, position_ids=None, **others):
    """A decoder that runs its layers by `layer_of(index, states so far, keywords)`."""
    states = [decoder.embed_tokens(input_ids)]
    keywords = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "position_embeddings": decoder.rotary_emb(states[0], position_ids),
    }
    for index in range(len(decoder.layers)):
        states.append(layer_of(index, states, keywords))
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(states[-1]))


@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointing"))
@pytest.mark.parametrize("family", FAMILIES)
def test_same_gradient_in_every_family(family, checkpointing):
    model = build(family, default_attn(family), checkpointing=checkpointing)
    shared, plain = problems(model, adapter_for(family))
    batch = chat_batch()
    got = gradient(model, shared, mf.FirstOrder(), batch)
    expected = gradient(model, plain, mf.FirstOrder(), batch)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < ONCE


@pytest.mark.parametrize(
    "estimator",
    (
        mf.Unrolled(),
        mf.Unrolled(recompute=True),
        mf.Unrolled(last=1),
        mf.Unrolled(hvp=mf.hvp_forward),
        mf.Implicit(mf.CG(3)),
    ),
    ids=str,
)
@pytest.mark.parametrize("family", ("qwen2", "gemma3"))
@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
def test_same_gradient_of_every_estimator(family, estimator):
    model = build(family)
    shared, plain = problems(model, adapter_for(family))
    batch = chat_batch()
    got = gradient(model, shared, estimator, batch)
    expected = gradient(model, plain, estimator, batch)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < TWICE
    first = gradient(model, shared, mf.FirstOrder(), batch)
    # The test has teeth: the second order is there, and reaches the layers below.
    assert relative(got[2], first[2]) > 1e-3 or estimator == mf.Unrolled(last=1)


@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointing"))
@pytest.mark.parametrize(
    "estimator", (mf.Unrolled(), mf.Unrolled(recompute=True), mf.Unrolled(last=1)), ids=str
)
def test_second_order_is_exact_where_norms_are(estimator, checkpointing):
    """With norms that stay in float64, the whole gradient is the plain one to 1e-12."""
    model = build_exact(checkpointing=checkpointing)
    shared, plain = problems(model, adapter_for("qwen2"))
    batch = chat_batch()
    got = gradient(model, shared, estimator, batch)
    expected = gradient(model, plain, estimator, batch)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < ONCE


def test_lower_layers_run_once():
    model = build("qwen2")
    shared, plain = problems(model, adapter_for("qwen2", 0.25))
    batch = chat_batch()
    for problem, expected in ((shared, [1, 1, 1, 3]), (plain, [3, 3, 3, 3])):
        meta = mf.bilevel(problem, solver=SOLVER, estimator=mf.FirstOrder())
        meta(trainable(model), mf.Episode(batch, batch))  # The checks of the first call.
        with counted(model.model.layers) as calls:
            meta(trainable(model), mf.Episode(batch, batch))
        assert calls == expected
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_under_transforms():
    """vmap over episodes, and a gradient of it, equal a loop."""
    model = build("qwen2")
    shared, plain = problems(model, adapter_for("qwen2"))
    batches = [chat_batch(seed=seed) for seed in range(2)]
    stacked = {k: torch.stack([b[k] for b in batches]) for k in batches[0]}
    outer = {k: v.detach() for k, v in trainable(model).items()}
    meta = mf.bilevel(shared, solver=SOLVER, estimator=mf.Unrolled())
    many = mf.over_tasks(meta, randomness="same")
    got, _ = mf.hypergrad(many)(outer, mf.Episode(stacked, stacked))
    alone = mf.bilevel(plain, solver=SOLVER, estimator=mf.Unrolled())
    each = [mf.hypergrad(alone)(outer, mf.Episode(b, b))[0] for b in batches]
    for name, value in got.items():
        assert relative(value, (each[0][name] + each[1][name]) / 2) < TWICE, name


def test_inner_and_outer_tokens_may_differ():
    model = build("qwen2")
    shared, plain = problems(model, adapter_for("qwen2"), inner_tokens=mf.context_tokens)
    batch = chat_batch()
    for a, b in zip(
        *(gradient(model, p, mf.FirstOrder(), batch) for p in (shared, plain)), strict=True
    ):
        assert relative(a, b) < ONCE


def test_not_with_dropout():
    model = build("qwen2")
    model.model.layers[0].mlp.act_fn = nn.Sequential(model.model.layers[0].mlp.act_fn, nn.Dropout())
    shared = SharedPrefix(lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal))
    batch = shared.loss.prepare(chat_batch())
    assert "hidden" not in shared({}, batch)
    model.eval()
    assert "hidden" in shared({}, batch)


@pytest.mark.parametrize("fraction", (0.0, 1.0))
def test_nothing_to_share(fraction):
    model = build("qwen2")
    shared = SharedPrefix(lm_loss(model, adapter=adapter_for("qwen2", fraction), mask=masks.causal))
    assert "hidden" not in shared({}, shared.loss.prepare(chat_batch()))


@pytest.mark.parametrize("layer", [0, 3])
def test_not_where_layers_have_a_call_of_their_own(layer):
    """A compiled layer must not lose its call to a replaced `forward`."""
    model = build("qwen2")
    shared = SharedPrefix(lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal))
    batch = shared.loss.prepare(chat_batch())
    assert not has_own_call(model)
    # `Module.compile` sets the call aside; nothing is compiled before the first one.
    model.model.layers[layer].compile(backend="eager")
    assert has_own_call(model)
    assert shared._find() is None
    assert "hidden" not in shared({}, batch)


def test_not_where_the_parts_do_not_make_the_whole():
    """A model whose upper layers look below: a warning with its name, and the plain path."""
    model = build("qwen2", dtype=torch.bfloat16)

    def looking_below(index, states, keywords):
        # A hundredth of what the first layer returned: less than a few roundings of bfloat16.
        below = states[1] / 100 if index == 3 else 0
        return model.model.layers[index](states[-1], **keywords) + below

    model.model.forward = functools.partial(decoded, model.model, looking_below)
    shared = SharedPrefix(lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal))
    batch = shared.loss.prepare(chat_batch())
    with pytest.warns(UserWarning, match=r"Qwen2ForCausalLM: the layers below the fast weights"):
        assert "hidden" not in shared({}, batch)
    assert "hidden" not in shared({}, batch)


def test_not_where_layers_return_more_than_states():
    """The model unpacks what a layer returns: the check fails with a ValueError of its own."""
    model = build("qwen2")

    def first_of(index, states, keywords):
        states, _ = model.model.layers[index](states[-1], **keywords)
        return states

    model.model.forward = functools.partial(decoded, model.model, first_of)
    for layer in model.model.layers:
        layer.forward = functools.partial(with_more, type(layer).forward, layer)
    shared = SharedPrefix(lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal))
    batch = shared.loss.prepare(chat_batch())
    with pytest.warns(UserWarning, match="cannot run in two parts"):
        assert "hidden" not in shared({}, batch)
    assert shared.loss(shared.loss.adapter.init(model), {}, batch).isfinite()


def test_not_where_hooks_look_on():
    """A hook would see what skipped layers let pass, and one that adds would add twice."""
    model, batch = build_exact(), chat_batch()
    draw = torch.Generator().manual_seed(0)
    shared, plain = problems(model, adapter_for("qwen2"), generator=draw)
    # The checks of the model, before there is a hook.
    without = gradient(model, shared, mf.FirstOrder(), batch)
    draw.manual_seed(0)
    seen = []

    def shift(module, args, output):
        seen.append(output.detach())
        return output + 0.1

    model.model.layers[1].register_forward_hook(shift)
    got, saw = gradient(model, shared, mf.FirstOrder(), batch), seen[:]
    seen.clear()
    expected = gradient(model, plain, mf.FirstOrder(), batch)
    for a, b, c in zip(got, expected, without, strict=True):
        assert relative(a, b) < ONCE < 1e-3 < relative(c, b)
    assert len(saw) == len(seen)
    assert all(torch.equal(a, b) for a, b in zip(saw, seen, strict=True))


def test_not_where_a_layer_draws_random_numbers_by_itself():
    model = build("qwen2")
    layer = model.model.layers[0]
    layer.forward = lambda x, **kwargs: type(layer).forward(layer, x + torch.rand(()), **kwargs)
    shared = SharedPrefix(lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal))
    with pytest.warns(UserWarning, match="it draws random numbers"):
        assert "hidden" not in shared({}, shared.loss.prepare(chat_batch()))


def test_a_replaced_module_is_checked_anew():
    model = build("qwen2")
    shared = SharedPrefix(lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal))
    batch = shared.loss.prepare(chat_batch())
    assert "hidden" in shared({}, batch)
    model.model.layers[0].mlp.act_fn = Noise()
    with pytest.warns(UserWarning, match="it draws random numbers"):
        assert "hidden" not in shared({}, batch)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_where_fast_weights_lie():
    model = build("qwen2")
    assert fast_layers(model, []) is None
    assert fast_layers(model, ["lm_head.lora_A"]) is None
    assert fast_layers(model, ["model.layers.2.mlp.up_proj.lora_A", "lm_head.lora_A"]) is None
    names = ["model.layers.3.mlp.up_proj.lora_A", "model.layers.2.mlp.up_proj.lora_B"]
    assert fast_layers(model, names) == ("model.layers", 2)


def test_a_layer_that_is_not_called():
    model = build("qwen2")
    with pytest.raises(ProblemError, match=r"did not call its layer model.layers.1"):
        hidden_before(model, "model.layers", 1, lambda: None)
