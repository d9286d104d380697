"""FullWeights: copies of parameters, against functional_call and hand-written loops in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import NAMES, build, chat_batch, grads, relative
from test_per_example import plain_norms
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import metafocus as mf
from metafocus.adapters import slots
from metafocus.adapters.slots import bound, functions
from metafocus.errors import PlacementError, ProblemError
from metafocus.lm.hf.heads import read_hidden
from metafocus.recipes import focusft
from metafocus.recipes._focusft import focusft_problem

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # The first jvp of a process makes torch itself call torch.jit.script.
    pytest.mark.filterwarnings("ignore:`torch.jit.script`"),
]

MLPS = mf.FullWeights(mf.top_layers(0.5, NAMES))


def some(*paths):
    return mf.FullWeights(lambda model: paths)


PLACES = {
    "mlps": MLPS,
    "norms": mf.FullWeights(mf.top_layers(0.5, ("input_layernorm", "post_attention_layernorm"))),
    "attention": mf.FullWeights(mf.top_layers(0.25, ("self_attn",))),
    "tied embedding": some("model.embed_tokens"),
    "tied head": some("lm_head"),
    "all": some(""),
}
places = pytest.mark.parametrize("full", PLACES.values(), ids=PLACES)
both = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])


def moved(fast, seed=0, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    return {
        k: v.detach() + size * torch.randn(v.shape, generator=generator).to(v)
        for k, v in fast.items()
    }


def close(got, expected, tolerance=1e-12):
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=tolerance)


def model_of(**options):
    return plain_norms(build(**options))


def lm(model, adapter, **options):
    return mf.lm_loss(model, adapter=adapter, mask=mf.masks.causal, **options)


def by_hand(model, batch=None):
    """Mean cross entropy of the answers, with all weights given by name."""
    batch = chat_batch() if batch is None else batch
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "position_ids": torch.arange(batch["input_ids"].shape[1])[None],
        "use_cache": False,
    }
    labels = torch.where(batch["answer_mask"], batch["input_ids"], -100)

    def loss(weights):
        logits = functional_call(model, weights, (), inputs).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return loss


# What the model computes --------------------------------------------------------------------


@both
@places
def test_loss_and_gradients_are_those_of_functional_call(full, checkpointing):
    model, plain = model_of(checkpointing=checkpointing), model_of()
    fast, batch = moved(full.init(model)), chat_batch()
    names = dict(plain.named_parameters())
    assert set(fast) <= set(names)
    loss, expected = lm(model, full), by_hand(plain)
    assert loss(fast, {}, batch).item() == pytest.approx(expected(fast).item(), rel=1e-12)
    assert expected(fast).item() != pytest.approx(expected({}).item(), rel=1e-6)
    close(grad(lambda f: loss(f, {}, batch))(fast), grad(expected)(fast))
    leaves = {k: v.requires_grad_() for k, v in moved(fast, size=0).items()}
    tape = torch.autograd.grad(loss(leaves, {}, batch), list(leaves.values()))
    close(dict(zip(leaves, tape, strict=True)), grad(expected)(fast))

    # Slow weights by functional_call do not hide the fast ones, and get gradients of their own.
    slow = moved({k: v for k, v in names.items()}, seed=1)
    got = grad(lambda f, s: loss(f, s, batch), argnums=(0, 1))(fast, slow)
    want = grad(lambda f, s: expected({**s, **f}), argnums=(0, 1))(fast, slow)
    for one, two in zip(got, want, strict=True):
        close(one, two)
    assert not any(got[1][k].any() for k in fast)


@both
@pytest.mark.parametrize("full", [PLACES["mlps"], PLACES["tied head"]], ids=["mlps", "tied head"])
def test_second_order(full, checkpointing):
    model, plain = model_of(checkpointing=checkpointing), model_of()
    fast, batch = moved(full.init(model)), chat_batch()
    loss, expected = lm(model, full), by_hand(plain)
    direction = moved({k: torch.zeros_like(v) for k, v in fast.items()}, 5)

    def curvature(f):
        return lambda x: sum((g * direction[k]).sum() for k, g in grad(f)(x).items())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        close(
            grad(curvature(lambda f: loss(f, {}, batch)))(fast),
            grad(curvature(expected))(fast),
            1e-11,
        )
        got = jvp(grad(lambda f: loss(f, {}, batch)), (fast,), (direction,))[1]
        close(got, jvp(grad(expected), (fast,), (direction,))[1], 1e-11)


def test_vmap_over_fast_weights_equals_a_loop():
    model = model_of()
    loss, batch = lm(model, MLPS), chat_batch()
    tasks = [moved(MLPS.init(model), seed) for seed in range(3)]
    stacked = {k: torch.stack([t[k] for t in tasks]) for k in tasks[0]}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        got = vmap(grad(lambda f: loss(f, {}, batch)))(stacked)
    expected = [grad(lambda f: loss(f, {}, batch))(t) for t in tasks]
    close(got, {k: torch.stack([e[k] for e in expected]) for k in stacked})


def test_conv1d_and_position_embeddings():
    model = build("gpt2")
    full = some("transformer.h.3.mlp.c_fc", "transformer.wpe", "transformer.ln_f")
    fast = moved(full.init(model))
    assert [name.removeprefix("transformer.") for name in fast] == [
        "h.3.mlp.c_fc.weight",
        "h.3.mlp.c_fc.bias",
        "wpe.weight",
        "ln_f.weight",
        "ln_f.bias",
    ]
    loss, expected = lm(model, full), by_hand(build("gpt2"))
    close(grad(lambda f: loss(f, {}, chat_batch()))(fast), grad(expected)(fast))


# The hypergradient --------------------------------------------------------------------------


SOLVER = mf.SGD(0.5, steps=2, momentum=0.5)


def unrolled_by_hand(model, batch, names, steps=2):
    """MAML on chosen weights: the start is the slow weight itself."""
    slow = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    loss = by_hand(model, batch)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        fast, velocity = {k: slow[k] for k in names}, {k: 0.0 for k in names}
        for _ in range(steps):
            found = torch.autograd.grad(
                loss({**slow, **fast}), list(fast.values()), create_graph=True
            )
            for (k, p), g in zip(list(fast.items()), found, strict=True):
                velocity[k] = 0.5 * velocity[k] + g
                fast[k] = p - 0.5 * velocity[k]
        value = loss({**slow, **fast})
    got = torch.autograd.grad(value, list(slow.values()), allow_unused=True)
    zeros = (
        torch.zeros_like(x) if g is None else g for g, x in zip(got, slow.values(), strict=True)
    )
    return value, torch.cat([g.flatten() for g in zeros])


@both
@pytest.mark.parametrize(
    "estimator",
    [mf.Unrolled(), mf.Unrolled(recompute=True), mf.Unrolled(recompute=2)],
    ids=str,
)
@pytest.mark.parametrize(
    "full",
    [PLACES["mlps"], PLACES["norms"], PLACES["tied embedding"], PLACES["all"]],
    ids=["mlps", "norms", "tied embedding", "all"],
)
def test_the_hypergradient_is_that_of_a_loop_written_by_hand(full, estimator, checkpointing):
    batch = chat_batch()
    value, expected = unrolled_by_hand(model_of(), batch, full.names(model_of()))
    model = model_of(checkpointing=checkpointing)
    meta = focusft(model, adapter=full, mask=mf.masks.causal, solver=SOLVER, estimator=estimator)
    loss, _ = meta({}, mf.Episode(batch, batch))
    loss.backward()
    assert loss.item() == pytest.approx(value.item(), rel=1e-12)
    assert relative(grads(model), expected) < 1e-11


def test_the_hypergradient_is_the_derivative():
    """Central differences of the whole map along the gradient and a random direction."""
    batch, model = chat_batch(), model_of()
    meta = focusft(model, adapter=MLPS, solver=SOLVER, estimator=mf.Unrolled(recompute=True))
    outer = {k: v.detach() for k, v in model.named_parameters()}
    gradient, _ = mf.hypergrad(meta)(outer, mf.Episode(batch, batch))
    for direction in (gradient, moved({k: torch.zeros_like(v) for k, v in outer.items()}, 3)):
        norm = sum((v * v).sum() for v in direction.values()).sqrt()
        step = {k: 1e-4 * v / norm for k, v in direction.items()}
        with torch.no_grad():
            up, down = (
                meta({k: v + sign * step[k] for k, v in outer.items()}, mf.Episode(batch, batch))[0]
                for sign in (1, -1)
            )
        slope = sum((gradient[k] * step[k]).sum() for k in step)
        # Error step^2 times the third derivative, and 1e-16 / 1e-4 of rounding.
        assert ((up - down) / 2).item() == pytest.approx(slope.item(), rel=1e-5)


def test_first_order_moves_with_the_start():
    """FOMAML: the gradient at the adapted weights arrives at the slow ones that they began as."""
    batch, model = chat_batch(), model_of()
    meta = focusft(model, adapter=MLPS, mask=mf.masks.causal, solver=SOLVER)
    loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    slow = {k: v.detach() for k, v in model.named_parameters()}
    expected = grad(by_hand(model_of()))({**slow, **aux.params})
    close({k: p.grad for k, p in model.named_parameters()}, expected)


def test_a_frozen_parameter_can_be_fast():
    batch, model = chat_batch(), model_of()
    for name in MLPS.names(model):
        model.get_parameter(name).requires_grad_(False)
    meta = focusft(model, adapter=MLPS, solver=SOLVER, estimator=mf.Unrolled(recompute=True))
    loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    assert all(model.get_parameter(k).grad is None for k in aux.params)
    assert model.model.embed_tokens.weight.grad.norm() > 0
    assert all(not torch.equal(v, model.get_parameter(k)) for k, v in aux.params.items())


def test_adapt_and_the_start_of_a_problem():
    batch, model = chat_batch(), model_of()
    problem = focusft_problem(model, adapter=MLPS)
    outer = moved(dict(model.named_parameters()), 4)
    start = problem.start(outer, batch)
    close(start, {k: outer[k] for k in MLPS.names(model)}, 0)
    solution = mf.adapt(problem, outer, batch, solver=SOLVER)
    assert solution.losses[1] < solution.losses[0]
    assert not any(v.requires_grad for v in solution.params.values())


def test_the_start_is_a_copy():
    model = model_of()
    fast = MLPS.init(model)
    before = {k: v.detach().clone() for k, v in fast.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    close({k: v.detach() for k, v in fast.items()}, before, 0)


# How the model sees them --------------------------------------------------------------------


def test_outside_of_a_bind_nothing_changes():
    model, ids = model_of(), chat_batch()["input_ids"]
    pristine = copy.deepcopy(model)
    own = dict(model.named_parameters())
    fast = moved(MLPS.init(model))
    for error in (None, RuntimeError, KeyboardInterrupt):
        handle = None
        if error is not None:
            # While the parameters of a module are swapped.
            layer = model.model.layers[-1].mlp.down_proj
            handle = layer.register_forward_hook(raising(error), prepend=True)
        try:
            with MLPS.bind(model, fast):
                functional_call(model, {"model.norm.weight": torch.ones(32).double()}, (ids,))
        except BaseException as caught:
            assert type(caught) is error
        if handle is not None:
            handle.remove()
        assert all(p is own[k] for k, p in model.named_parameters())
        assert torch.equal(model(ids).logits, pristine(ids).logits)
    assert list(model.state_dict()) == list(pristine.state_dict())
    with MLPS.bind(model, fast):
        assert all(p is own[k] for k, p in model.named_parameters())
        assert not torch.equal(model(ids).logits, pristine(ids).logits)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids).logits, pristine(ids).logits)


def raising(error):
    def hook(*args):
        raise error

    return hook


def test_nested_binds_of_both_adapters():
    model, ids = model_of(), chat_batch()["input_ids"]
    lora = mf.LoRA(MLPS.where, rank=2)
    low = moved(lora.init(model))
    first, second = (moved(MLPS.init(model), seed) for seed in (1, 2))

    def logits(*pairs):
        with torch.no_grad():
            if not pairs:
                return model(ids).logits
            (adapter, fast), *rest = pairs
            with adapter.bind(model, fast):
                before = model(ids).logits
                inside = logits(*rest) if rest else before
                assert torch.equal(before, model(ids).logits)
                return inside

    assert torch.equal(logits((MLPS, first), (MLPS, second)), logits((MLPS, second)))
    assert torch.equal(logits((MLPS, first), (lora, low)), logits((lora, low)))
    assert torch.equal(logits((lora, low), (MLPS, first)), logits((MLPS, first)))
    assert bound(model) == {} and functions(model) == {}
    modules = [m for m in model.modules() if m._forward_hooks]
    assert all(len(m._forward_hooks) == len(m._forward_pre_hooks) == 1 for m in modules)


def test_a_module_that_calls_itself_and_one_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x, depth=2):
            return self.weight * (self(x, depth - 1) if depth else x)

    model = nn.Sequential(Twice())
    with some("0").bind(model, {"0.weight": torch.tensor(3.0)}):
        assert model(torch.tensor(1.0)) == 27 and model(torch.tensor(2.0)) == 54
    assert model(torch.tensor(1.0)) == 8


def test_a_shared_parameter_is_seen_everywhere():
    model = model_of()
    assert some("lm_head").names(model) == ("model.embed_tokens.weight",)
    assert some("lm_head").modules(model) == ("model.embed_tokens", "lm_head")
    assert some("lm_head", "model.embed_tokens").names(model) == ("model.embed_tokens.weight",)
    assert some("lm_head").names(model_of(tied=False)) == ("lm_head.weight",)


def test_types():
    model = build(dtype=torch.bfloat16)
    fast = MLPS.init(model)
    assert all(v.dtype == torch.float32 for v in fast.values())
    # A change too small for bfloat16 is kept, and not lost in each step.
    fast = {k: v.detach() * (1 + 2**-12) for k, v in fast.items()}
    batch = chat_batch()
    found = grad(lambda f: lm(model, MLPS)(f, {}, batch))(fast)
    assert all(g.dtype == torch.float32 and g.norm() > 0 for g in found.values())
    with MLPS.bind(model, fast):
        head = model.get_output_embeddings()
        hidden = read_hidden(head, lambda: model(batch["input_ids"]), lambda _, hidden: hidden)
    assert hidden.dtype == torch.bfloat16
    wide = build(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = grad(lambda f: lm(wide, MLPS)(f, {}, batch))(MLPS.init(wide))
    assert all(g.dtype == torch.float32 for g in found.values())


def test_compiled():
    """Hooks are there from `init` on; a compiler sees through them."""
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4)).double()
    full = some("0", "2")
    fast = moved(full.init(layer), size=0.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager")

    def run(module, fast):
        with full.bind(layer, fast):
            return module(x)

    for seed in range(2):
        fast = {k: v.requires_grad_() for k, v in moved(fast, seed).items()}
        got, want = run(compiled, fast), run(layer, fast)
        torch.testing.assert_close(got, want)
        for one, two in zip(
            torch.autograd.grad(got.sum(), list(fast.values())),
            torch.autograd.grad(want.sum(), list(fast.values())),
            strict=True,
        ):
            torch.testing.assert_close(one, two)
    torch.testing.assert_close(compiled(x), layer(x))


# Saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlps", "tied head", "all"])
def test_save_and_load(name, tmp_path):
    from safetensors.torch import load_file

    full, model, ids = PLACES[name], model_of(), chat_batch()["input_ids"]
    fast = moved(full.init(model))
    full.save(model, fast, tmp_path / "new")
    close(full.load(model, tmp_path / "new"), fast, 0)
    with full.bind(model, fast):
        adapted = model(ids).logits
    # As the model's own weights: what it computes is the same, tied ones included.
    other = model_of()
    other.load_state_dict(load_file(tmp_path / "new" / "fast_weights.safetensors"), strict=False)
    torch.testing.assert_close(other(ids).logits, adapted, rtol=0, atol=1e-12)
    with pytest.raises(ProblemError, match="another model or placement"):
        some("model.norm").load(model, tmp_path / "new")


# Errors -------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Reads its child's weight without calling the child, which its source does not show."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(2, 2)

    def forward(self, x):
        child: Any = next(self.children())
        return F.linear(x, child.weight)


@pytest.mark.parametrize(
    ("model", "paths", "match"),
    [
        (nn.Sequential(nn.Linear(2, 2)), ("1",), "has no module '1'"),
        (nn.Sequential(nn.Linear(2, 2)), ("0", "0"), "more than once"),
        (nn.Sequential(nn.Tanh()), ("0",), "Tanh without parameters"),
        (nn.MultiheadAttention(4, 2), ("",), "NonDynamicallyQuantizableLinear"),
        (nn.Sequential(nn.LSTM(2, 2)), ("0",), "LSTM, without calling it"),
    ],
    ids=["unknown", "twice", "no parameters", "attention", "lstm"],
)
def test_placements_that_are_refused(model, paths, match):
    with pytest.raises(PlacementError, match=match):
        some(*paths).init(model)


def test_fast_weights_that_do_not_fit():
    model = nn.Sequential(nn.Linear(2, 3))
    full = some("0")
    fast = full.init(model)
    for wrong, match in (
        ({}, "missing"),
        ({**fast, "1.weight": fast["0.weight"]}, "unknown"),
        ({**fast, "0.weight": fast["0.weight"].T}, r"shape \[2, 3\], expected \[3, 2\]$"),
        ({**fast, "0.bias": fast["0.bias"][None]}, "for each example are LoRA's"),
    ):
        with pytest.raises(ProblemError, match=match), full.bind(model, wrong):
            pass
    integers = nn.Sequential(nn.Linear(2, 2))
    integers[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ProblemError, match=r"torch.int8.*LoRA"):
        full.init(integers)
    with pytest.raises(PlacementError, match="nothing to save"):
        some().save(model, {}, "nowhere")


def test_weights_that_are_read_without_a_call_are_noticed_by_the_engine():
    model = nn.Sequential(Reader(), nn.Linear(2, 2))
    full = some("0.child")

    def loss(fast, slow, x):
        with full.bind(model, fast):
            return (model(x) ** 2).sum()

    problem = mf.Problem(loss, loss, lambda slow, support: full.init(model))
    with pytest.raises(ProblemError, match="does not depend on the fast weight"):
        mf.adapt(problem, {}, torch.ones(1, 2), solver=mf.SGD(0.1, 1))


def test_slots_hold_what_they_are_given():
    layer = nn.Linear(2, 2)
    binding = slots.Binding(slots.as_parameters, {"weight": torch.zeros(2, 2)})
    with slots.bind([(layer, binding)]):
        assert torch.equal(layer(torch.ones(2)), layer.bias)
        with slots.rebind(layer, {"weight": torch.ones(2, 2)}, slots.functions(layer)):
            assert torch.equal(layer(torch.ones(2)), layer.bias + 2)
        assert torch.equal(layer(torch.ones(2)), layer.bias)
