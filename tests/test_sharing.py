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
    """How often each layer really runs: its attention is called."""
    calls = [0] * len(layers)

    def hook(index):
        def count(*args):
            calls[index] += 1

        return count

    handles = [layer.self_attn.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    yield calls
    for handle in handles:
        handle.remove()


def with_more(forward, layer, *args, **kwargs):
    return forward(layer, *args, **kwargs), None


def unpacking(decoder, input_ids, attention_mask=None, position_ids=None, **others):
    """A decoder whose layers return their states and something more."""
    states = decoder.embed_tokens(input_ids)
    where = decoder.rotary_emb(states, position_ids)
    for layer in decoder.layers:
        states, _ = layer(
            states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=where,
        )
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(states))


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
    model = build("qwen2")
    decoder, layers = model.model, model.model.layers
    ran = []
    decoder.register_forward_pre_hook(lambda module, args: ran.clear())
    layers[0].self_attn.register_forward_hook(lambda module, args, out: ran.append(1.0))
    layers[3].register_forward_hook(lambda module, args, out: out + sum(ran))
    shared = SharedPrefix(lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal))
    batch = shared.loss.prepare(chat_batch())
    with pytest.warns(UserWarning, match=r"Qwen2ForCausalLM: the layers below the fast weights"):
        assert "hidden" not in shared({}, batch)
    assert "hidden" not in shared({}, batch)


def test_not_where_layers_return_more_than_states():
    """The model unpacks what a layer returns: the check fails with a ValueError of its own."""
    model = build("qwen2")
    model.model.forward = lambda input_ids, **others: unpacking(model.model, input_ids, **others)
    for layer in model.model.layers:
        layer.forward = functools.partial(with_more, type(layer).forward, layer)
    shared = SharedPrefix(lm_loss(model, adapter=adapter_for("qwen2"), mask=masks.causal))
    batch = shared.loss.prepare(chat_batch())
    with pytest.warns(UserWarning, match="cannot run in two parts"):
        assert "hidden" not in shared({}, batch)
    assert shared.loss(shared.loss.adapter.init(model), {}, batch).isfinite()


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
