"""An interrupt at any moment leaves model, generators and modes as they were.

Outside of what enters and leaves a block that holds as soon as the exception arrives; after an
interrupt inside an exit it holds when the next call has begun.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from interrupts import Interrupt, difference, everything
from models import build, chat_batch
from torch import nn

import metafocus as mf
from metafocus import masks
from metafocus.adapters.protocol import Adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # Two steps are no solution.
    pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning"),
]

LORA = mf.LoRA(mf.top_layers(0.5, ("gate_proj", "up_proj", "down_proj")), 2, 4.0)
COPIES = mf.FullWeights(mf.top_layers(0.5, ("mlp",)))
SOLVER = mf.SGD(0.5, 2, clip=mf.clip_per_tensor(1.0))


class Failure(Exception):
    """An error that no code expects, unlike RuntimeError, which some checks translate."""


@dataclasses.dataclass
class Scenario:
    """A call: `begin` runs forwards and returns a loss or values, and `finish` backwards."""

    model: nn.Module
    begin: Callable[[], torch.Tensor]
    generators: tuple[torch.Generator, ...] = ()
    seed: int = 0

    def __post_init__(self):
        self.before: dict = {}

    def run(self) -> list[float]:
        """Run the call from the same random state; remember the state that is to be kept."""
        torch.manual_seed(self.seed)
        for generator in self.generators:
            generator.manual_seed(self.seed)
        self.model.zero_grad()
        self.before = everything(self.model, *self.generators)
        value = self.begin()
        # What a finished call has drawn is drawn.
        self.before = everything(self.model, *self.generators)
        if value.requires_grad:
            value.backward()
        slopes = [p.grad.sum().item() for p in self.model.parameters() if p.grad is not None]
        return value.detach().flatten().tolist() + slopes

    def odd(self) -> dict:
        return difference(self.before, everything(self.model, *self.generators))


def tiny(**options):
    return build(
        layers=2,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        **options,
    )


def focusft(estimator=None, adapter: Adapter = LORA, *, per_example=False, **options) -> Scenario:
    model, batch, generator = tiny(**options), chat_batch(), torch.Generator()
    meta = mf.recipes.focusft(
        model,
        adapter=adapter,
        solver=SOLVER,
        estimator=estimator,
        generator=generator,
        per_example=per_example,
    )
    return Scenario(model, lambda: meta({}, mf.Episode(batch, batch))[0], (generator,))


def profile() -> Scenario:
    model, batch = tiny(), chat_batch()
    fast = LORA.init(model)

    def begin():
        settings = {"mask": masks.causal, "adapter": LORA, "fast": fast}
        return mf.diagnostics.attention_profile(model, batch, **settings).sink_mass

    return Scenario(model, begin)


def adapt() -> Scenario:
    model, batch = tiny(), chat_batch()
    loss = mf.lm_loss(model, adapter=LORA, mask=masks.context_bidirectional)
    problem = mf.Problem(loss, loss, lambda slow, support: LORA.init(model))
    outer = mf.trainable(model)
    return Scenario(model, lambda: mf.adapt(problem, outer, batch, solver=SOLVER).losses)


def network(estimator, *, tasks: int = 0, dropout: float = 0.0) -> Scenario:
    """Batch norm that counts its batches, and dropout, on the plain engine."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 1)
    net = nn.Sequential(*layers).double().train()
    lead = (tasks,) if tasks else ()
    x, y = torch.randn(*lead, 6, 3).double(), torch.randn(*lead, 6, 1).double()

    def loss(fast, slow, data):
        return (torch.func.functional_call(net, fast, (data[0],)) - data[1]).square().mean()

    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.Adam(0.1, steps=2), estimator=estimator)
    gradient = mf.hypergrad(mf.over_tasks(meta) if tasks else meta)

    def begin():
        grads, (value, _) = gradient(mf.trainable(net), mf.Episode((x, y), (x, y)))
        return torch.stack([value, *(g.sum() for g in grads.values())]).detach()

    return Scenario(net, begin)


SCENARIOS: dict[str, tuple[Callable[[], Scenario], int]] = {
    "first order": (focusft, 20),
    "copies of weights": (lambda: focusft(adapter=COPIES), 20),
    "checkpointing": (lambda: focusft(checkpointing=True), 15),
    "recompute": (lambda: focusft(mf.Unrolled(recompute=True)), 15),
    "recompute and checkpointing": (
        lambda: focusft(mf.Unrolled(recompute=True), adapter=COPIES, checkpointing=True),
        10,
    ),
    "implicit": (lambda: focusft(mf.Implicit(mf.CG(2))), 10),
    "per example": (lambda: focusft(per_example=True), 20),
    "eager attention": (lambda: focusft(attn="eager"), 10),
    "profile": (profile, 20),
    "adapt": (adapt, 10),
    "network": (lambda: network(mf.Unrolled(), dropout=0.3), 60),
    "network, implicit": (lambda: network(mf.Implicit(mf.CG(2))), 40),
    "network, over tasks": (lambda: network(mf.Unrolled(), tasks=3), 40),
}
"""Each with the number of interrupts that a quick run tries."""


def interrupted(name: str, count: int, *, errors=(KeyboardInterrupt, Failure), **options):
    """Yield a scenario and the place after each of `count` interrupts; then call it as usual."""
    scenario = SCENARIOS[name][0]()
    # What is found out about a model once stays known: a trial may take an error for an answer.
    expected = scenario.run()
    assert scenario.run() == expected
    with Interrupt(None, **options) as counter:
        scenario.run()
    draw = random.Random(name)
    for _ in range(count):
        interrupt = Interrupt(draw.randint(1, counter.count), draw.choice(errors), **options)
        try:
            with interrupt:
                scenario.run()
        except (KeyboardInterrupt, Failure) as error:
            assert "on purpose" in str(error), interrupt.where
            # A notebook keeps the last exception, and with it every frame.
            kept = error
            yield scenario, interrupt.where
        else:
            assert interrupt.where is None
            kept = None
        assert scenario.run() == expected, (interrupt.where, kept)
        assert scenario.odd() == {}, interrupt.where


def check_interrupts(name: str, count: int) -> None:
    hits = 0
    for scenario, where in interrupted(name, count):
        assert scenario.odd() == {}, where
        hits += 1
    assert hits > count / 2


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_left_behind(name):
    check_interrupts(name, SCENARIOS[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_left_behind_by_many_interrupts(name):
    """2,000 interrupts in all."""
    check_interrupts(name, 2000 // len(SCENARIOS) + 1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_interrupted_exit_is_made_good_by_the_next_call(name):
    count = max(SCENARIOS[name][1] // 2, 8)
    for _ in interrupted(name, count, errors=(KeyboardInterrupt,), exits=True):
        pass


@pytest.mark.parametrize("name", ["checkpointing", "recompute", "network", "profile"])
def test_an_interrupted_first_call(name):
    """The first call tries the model and the problem; the second one finds nothing of that."""
    make = SCENARIOS[name][0]
    expected = make().run()
    with Interrupt(None) as counter:
        make().run()
    draw = random.Random(name)
    for _ in range(8):
        scenario = make()
        interrupt = Interrupt(draw.randint(1, counter.count))
        with pytest.raises(KeyboardInterrupt), interrupt:
            scenario.run()
            raise KeyboardInterrupt  # nothing was met
        if interrupt.where:
            assert scenario.odd() == {}, interrupt.where
        assert scenario.run() == expected, interrupt.where
