"""A model belongs to one call at a time; a graph carries its call into other threads."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from interrupts import difference, everything
from models import chat_batch, grads
from test_interrupted import COPIES, LORA, SOLVER, tiny

import metafocus as mf
from metafocus import calls, masks
from metafocus.adapters import slots
from metafocus.adapters.protocol import Adapter
from metafocus.errors import ProblemError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # Two steps are no solution.
    pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning"),
]

IN_USE = "in use by another call.*one call at a time.*copy.deepcopy"
PATIENCE = 120
"""Seconds after which a thread that waits has failed."""


def in_thread(function):
    """Return `function()`, run in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(PATIENCE)


class Gate:
    """Stops the first thread that comes by until it is opened."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, *args):
        if not self.reached.is_set():
            self.reached.set()
            assert self.opened.wait(PATIENCE)


@contextlib.contextmanager
def under_way(function, gate):
    """Run `function()` in another thread, which waits at the gate while the block runs.

    Yields:
        A function that returns its result; to be called after the block.
    """
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(function)
        try:
            assert gate.reached.wait(PATIENCE)
            yield lambda: first.result(PATIENCE)
        finally:
            gate.opened.set()
        # An error of the first call is not lost.
        first.result(PATIENCE)


def focusft(model, **options):
    options = {"adapter": LORA, "solver": SOLVER, **options}
    generator, batch = torch.Generator(), chat_batch()
    meta = mf.recipes.focusft(model, generator=generator, **options)

    def step(backward=torch.Tensor.backward):
        model.zero_grad()
        generator.manual_seed(0)
        loss, _ = meta({}, mf.Episode(batch, batch))
        backward(loss)
        return loss.item(), grads(model).tolist()

    return step


def loss_of(model, adapter: Adapter = LORA):
    return mf.lm_loss(model, adapter=adapter, mask=masks.causal)


def evaluate(model):
    return loss_of(model)(LORA.init(model), {}, chat_batch())


def bind(model):
    with LORA.bind(model, LORA.init(model)):
        return model(chat_batch()["input_ids"])


def profile(model):
    return mf.diagnostics.attention_profile(model, chat_batch(), mask=masks.causal)


def adapt(model):
    loss = loss_of(model)
    problem = mf.Problem(loss, loss, lambda slow, support: LORA.init(model))
    return mf.adapt(problem, mf.trainable(model), chat_batch(), solver=SOLVER)


def bind_slots(model):
    layer = model.model.layers[-1].mlp.up_proj
    binding = slots.Binding(lambda module, args, output, tensors: 2 * output, {})
    with slots.bind([(layer, binding)]):
        return model(chat_batch()["input_ids"])


SECOND = [lambda model: focusft(model)(), evaluate, bind, profile, adapt]
NAMES = ["focusft", "lm_loss", "bind", "profile", "adapt"]


@pytest.mark.parametrize("second", SECOND, ids=NAMES)
def test_a_second_call_on_a_model_in_use_is_refused(second):
    model, gate = tiny(), Gate()
    # A layer with a hook runs as a whole, so that the last digits of gradients are others.
    model.model.layers[-1].register_forward_hook(lambda *args: None)
    step = focusft(model)
    expected = step()
    before = everything(model)
    handle = model.model.layers[-1].register_forward_hook(gate)
    with under_way(step, gate) as first, pytest.raises(ProblemError, match=IN_USE):
        second(model)
    # The refused call has changed nothing for the first one.
    assert first() == expected
    handle.remove()
    assert difference(before, everything(model)) == {}
    second(model)
    assert step() == expected


def waiting(gate, what):
    """Return settings of FocuSFT that wait at a gate: before, between and after its losses."""
    if what == "mask":
        return {"mask": lambda batch: gate() or masks.context_bidirectional(batch)}
    if what == "tokens":
        return {"inner_tokens": lambda batch: gate() or mf.answer_tokens(batch)}
    if what == "start":

        class Slow(mf.LoRA):
            def init(self, model, generator=None):
                gate()
                return super().init(model, generator)

        return {"adapter": Slow(LORA.where, 2, 4.0)}

    class Updates(mf.SGD):
        def update(self, params, grads, state, step, outer):
            gate()
            return super().update(params, grads, state, step, outer)

    return {"solver": Updates(0.5, 2)}


@pytest.mark.parametrize("where", ["mask", "tokens", "start", "update"])
def test_a_call_keeps_its_model_from_beginning_to_end(where):
    model, gate = tiny(), Gate()
    evaluate(model)
    step = focusft(model, **waiting(gate, where))
    with under_way(step, gate), pytest.raises(ProblemError, match=IN_USE):
        evaluate(model)
    evaluate(model)


def test_slots_of_a_model_in_use_are_refused_without_its_name():
    """`slots.bind` is not told the model; another call has changed the slot."""
    model, gate = tiny(), Gate()
    evaluate(model)
    handle = model.model.layers[-1].register_forward_hook(gate)
    refused = pytest.raises(ProblemError, match="a part of a model.*" + IN_USE)
    with under_way(lambda: evaluate(model), gate), refused:
        bind_slots(model)
    handle.remove()
    bind_slots(model)


def test_two_models_in_two_threads():
    models = [tiny(), tiny(checkpointing=True)]
    for model in models:
        # As above: a layer with a hook runs as a whole.
        model.model.layers[0].register_forward_hook(lambda *args: None)
    steps = [focusft(model, estimator=mf.Unrolled(recompute=True)) for model in models]
    expected = [step() for step in steps]
    barrier, met = threading.Barrier(2), set()

    def meet(*args):
        # Both are inside of a forward pass at the same time.
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            barrier.wait(PATIENCE)

    for model in models:
        model.model.layers[0].register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        found = [f.result(PATIENCE) for f in [pool.submit(step) for step in steps]]
    assert found == expected and len(met) == 2


BACKWARD = {
    "checkpointing": ({}, {"checkpointing": True}),
    "recompute": ({"estimator": mf.Unrolled(recompute=True)}, {}),
    "both, copies": (
        {"estimator": mf.Unrolled(recompute=True), "adapter": COPIES},
        {"checkpointing": True},
    ),
    "implicit": ({"estimator": mf.Implicit(mf.CG(2))}, {}),
}


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("inside", [False, True], ids=["call over", "call waits"])
def test_a_backward_pass_in_another_thread(name, inside):
    """As on CUDA. The call that made the graph may be over, or wait for the backward pass."""
    options, changes = BACKWARD[name]
    model = tiny(**changes)
    step = focusft(model, **options)
    expected = step()
    with calls.using(model) if inside else contextlib.nullcontext():
        assert step(lambda loss: in_thread(loss.backward)) == expected


def test_a_new_call_in_another_thread_is_refused_where_a_backward_pass_is_not():
    model = tiny()
    evaluate(model)
    with LORA.bind(model, LORA.init(model)):
        with pytest.raises(ProblemError, match=IN_USE):
            in_thread(lambda: evaluate(model))
        # The same thread goes on with the model.
        evaluate(model)
    in_thread(lambda: evaluate(model))


def test_a_backward_pass_of_a_model_in_use_is_refused():
    model, gate = tiny(checkpointing=True), Gate()
    batch = chat_batch()
    loss, _ = mf.recipes.focusft(model, adapter=LORA)({}, mf.Episode(batch, batch))
    handle = model.model.layers[-1].register_forward_hook(gate)
    refused = pytest.raises(ProblemError, match=IN_USE)
    with under_way(lambda: evaluate(model), gate), refused:
        loss.backward()
    handle.remove()


def test_tasks_of_one_thread_are_calls_of_their_own():
    model = tiny()
    fast = LORA.init(model)

    async def hold(entered, leave):
        with LORA.bind(model, fast):
            entered.set()
            await leave.wait()

    async def both():
        entered, leave = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(hold(entered, leave))
        await entered.wait()
        with pytest.raises(ProblemError, match=IN_USE):
            await hold(asyncio.Event(), leave)
        leave.set()
        await first
        await hold(asyncio.Event(), leave)

    asyncio.run(both())


def test_a_loss_inside_its_own_forward_pass_is_refused():
    model = tiny()
    model.model.layers[0].register_forward_hook(lambda *args: None)
    step = focusft(model)
    expected = step()
    inside = []

    def hook(*args):
        if not inside:
            inside.append(1)
            step()

    handle = model.model.layers[0].register_forward_hook(hook)
    before = everything(model)
    with pytest.raises(ProblemError, match=r"inside its own forward pass.*copy.deepcopy\(model\)"):
        step()
    handle.remove()
    inside.clear()
    after = difference(before, everything(model))
    assert {k for k in after if k[1:] != ("_forward_hooks",)} == set()
    assert step() == expected


def test_three_levels_on_one_model():
    """A call between two forward passes of another one finds the model as it is."""
    model, batch = tiny(), chat_batch()
    outer, episode = mf.trainable(model), mf.Episode(batch, batch)

    def bilevel(adapter, upper):
        problem = mf.Problem(
            loss_of(model, adapter), upper, lambda slow, support: adapter.init(model)
        )
        return mf.bilevel(problem, solver=mf.SGD(0.1, 1), estimator=mf.FirstOrder())

    inner = bilevel(COPIES, loss_of(model, COPIES))
    plain = bilevel(LORA, loss_of(model))

    def upper(fast, slow, data):
        return loss_of(model)(fast, slow, data) + inner(slow, episode)[0]

    both = bilevel(LORA, upper)(outer, episode)[0]
    assert torch.equal(both, plain(outer, episode)[0] + inner(outer, episode)[0])


def test_a_copy_is_a_model_of_its_own():
    model = tiny()
    twin = copy.deepcopy(model)
    expected = focusft(model)()
    with calls.using(model):
        assert in_thread(focusft(twin)) == expected
