from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from metafocus.adapters import LoRA, all_linear, matching, top_layers
from metafocus.adapters.slots import Binding, Slot, bind, bound, functions, rebind, slot
from metafocus.errors import PlacementError, ProblemError

# PEFT reads a property that transformers has renamed.
peft_warnings = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
Params = dict[str, Tensor]
PLACES: dict[str, Any] = {
    "qwen2": top_layers(0.5, ("gate_proj", "down_proj", "q_proj")),
    "llama": all_linear,
    "gpt2": top_layers(1.0, ("c_fc", "attn.c_attn")),
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        small: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "attn_implementation": "sdpa",
        }
        if name == "gpt2":
            model: nn.Module = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=64,
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    n_positions=16,
                    bos_token_id=0,
                    eos_token_id=0,
                    attn_implementation="sdpa",
                )
            )
        elif name == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
        else:
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small))
    for parent in list(model.modules()):
        for child_name, child in parent.named_children():
            if hasattr(child, "variance_epsilon"):
                # Hugging Face's RMSNorm rounds to float32, which hides errors below 1e-7.
                norm = nn.RMSNorm(16, eps=1e-6)
                setattr(parent, child_name, norm)
    return model.to(dtype).eval()


def noisy(fast: Params, seed: int = 0) -> Params:
    """Fast weights with B != 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for k, v in fast.items()
    }


def merged(model: nn.Module, lora: LoRA, fast: Params) -> Params:
    params = dict(model.named_parameters())
    for path in lora.modules(model):
        update = lora.alpha / lora.rank * fast[f"{path}.lora_B"] @ fast[f"{path}.lora_A"]
        transposed = not isinstance(model.get_submodule(path), nn.Linear)
        params[f"{path}.weight"] = params[f"{path}.weight"] + (update.T if transposed else update)
    return params


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def run(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def loss_bound(model: nn.Module, lora: LoRA) -> Callable[[Params], Tensor]:
    def loss(fast: Params) -> Tensor:
        with lora.bind(model, fast):
            return loss_of(run(model))

    return loss


def loss_merged(model: nn.Module, lora: LoRA) -> Callable[[Params], Tensor]:
    def loss(fast: Params) -> Tensor:
        kwargs = {"input_ids": TOKENS, "use_cache": False}
        return loss_of(functional_call(model, merged(model, lora, fast), (), kwargs).logits)

    return loss


def close(got: Params, expected: Params, tolerance: float = 1e-12) -> None:
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=tolerance)


@pytest.fixture(params=["qwen2", "llama", "gpt2"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, LoRA, Params]:
    model = build(request.param)
    lora = LoRA(PLACES[request.param], rank=3, alpha=5.0)
    return model, lora, noisy(lora.init(model))


def test_logits_and_gradients_equal_merged_weights(case: tuple[nn.Module, LoRA, Params]) -> None:
    model, lora, fast = case
    base = run(model)
    with lora.bind(model, fast):
        adapted = run(model)
    assert not torch.equal(base, adapted)
    expected = functional_call(
        model, merged(model, lora, fast), (), {"input_ids": TOKENS, "use_cache": False}
    ).logits
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-12)
    close(grad(loss_bound(model, lora))(fast), grad(loss_merged(model, lora))(fast))

    # The model's own parameters get the same gradient too, on the plain autograd tape.
    names, params = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(loss_bound(model, lora)(fast), params)
    want = torch.autograd.grad(loss_merged(model, lora)(fast), params)
    close(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)))


# The first jvp of a process makes torch itself call torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_second_order(case: tuple[nn.Module, LoRA, Params]) -> None:
    model, lora, fast = case

    def adapted(loss: Callable[[Params], Tensor]) -> Callable[[Params], Tensor]:
        def after_one_step(start: Params) -> Tensor:
            gradient = grad(loss)(start)
            return loss({k: start[k] - 0.5 * gradient[k] for k in start})

        return after_one_step

    with sdpa_kernel(SDPBackend.MATH):
        bound_loss, merged_loss = loss_bound(model, lora), loss_merged(model, lora)
        close(grad(adapted(bound_loss))(fast), grad(adapted(merged_loss))(fast))
        direction = noisy({k: torch.zeros_like(v) for k, v in fast.items()}, 5)
        for order in (lambda f: f, grad):
            got = jvp(order(bound_loss), (fast,), (direction,))[1]
            want = jvp(order(merged_loss), (fast,), (direction,))[1]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_vmap_over_fast_weights_equals_a_loop(case: tuple[nn.Module, LoRA, Params]) -> None:
    model, lora, fast = case
    tasks = [noisy(fast, seed) for seed in range(3)]
    stacked = {k: torch.stack([task[k] for task in tasks]) for k in fast}
    loss = loss_bound(model, lora)
    with sdpa_kernel(SDPBackend.MATH):
        expected_losses = torch.stack([loss(task) for task in tasks])
        torch.testing.assert_close(vmap(loss)(stacked), expected_losses, rtol=0, atol=1e-12)
        got = vmap(grad(loss))(stacked)
        expected = [grad(loss)(task) for task in tasks]
    close(got, {k: torch.stack([e[k] for e in expected]) for k in fast})


def test_functional_call_with_base_weights(case: tuple[nn.Module, LoRA, Params]) -> None:
    model, lora, fast = case
    other = {k: 1.5 * v.detach() for k, v in model.named_parameters()}
    kwargs = {"input_ids": TOKENS, "use_cache": False}
    with lora.bind(model, fast):
        got = functional_call(model, other, (), kwargs).logits
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.5)
    with lora.bind(moved, fast):
        assert torch.equal(got, run(moved))


def test_outside_of_a_bind_nothing_changes(case: tuple[nn.Module, LoRA, Params]) -> None:
    model, lora, fast = case
    pristine = copy.deepcopy(model)
    for _ in range(2):
        with lora.bind(model, fast):
            pass
    assert torch.equal(run(model), run(pristine))
    assert list(model.state_dict()) == list(pristine.state_dict())
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in pristine.named_buffers()]
    with lora.bind(model, fast):
        assert list(model.state_dict()) == list(pristine.state_dict())
        assert len(list(model.parameters())) == len(list(pristine.parameters()))
    with lora.bind(model, lora.init(model)):
        assert torch.equal(run(model), run(pristine))  # B = 0


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_installed_once_and_keep_nothing_alive() -> None:
    model = build("llama")
    lora = LoRA(all_linear, rank=2)
    assert hooks(model) == 0
    for seed in range(50):
        with lora.bind(model, noisy(lora.init(model), seed)):
            pass
    assert hooks(model) == len(lora.modules(model))
    with lora.bind(copy.deepcopy(model), lora.init(model)):
        pass
    gc.collect()
    slots = [h for m in model.modules() for h in m._forward_hooks.values()]
    assert all(isinstance(h, Slot) and h.binding is None for h in slots)


def test_a_nested_bind_replaces_and_restores() -> None:
    model = build("qwen2")
    lora = LoRA(PLACES["qwen2"], rank=2)
    first, second = (noisy(lora.init(model), seed) for seed in (1, 2))
    with lora.bind(model, second):
        alone = run(model)
    with lora.bind(model, first):
        before = run(model)
        with lora.bind(model, second):
            assert torch.equal(run(model), alone)
        assert torch.equal(run(model), before)
        with pytest.raises(RuntimeError, match="on purpose"), lora.bind(model, second):
            raise RuntimeError("on purpose")
        assert torch.equal(run(model), before)
        with pytest.raises(ProblemError), lora.bind(model, {}):
            pass
        assert torch.equal(run(model), before)
    assert bound(model) == {}


def test_deepcopy_and_pickle_even_while_bound() -> None:
    model = build("gpt2")
    lora = LoRA(PLACES["gpt2"], rank=2)
    fast = noisy(lora.init(model))
    base = run(model)

    def copies(values: Params) -> Tensor:
        with lora.bind(model, values):
            inside = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            for twin in inside:
                assert torch.equal(run(twin), base)
            return loss_of(run(model))

    copies(fast)
    grad(copies)(fast)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    with lora.bind(twin, fast), lora.bind(model, fast):
        assert torch.equal(run(twin), run(model))
    assert hooks(twin) == hooks(model)
    assert pickle.loads(pickle.dumps(lora)) == lora


def test_init(case: tuple[nn.Module, LoRA, Params]) -> None:
    model, lora, _ = case
    state = torch.random.get_rng_state()
    fast = lora.init(model)
    drawn = lora.init(model, torch.Generator().manual_seed(7))
    again = lora.init(model, torch.Generator().manual_seed(7))
    assert torch.equal(state, torch.random.get_rng_state())
    close(drawn, again, 0)
    close(fast, lora.init(model, torch.Generator().manual_seed(0)), 0)
    assert list(fast) == [f"{p}.lora_{x}" for p in lora.modules(model) for x in "AB"]
    for name, value in drawn.items():
        assert value.dtype == torch.float64 and not value.requires_grad
        if name.endswith("lora_B"):
            assert not value.any()
        else:
            edge = value.shape[1] ** -0.5
            assert 0.5 * edge < value.abs().max() <= edge
            assert not torch.equal(value, fast[name])
    # The same draws whatever the type.
    single = lora.init(build_like(model, torch.float32), torch.Generator().manual_seed(7))
    assert all(v.dtype == torch.float32 for v in single.values())
    close({k: v.double() for k, v in single.items()}, drawn, 1e-7)


def build_like(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype)


def test_types() -> None:
    model = build("llama", torch.bfloat16)
    lora = LoRA(all_linear, rank=2)
    fast = noisy(lora.init(model))
    assert all(v.dtype == torch.float32 for v in fast.values())
    with lora.bind(model, fast):
        assert run(model).dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 for v in grad(loss_bound(model, lora))(fast).values())

    # The products are taken in the type of the module, and the float32 fast weights are rounded to
    # it: a few roundings of bfloat16, relative to the whole.
    layer = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    fast = noisy(lora.init(layer))
    with lora.bind(layer, fast):
        got = layer(x)
    a, b = fast["0.lora_A"].double(), fast["0.lora_B"].double()
    exact = x.double() @ (layer[0].weight.double() + lora.scale * b @ a).T
    assert (got.double() - exact).norm() <= 2 * torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(dtype: torch.dtype) -> None:
    layer = nn.Sequential(nn.Linear(8, 8, bias=False)).to(dtype)
    lora = LoRA(all_linear, rank=2, alpha=4.0)
    fast = noisy(lora.init(layer))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16), lora.bind(layer, fast):
        got = layer(x)
    if dtype == torch.float64:  # autocast leaves double alone
        assert got.dtype == torch.float64
        return
    a, b = fast["0.lora_A"].bfloat16(), fast["0.lora_B"].bfloat16()
    base = x.bfloat16() @ layer[0].weight.bfloat16().T
    assert got.dtype == torch.bfloat16
    # Equal but for the roundings of the sum, of which there is one less.
    expected = base + 2 * (x.bfloat16() @ a.T) @ b.T
    assert (got - expected).norm() <= torch.finfo(torch.bfloat16).eps * expected.norm()


def test_errors() -> None:
    model = build("llama")
    for rank in (0, -1, 2.0, True):
        with pytest.raises(ProblemError, match="rank"):
            LoRA(all_linear, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="alpha"):
        LoRA(all_linear, alpha=float("inf"))
    with pytest.raises(PlacementError, match=r"'model\.layers\.1\.mlp' is a LlamaMLP"):
        LoRA(top_layers(0.5, ("mlp",))).init(model)
    with pytest.raises(PlacementError, match="no module 'nowhere'"):
        LoRA(lambda model: ("nowhere",)).modules(model)
    with pytest.raises(PlacementError, match=r"\['lm_head'\] more than once"):
        LoRA(lambda model: ("lm_head", "lm_head")).modules(model)

    lora = LoRA(matching(r".*1\.mlp\.up_proj"), rank=2)
    fast = lora.init(model)
    name = "model.layers.1.mlp.up_proj"
    other = LoRA(PLACES["gpt2"], rank=2).init(build("gpt2"))
    bad: list[tuple[Params, str]] = [
        ({}, f"missing.*{name}.lora_A"),
        (fast | {"extra": torch.zeros(1)}, "unknown.*extra"),
        (other, "missing.*up_proj.*unknown.*c_attn"),
        (
            fast | {f"{name}.lora_A": torch.zeros(3, 16)},
            rf"{name}\.lora_A' has shape \[3, 16\], expected \[2, 16\]",
        ),
    ]
    for values, message in bad:
        with pytest.raises(ProblemError, match=message), lora.bind(model, values):
            pass


def test_an_empty_placement_is_legal() -> None:
    model = build("llama")
    lora = LoRA(top_layers(0.0, ("up_proj",)))
    assert lora.init(model) == {} and lora.modules(model) == ()
    with lora.bind(model, {}):
        assert torch.equal(run(model), run(build("llama")))
    with pytest.raises(PlacementError, match="nothing to save"):
        lora.save(model, {}, "unused")


def test_the_whole_inner_step_compiles() -> None:
    model = build("llama").requires_grad_(False)
    lora = LoRA(PLACES["qwen2"], rank=2)
    fast = noisy(lora.init(model))
    step = grad(loss_bound(model, lora))
    compiled = torch.compile(lambda values: step(values), backend="aot_eager", fullgraph=True)
    for seed in range(2):
        values = noisy(fast, seed)
        close(compiled(values), step(values))


# Slots, the mechanism below.


def test_bound_and_rebind_recompute_a_layer() -> None:
    model = build("llama")
    lora = LoRA(PLACES["qwen2"], rank=2)
    fast, others = noisy(lora.init(model), 1), noisy(lora.init(model), 2)
    layer = model.get_submodule("model.layers.1")
    assert bound(layer) == {}
    with lora.bind(model, fast):
        tensors, how = bound(layer), functions(layer)
        expected = run(model)
        assert bound(model.get_submodule("model.layers.0")) == {}
    prefix = "model.layers.1."
    assert {prefix + k for k in tensors} == fast.keys()
    assert all(tensors[k] is fast[prefix + k] for k in tensors)
    assert how.keys() == {"mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj"}

    with rebind(layer, tensors, how):  # nothing is bound any more
        assert torch.equal(run(model), expected)
    with lora.bind(model, others):  # something else is bound
        with rebind(layer, tensors):
            assert torch.equal(run(model), expected)
        with rebind(layer, {}):
            assert torch.equal(run(model), run(build("llama")))
        with pytest.raises(RuntimeError, match="purpose"), rebind(layer, {}):
            raise RuntimeError("purpose")
        assert bound(model).keys() == others.keys()
    with rebind(
        layer.get_submodule("mlp.gate_proj"),
        {"lora_A": tensors["mlp.gate_proj.lora_A"]},
        {"": lambda module, args, output, values: output},
    ):
        assert bound(layer).keys() == {"mlp.gate_proj.lora_A"}
    assert bound(model) == {}

    with (
        pytest.raises(ProblemError, match=r"functions=functions\(module\)"),
        rebind(layer, tensors),
    ):
        pass
    with (
        pytest.raises(ProblemError, match=r"no slot.*nowhere"),
        rebind(layer, {"nowhere.x": TOKENS}),
    ):
        pass


def test_slots_serve_any_adapter() -> None:
    layer = nn.Linear(2, 2)
    assert slot(layer) is slot(layer)
    shift = Binding(lambda m, args, out, t: out + t["shift"], {"shift": torch.ones(2)})
    double = Binding(lambda m, args, out, t: 2 * out, {})
    x = torch.ones(2)
    base = layer(x)
    with bind([(layer, shift), (layer, double)]):
        assert torch.equal(layer(x), 2 * base)
    assert torch.equal(layer(x), base)
    dotted = Binding(shift.apply, {"a.b": x})
    with pytest.raises(ProblemError, match="dot"), bind([(layer, dotted)]):
        pass


# PEFT


@peft_warnings
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("alpha", [8.0, 2.5, None])
def test_peft_loads_what_was_saved(name: str, alpha: float | None, tmp_path: Path) -> None:
    from peft import PeftModel

    model = build(name, torch.float32)
    lora = LoRA(PLACES[name], rank=3, alpha=alpha)
    fast = noisy(lora.init(model))
    with lora.bind(model, fast):
        expected = run(model)
    lora.save(model, fast, tmp_path / "new" / "adapter")
    loaded = PeftModel.from_pretrained(build(name, torch.float32), tmp_path / "new" / "adapter")
    adapted = [n for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert tuple(adapted) == lora.modules(model)
    torch.testing.assert_close(run(loaded.eval()), expected, rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    number = 6.0 if alpha is None else alpha
    assert config["r"] == 3 and config["lora_alpha"] == number
    assert config["fan_in_fan_out"] == (name == "gpt2")

    from peft import LoraConfig

    back = LoRA.from_peft(LoraConfig.from_pretrained(tmp_path / "new" / "adapter"))
    assert back.modules(model) == lora.modules(model)
    assert (back.rank, back.alpha, back.scale) == (3, number, lora.scale)


def test_alpha_follows_the_rank() -> None:
    """A sweep over ranks by `dataclasses.replace` keeps the scale of the update."""
    lora = LoRA(lambda model: ())
    assert lora.scale == dataclasses.replace(lora, rank=4).scale == 2.0
    assert dataclasses.replace(lora, rank=4, alpha=2.0).scale == 0.5


@peft_warnings
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.1\.mlp\..*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        {"target_modules": r".*_proj", "exclude_modules": r".*mlp.*"},
    ],
    ids=str,
)
def test_from_peft_places_as_peft_does(options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options)
    lora = LoRA.from_peft(config)
    assert (lora.rank, lora.alpha) == (2, 6.0)
    assert pickle.loads(pickle.dumps(lora)) == lora
    model = build("llama")
    chosen = lora.modules(model)
    wrapped = get_peft_model(model, config).base_model.model
    assert chosen == tuple(n for n, m in wrapped.named_modules() if hasattr(m, "lora_A"))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_dropout": 0.1},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "gaussian"},
        {"lora_bias": True},
        {"target_modules": None},
    ],
    ids=str,
)
def test_from_peft_refuses_what_it_cannot_do(options: dict[str, Any]) -> None:
    from peft import LoraConfig

    config = LoraConfig(**({"target_modules": ["q_proj"]} | options))
    with pytest.raises(ProblemError, match=re.escape(next(iter(options)))):
        LoRA.from_peft(config)


def test_from_peft_without_a_match() -> None:
    from peft import LoraConfig

    lora = LoRA.from_peft(LoraConfig(target_modules=["no_such"]))
    with pytest.raises(PlacementError, match="no_such"):
        lora.init(build("llama"))


def test_a_second_name_of_a_shared_module_is_refused():
    # Its fast weights would be overwritten by those of the first name, and have no gradient.
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    with pytest.raises(PlacementError, match="has no module '2'"):
        LoRA(lambda model: ("0", "2"), rank=1).init(model)
