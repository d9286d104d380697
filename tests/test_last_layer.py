"""The last layer at scored positions only: nothing that is read changes."""

from __future__ import annotations

import copy
import gc
import weakref

import architectures
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

import metafocus as mf
from metafocus.adapters import slots
from metafocus.closures import closures_of
from metafocus.lm import loss as lm
from metafocus.lm.hf import heads
from metafocus.lm.hf.last_layer import last_layer

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def step(model, batch, adapter=None, **options):
    """The loss, the inner losses and the gradient of all parameters."""
    model.zero_grad()
    names = MLP.get(model.config.model_type, (*NAMES, "q_proj", "o_proj"))
    adapter = adapter or mf.LoRA(mf.top_layers(0.5, names), 4)
    meta = mf.recipes.focusft(model, adapter=adapter, **options)
    loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    return loss.detach(), aux.inner_losses, grads(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_stay(family, checkpointing, monkeypatch):
    attn = default_attn(family)
    make = build if "gemma" in family else build_exact
    model = make(family=family, attn=attn, checkpointing=checkpointing)
    assert last_layer(model) is not None
    found = step(model, chat_batch())
    monkeypatch.setattr(lm, "restriction", lambda *args: None)
    expected = step(model, chat_batch())
    # Norms of Gemma round to float32.
    bound = 1e-6 if "gemma" in family else 1e-12
    for got, want in zip(found, expected, strict=True):
        assert relative(got, want) < bound


@pytest.mark.parametrize("length", [24, 96])
@pytest.mark.parametrize("estimator", [mf.Unrolled(), mf.Unrolled(recompute=True)])
def test_second_derivatives_stay(estimator, length, monkeypatch):
    model = build_exact(max_position_embeddings=96)
    found = step(model, chat_batch(length), estimator=estimator)
    monkeypatch.setattr(lm, "restriction", lambda *args: None)
    for got, want in zip(found, step(model, chat_batch(length), estimator=estimator), strict=True):
        assert relative(got, want) < 1e-11  # the same sums, in another order, twice derived


@pytest.mark.parametrize("estimator", [mf.FirstOrder(), mf.Unrolled()])
def test_full_fast_weights(estimator, monkeypatch):
    adapter = mf.FullWeights(mf.top_layers(0.5, (*NAMES, "q_proj", "o_proj")))
    model = build_exact()
    found = step(model, chat_batch(), adapter, estimator=estimator)
    monkeypatch.setattr(lm, "restriction", lambda *args: None)
    for got, want in zip(
        found, step(model, chat_batch(), adapter, estimator=estimator), strict=True
    ):
        assert relative(got, want) < 1e-12


def positions_of_the_mlp(model, monkeypatch):
    """The shapes that the last MLP's projection sees; a hook would keep the layer whole."""
    seen, forward = [], nn.Linear.forward
    projection = model.model.layers[-1].mlp.gate_proj

    def look(self, x):
        if self is projection:
            seen.append(tuple(x.shape))
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", look)
    return seen


def test_the_mlp_sees_scored_positions_only(monkeypatch):
    model, batch = build_exact(), chat_batch()
    seen = positions_of_the_mlp(model, monkeypatch)
    step(model, batch)
    scored = int(batch["answer_mask"].sum())
    # Two inner passes and the outer one; what ran before are checks of a few tokens.
    assert seen[-3:] == [(1, scored, 32)] * 3
    assert (2, 24, 32) not in seen


class Mixing(nn.Module):
    """Adds to what a module gives a little of what it gives at the positions before."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        own = self.module(x)
        return own + own.cumsum(-2) / 50


@pytest.mark.parametrize("place", ["mlp", "norm"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_model_that_mixes_positions_after_its_attention_runs_as_a_whole(place, dtype):
    """Also in bfloat16, where the difference is no more than that of a few roundings."""
    model = build_exact(dtype=dtype)
    assert last_layer(model) is not None
    home = model.model.layers[-1] if place == "mlp" else model.model
    setattr(home, place, Mixing(getattr(home, place)))
    assert last_layer(model) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_a_last_layer_without_attention_leaves_the_one_below_whole(name, dtype, monkeypatch):
    kinds = architectures.OWN[name]["layer_types"]
    monkeypatch.setitem(architectures.OWN[name], "layer_types", kinds[::-1])
    model = architectures.build(name).to(dtype)
    assert last_layer(model) is None


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_experts_see_all_tokens(name):
    """They may count them."""
    assert last_layer(architectures.build(name)) is None


@pytest.mark.parametrize("name", ["phi", "gpt_neox", "falcon", "cohere", "gptj", "olmo2", "gemma2"])
@pytest.mark.filterwarnings("ignore")
def test_parallel_blocks_and_norms_behind_equal_the_oracle(name):
    model, data = architectures.build(name), architectures.batch()
    reference = architectures.build(name, "eager")
    mask = mf.masks.context_bidirectional
    assert (last_layer(model) is None) == (name == "falcon")
    for second in (False, True):
        found = architectures.ours(model, data, mask, second)
        expected = architectures.oracle(reference, data, mask, second)
        # Rotary angles, norms and eager softmax are float32 in transformers.
        assert architectures.error(found, expected) < 3e-6


def hooks(model):
    """What a user may look at or change, by a name."""
    layer = model.model.layers[-1]

    def centre(module, args, output):
        """Uses all positions of a module's output."""
        states = output[0] if isinstance(output, tuple) else output
        states = states - 0.1 * states.mean(-2, keepdim=True)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return {
        "a projection": lambda: layer.mlp.up_proj.register_forward_hook(centre),
        "queries": lambda: layer.self_attn.q_proj.register_forward_hook(centre),
        "MLP": lambda: layer.mlp.register_forward_hook(centre),
        "attention": lambda: layer.self_attn.register_forward_hook(centre),
        "layer": lambda: layer.register_forward_hook(centre),
        "norm": lambda: model.model.norm.register_forward_hook(centre),
        "input of the MLP": lambda: layer.mlp.register_forward_pre_hook(
            lambda module, args: (args[0] - 0.1 * args[0].mean(-2, keepdim=True),)
        ),
    }


@pytest.mark.parametrize("place", sorted(hooks(build())))
@pytest.mark.parametrize("before", [True, False], ids=["before", "after the check"])
def test_hooks_of_a_user_see_every_position(place, before, monkeypatch):
    model, batch = build_exact(), chat_batch()
    if not before:
        step(model, batch)
    hooks(model)[place]()
    found = step(model, batch)
    monkeypatch.setattr(lm, "restriction", lambda *args: None)
    for got, want in zip(found, step(model, batch), strict=True):
        assert relative(got, want) < 1e-12


def test_a_removed_hook_leaves_nothing_behind(monkeypatch):
    model, batch = build_exact(), chat_batch()
    seen = positions_of_the_mlp(model, monkeypatch)
    layer = model.model.layers[-1]
    for register in (layer.register_forward_hook, layer.mlp.register_full_backward_hook):
        handle = register(lambda *args: None)
        step(model, batch)
        assert seen[-1] == (2, 24, 32)
        handle.remove()
        step(model, batch)
        assert seen[-1][0] == 1
    # transformers leaves hooks in every layer that has once shown its hidden states.
    with torch.no_grad():
        model(batch["input_ids"], output_hidden_states=True)
    step(model, batch)
    assert seen[-1][0] == 1


def test_the_check_leaves_nothing_on_the_model():
    """A compiled loss would see it change; a copy is checked by itself, and both can be freed."""
    model = build_exact()
    heads.install(model.lm_head)
    before = closures_of(model)
    assert last_layer(model) is not None
    assert closures_of(model) == before
    twin = copy.deepcopy(model)
    twin.model.norm = Mixing(twin.model.norm)
    assert last_layer(twin) is None and last_layer(model) is not None
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


def test_an_adapter_that_mixes_positions(monkeypatch):
    """Fast weights of a user's own, whose function reads what the module gives elsewhere."""

    class Recurrent(mf.LoRA):
        def bind(self, model, fast):
            def mix(module, args, output, tensors):
                return output + output.cumsum(-2) @ tensors["w"]

            mlp = model.model.layers[-1].mlp
            return slots.bind([(mlp, slots.Binding(mix, {"w": fast["w"]}))])

        def init(self, model, generator=None):
            return {"w": torch.full((32, 32), 0.01, dtype=torch.float64)}

    model, adapter = build_exact(), Recurrent(mf.all_linear, 2)
    step(model, chat_batch())  # the check of the model, before these fast weights
    found = step(model, chat_batch(), adapter)
    monkeypatch.setattr(lm, "restriction", lambda *args: None)
    for got, want in zip(found, step(model, chat_batch(), adapter), strict=True):
        assert relative(got, want) < 1e-12


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout])
def test_dropout_draws_for_every_position(kind, monkeypatch):
    """Also where one layer alone is in training mode."""
    model = build_exact()
    model.model.layers[-1].mlp.act_fn = nn.Sequential(nn.SiLU(), kind(0.5))
    model.eval()
    model.model.layers[-1].mlp.act_fn.train()
    torch.manual_seed(0)
    found = step(model, chat_batch())
    monkeypatch.setattr(lm, "restriction", lambda *args: None)
    torch.manual_seed(0)
    for got, want in zip(found, step(model, chat_batch()), strict=True):
        assert relative(got, want) < 1e-12


def test_a_layer_that_draws_random_numbers_by_itself():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) if self.training else x

    model = build_exact()
    model.model.layers[-1].mlp.act_fn = Noise()
    assert last_layer(model) is None
    model.eval()
    assert last_layer(model) is not None
