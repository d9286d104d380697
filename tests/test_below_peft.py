"""Fast weights below the adapters of PEFT are added to the weight that is wrapped, or refused.

Two of PEFT's kinds (HRA, SHiRA) multiply by a weight that they make of the wrapped one and never
call the layer: fast weights there did nothing, without a word. DoRA calls it, and divides by the
norm of its weight, which is another one with the fast weights.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from trainer_script import COLLATOR, SAMPLES, tiny

import metafocus as mf
from metafocus.errors import PlacementError
from metafocus.trainer.peft import BelowPeft

peft = pytest.importorskip("peft")

NAMES = ["up_proj", "down_proj"]
ADDING = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False),
    "rsLoRA": lambda: peft.LoraConfig(
        r=2, target_modules=NAMES, init_lora_weights=False, use_rslora=True
    ),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=NAMES, init_weights=False),
    "IA3": lambda: peft.IA3Config(
        target_modules=NAMES, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "OFT": lambda: peft.OFTConfig(
        r=4, oft_block_size=0, target_modules=["up_proj"], init_weights=False
    ),
}
READING = {
    "DoRA": lambda: peft.LoraConfig(
        r=2, target_modules=NAMES, init_lora_weights=False, use_dora=True
    ),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=NAMES, init_weights=False),
    "SHiRA": lambda: peft.ShiraConfig(r=2, target_modules=["up_proj"], init_weights=False),
}


def inner(*names: str) -> mf.LoRA:
    return mf.LoRA(BelowPeft(mf.top_layers(0.5, names)), rank=2, alpha=3.0)


def wrapped(config):
    torch.manual_seed(2)
    with warnings.catch_warnings():
        # peft asks transformers by a name that is about to go.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(tiny(), config()).double().eval()


@pytest.mark.parametrize("config", ADDING.values(), ids=list(ADDING))
def test_they_are_added_to_the_wrapped_weight(config):
    model, adapter = wrapped(config), inner(*NAMES)
    torch.manual_seed(3)
    fast = {name: torch.randn_like(x) for name, x in adapter.init(model).items()}
    zero = {name: torch.zeros_like(x) for name, x in fast.items()}
    loss = mf.lm_loss(model, adapter=adapter, mask=mf.masks.causal)
    batch = COLLATOR(SAMPLES[:2])
    with torch.no_grad():
        without, found = loss(zero, {}, batch), loss(fast, {}, batch)
        modules = dict(model.named_modules())
        for path in adapter.modules(model):
            # alpha / rank = 1.5
            modules[path].weight += 1.5 * fast[f"{path}.lora_B"] @ fast[f"{path}.lora_A"]
        expected = loss(zero, {}, batch)
    assert abs(found - without) > 1e-4  # it is 0 where nobody calls the layer
    assert abs(found - expected) < 1e-12  # float64


@pytest.mark.parametrize("config", READING.values(), ids=list(READING))
def test_a_wrapped_weight_that_is_read_directly(config):
    model = wrapped(config)
    text = r"up_proj\.base_layer', whose weight PeftModel reads .* an adapter that only adds"
    with pytest.raises(PlacementError, match=text):
        inner(*NAMES).modules(model)
    # Elsewhere they are possible.
    assert [path.rpartition(".")[2] for path in inner("gate_proj").modules(model)] == ["gate_proj"]
