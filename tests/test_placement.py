from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from metafocus.adapters import LoRA, all_linear, matching, top_layers
from metafocus.adapters.placement import adaptable, is_conv1d
from metafocus.errors import PlacementError

LLAMA_LIKE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MLP = ("gate_proj", "up_proj", "down_proj")


def build(name: str, layers: int = 4) -> nn.Module:
    with torch.random.fork_rng(), torch.device("meta"):
        if name == "GPT2":
            config: Any = transformers.GPT2Config(
                vocab_size=64, n_embd=16, n_layer=layers, n_head=2, n_positions=32
            )
            return transformers.GPT2LMHeadModel(config)
        kind = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
        config = getattr(transformers, kind)(**LLAMA_LIKE, num_hidden_layers=layers)
        return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Llama", "Mistral", "Gemma2", "Gemma3"])
def test_top_layers_of_llama_like_models(name: str) -> None:
    model = build(name)
    expected = tuple(f"model.layers.{i}.mlp.{m}" for i in (2, 3) for m in MLP)
    assert top_layers(0.5, MLP)(model) == expected
    assert top_layers(0.5, tuple(f"mlp.{m}" for m in MLP))(model) == expected
    assert all(adaptable(model.get_submodule(path)) for path in expected)
    linear = all_linear(model)
    assert len(linear) == 4 * 7 and not any("lm_head" in path for path in linear)
    assert top_layers(1.0, ("self_attn.o_proj",))(model) == tuple(
        f"model.layers.{i}.self_attn.o_proj" for i in range(4)
    )


def test_gpt2() -> None:
    model = build("GPT2")
    assert top_layers(0.25, ("c_fc", "mlp.c_proj"))(model) == (
        "transformer.h.3.mlp.c_fc",
        "transformer.h.3.mlp.c_proj",
    )
    assert len(top_layers(0.25, ("c_proj",))(model)) == 2  # the attention's and the MLP's
    assert len(all_linear(model)) == 16
    assert is_conv1d(model.get_submodule("transformer.h.0.mlp.c_fc"))


class Stack(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(1, 1)}) for _ in range(count))


@pytest.mark.parametrize(
    ("count", "fraction", "first"),
    [(10, 0.8, 2), (10, 0.2, 8), (10, 1.0, 0), (28, 0.35, 18), (36, 0.35, 23), (3, 0.01, 2)]
    + [(n, k / n, n - k) for n in (5, 7, 12, 32, 80) for k in range(1, n, 3)],
)
def test_layer_rule(count: int, fraction: float, first: int) -> None:
    chosen = top_layers(fraction, ("up",))(Stack(count))
    assert chosen == tuple(f"layers.{i}.up" for i in range(first, count))


def test_fraction_zero_places_nothing() -> None:
    assert top_layers(0, ("up",))(Stack(2)) == top_layers(0.0, ("no_such",))(Stack(2)) == ()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, 35, float("nan")])
def test_fraction_outside_is_refused_at_construction(fraction: float) -> None:
    with pytest.raises(PlacementError, match=r"fraction.*\[0, 1\]"):
        top_layers(fraction, ("up",))


@pytest.mark.parametrize("names", ["gate_proj", ()])
def test_names_must_be_a_tuple_of_names(names: Any) -> None:
    with pytest.raises(PlacementError, match="tuple"):
        top_layers(0.5, names)


def test_no_match_lists_what_exists() -> None:
    with pytest.raises(PlacementError, match=r"'gate_proj'.*attn\.c_attn.*mlp\.c_fc"):
        top_layers(0.5, ("gate_proj",))(build("GPT2"))
    # A typing error in one of several names must not pass unnoticed.
    with pytest.raises(PlacementError, match=r"\['gate_porj'\]"):
        top_layers(0.5, ("gate_porj", "up_proj"))(build("Qwen2"))
    with pytest.raises(PlacementError, match=r"'up'.*\['0'\]"):
        top_layers(0.5, ("up",))(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(PlacementError, match=r"'model\.layers\.0\.self_attn\.q_proj'"):
        matching("up_proj")(build("Qwen2"))
    with pytest.raises(PlacementError, match="no linear module"):
        all_linear(nn.Tanh())
    stack = Stack(4)
    stack.layers[0]["low"] = nn.Linear(1, 1)  # type: ignore[index]
    with pytest.raises(PlacementError, match=r"layers 2 to 3 of 'layers'.*\[0\]"):
        top_layers(0.5, ("low",))(stack)


def test_two_lists_of_layers_are_ambiguous() -> None:
    model = nn.ModuleDict({"vision": Stack(2), "text": Stack(2)})
    with pytest.raises(PlacementError, match=r"'vision\.layers', 'text\.layers'.*matching"):
        top_layers(0.5, ("up",))(model)
    assert matching(r"text\.layers\..*\.up")(model) == ("text.layers.0.up", "text.layers.1.up")


def test_nested_lists_count_the_outermost() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(Stack(3) for _ in range(2))})
    chosen = top_layers(0.5, ("up",))(model)
    assert chosen == tuple(f"layers.1.layers.{i}.up" for i in range(3))
    bare = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(1, 1)}) for _ in range(2))
    assert top_layers(0.5, ("up",))(bare) == ("1.up",)


def test_matching() -> None:
    assert matching(r".*\.[02]\.mlp\.up_proj")(build("Llama")) == (
        "model.layers.0.mlp.up_proj",
        "model.layers.2.mlp.up_proj",
    )
    assert matching("lm_head")(build("Llama")) == ("lm_head",)
    with pytest.raises(PlacementError, match="is not a regular expression"):
        matching("(")


def test_the_projection_inside_multihead_attention_is_not_adaptable() -> None:
    model = nn.TransformerEncoderLayer(4, 1, 8)
    assert all_linear(model) == ("linear1", "linear2")


def test_placements_are_values() -> None:
    a, b = top_layers(0.5, ["up"]), top_layers(0.5, ("up",))
    assert a == b and hash(a) == hash(b) and pickle.loads(pickle.dumps(a)) == a
    assert repr(a) == "top_layers(fraction=0.5, names=('up',))"
    assert matching("x") == pickle.loads(pickle.dumps(matching("x")))


class Fused(nn.Module):
    """A layer of a user's own that multiplies by the weight itself, and asks for its type."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.linear(x.to(self.down.weight.dtype), self.up.weight))


def test_a_weight_that_a_users_own_layer_reads_itself():
    """Hooks of `up` are never called: its fast weights did nothing, beside others that adapt."""
    model = nn.Sequential(Fused())
    assert all_linear(model) == ("0.down",)
    with pytest.raises(PlacementError, match=r"names '0\.up', whose weight Sequential reads"):
        LoRA(matching(r".*\.(up|down)")).modules(model)
