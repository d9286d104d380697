"""Fast weights per example: a batch of B is B runs with one example each."""

from __future__ import annotations

import pytest
import torch
from models import NAMES, build, chat_batch, grads, relative
from torch import nn

import metafocus as mf
from metafocus.adapters import all_linear, for_each, one_of
from metafocus.errors import ProblemError
from metafocus.lm.per_example import PerExampleLoss, PerExampleSolver
from metafocus.recipes import focusft

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ADAPTER = mf.LoRA(mf.top_layers(0.75, NAMES), rank=4, alpha=8.0)
# The clip acts: norms before it are 0.2 to 3.
CLIPPED = mf.SGD(1.0, steps=3, clip=mf.clip_per_tensor(0.3))
SOLVERS = {
    "clip_per_tensor": CLIPPED,
    "clip_global": mf.SGD(1.0, steps=3, momentum=0.9, clip=mf.clip_global(0.3)),
    # With the usual eps, entries with a gradient of 1e-6 magnify its rounding 1e6-fold.
    "adam": mf.Adam(0.01, steps=3, eps=1e-3, clip=mf.clip_global(0.3)),
}


def batch_of_four():
    """Answers of 7, 6, 14 and no tokens; rows of 24, 20, 30 and 24."""
    two, more = chat_batch(), chat_batch(30, seed=1)
    batch = {
        k: torch.cat([nn.functional.pad(two[k], (0, 6), value=fill), more[k]])
        for k, fill in (
            ("input_ids", 0), ("attention_mask", 0), ("answer_mask", False), ("turn_ids", -1),
        )
    }  # fmt: skip
    batch["answer_mask"][3] = False
    return batch


def alone(batch, row):
    """One example without the padding of the others."""
    length = int(batch["attention_mask"][row].sum())
    return {k: v[row : row + 1, :length] for k, v in batch.items()}


def plain_norms(model):
    """Swap Hugging Face's RMSNorm, which rounds to float32, for torch's own."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                new = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                new.weight = child.weight
                setattr(parent, name, new)
    return model


def meta_of(model, solver=CLIPPED, estimator=None, **options):
    generator = torch.Generator().manual_seed(7)
    options = {"adapter": ADAPTER, "solver": solver, "estimator": estimator, **options}
    return focusft(model, generator=generator, **options)


def separately(batch, **options):
    """B runs; the outer loss is the mean over all answer tokens."""
    model = plain_norms(build())
    fast, inner, total, count = [], [], 0.0, 0
    for row in range(len(batch["input_ids"])):
        sample = alone(batch, row)
        loss, aux = meta_of(model, **options)({}, mf.Episode(sample, sample))
        tokens = int(sample["answer_mask"][:, 1:].sum())
        total, count = total + loss * tokens, count + tokens
        fast.append(aux.params)
        inner.append(aux.inner_losses)
    loss = total / count
    loss.backward()
    return loss.item(), fast, inner, grads(model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "estimator", [mf.FirstOrder(), mf.Unrolled(), mf.Unrolled(recompute=True)], ids=str
)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_batch_is_its_examples_alone(solver, estimator, checkpointing):
    batch = batch_of_four()
    expected, fast, inner, gradient = separately(batch, solver=solver, estimator=estimator)
    model = plain_norms(build(checkpointing=checkpointing))
    meta = meta_of(model, solver, estimator, per_example=True)
    loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    # float64, the same operations on other shapes.
    assert loss.item() == pytest.approx(expected, rel=1e-13)
    for row, own in enumerate(fast):
        for name, value in own.items():
            torch.testing.assert_close(aux.params[name][row], value, rtol=1e-12, atol=1e-12)
    assert relative(grads(model), gradient) < 1e-12
    # The mean over the three examples that have answers.
    torch.testing.assert_close(aux.inner_losses, torch.stack(inner[:3]).mean(0), rtol=1e-12, atol=0)


def test_second_order_in_forward_mode():
    """Starts of all examples have memory of their own, or forward mode refuses them."""
    batch, found = batch_of_four(), []
    for hvp in (mf.hvp_reverse, mf.hvp_forward):
        model = plain_norms(build())
        meta = meta_of(model, estimator=mf.Unrolled(hvp=hvp), per_example=True)
        meta({}, mf.Episode(batch, batch))[0].backward()
        found.append(grads(model))
    assert relative(*found) < 1e-12


def test_an_example_without_answers_stays_at_the_start():
    batch = batch_of_four()
    model = build()
    _, aux = meta_of(model, per_example=True)({}, mf.Episode(batch, batch))
    start = ADAPTER.init(model, torch.Generator().manual_seed(7))
    for name, value in aux.params.items():
        assert value.shape == (4, *start[name].shape)
        assert torch.equal(value[3], start[name])
        assert not torch.equal(value[0], start[name])


def test_examples_do_not_see_each_other():
    """Another third example leaves the other fast weights as they are, bit by bit."""
    batch, other = batch_of_four(), batch_of_four()
    other["input_ids"][2] = other["input_ids"][2].flip(0)
    found = []
    for one in (batch, other):
        found.append(meta_of(build(), per_example=True)({}, mf.Episode(one, one))[1].params)
    for name, value in found[0].items():
        again = found[1][name]
        assert torch.equal(value[[0, 1, 3]], again[[0, 1, 3]]) and not torch.equal(
            value[2], again[2]
        )
    # Shared fast weights do see all examples.
    shared = [meta_of(build())({}, mf.Episode(x, x))[1].params for x in (batch, other)]
    assert not any(torch.equal(shared[0][k], shared[1][k]) for k in shared[0])


def test_a_plain_mean_over_tokens_would_be_wrong():
    """The teeth of the test above: with the usual loss, the examples adapt by n_b / N."""
    batch = batch_of_four()
    model = build()
    start = for_each(ADAPTER.init(model, torch.Generator().manual_seed(7)), 4)
    usual = mf.lm_loss(model, adapter=ADAPTER, mask=mf.masks.context_bidirectional)
    each = PerExampleLoss(model, ADAPTER, mf.masks.context_bidirectional, mf.answer_tokens)
    one, own = (torch.func.grad(lambda f, x=x: x(f, {}, batch))(start) for x in (usual, each))
    counts = batch["answer_mask"].sum(1)
    for name in start:
        for row in range(4):
            share = counts[row] / counts.sum()
            torch.testing.assert_close(one[name][row], share * own[name][row])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_families(family):
    batch = chat_batch()
    attn = "eager" if family == "gemma2" else "sdpa"
    names = ("c_fc", "mlp.c_proj") if family == "gpt2" else NAMES
    options = {"adapter": mf.LoRA(mf.top_layers(0.5, names), rank=2, alpha=4.0)}
    model = build(family, attn)
    aux = meta_of(model, per_example=True, **options)({}, mf.Episode(batch, batch))[1]
    for row in range(2):
        sample = alone(batch, row)
        own = meta_of(build(family, attn), **options)({}, mf.Episode(sample, sample))[1].params
        for name, value in own.items():
            # Eager attention and RMSNorm round to float32, where padding changes sums.
            torch.testing.assert_close(aux.params[name][row], value, rtol=1e-5, atol=1e-6)


def test_batches_of_several_sizes_share_one_generator():
    meta = meta_of(build(), per_example=True)
    batch = chat_batch()
    sizes = [meta({}, mf.Episode(x, x))[1].params for x in (batch, alone(batch, 0), batch)]
    name = next(iter(sizes[0]))
    assert [len(x[name]) for x in sizes] == [2, 1, 2]
    # lora_A barely moves in three steps; the starts are three draws.
    assert not torch.allclose(sizes[0][name][0], sizes[2][name][0], atol=0.05)


def test_over_tasks():
    """vmap over episodes, each a batch with its own fast weights per example."""
    episodes = [chat_batch(seed=s) for s in (0, 1)]
    stacked = {k: torch.stack([e[k] for e in episodes]) for k in episodes[0]}
    # A start that is not drawn: vmap refuses to draw.
    found = []
    for how in ("vmap", "loop"):
        model = plain_norms(build())
        meta = focusft(model, adapter=Fixed(ADAPTER, model), solver=CLIPPED, per_example=True)
        outer = {k: v.detach() for k, v in model.named_parameters()}
        tasks = mf.over_tasks(meta, how=how)
        found.append(mf.hypergrad(tasks)(outer, mf.Episode(stacked, stacked)))
    (one, (a, _)), (two, (b, _)) = found
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-9, atol=1e-12)


class Fixed:
    """An adapter whose start is always the same."""

    def __init__(self, adapter, model):
        self.bind = adapter.bind
        self.start = adapter.init(model)

    def init(self, model, generator=None):
        return self.start


def test_autocast_and_bfloat16():
    batch = chat_batch()
    model = build(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, aux = meta_of(model, per_example=True)({}, mf.Episode(batch, batch))
    loss.backward()
    exact = meta_of(build(dtype=torch.float32), per_example=True)({}, mf.Episode(batch, batch))[1]
    for name, value in aux.params.items():
        assert value.dtype == torch.float32
        assert relative(value, exact.params[name]) < 0.1


# The parts ----------------------------------------------------------------------------------


def random_fast(adapter, model, number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = for_each(adapter.init(model), number)
    return {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in start.items()}


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 2, 5, 4)], ids=str)
def test_rows_of_a_module_see_their_own(shape):
    layer = nn.Sequential(nn.Linear(4, 6)).double()
    lora = mf.LoRA(all_linear, rank=2, alpha=3.0)
    fast = random_fast(lora, layer, 3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with lora.bind(layer, fast):
        got = layer(x)
    for row in range(3):
        with lora.bind(layer, one_of(fast, row)):
            torch.testing.assert_close(got[row], layer(x[row]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4), (5, 3, 4)], ids=str)
def test_inputs_that_are_no_batch_of_sequences_are_refused(shape):
    layer = nn.Sequential(nn.Linear(4, 6)).double()
    lora = mf.LoRA(all_linear, rank=2)
    with (
        lora.bind(layer, random_fast(lora, layer, 3)),
        pytest.raises(ProblemError, match="each of 3 examples"),
    ):
        layer(torch.zeros(shape, dtype=torch.float64))


def test_mixed_numbers_of_examples_are_refused():
    layer = nn.Sequential(nn.Linear(4, 6))
    lora = mf.LoRA(all_linear, rank=2)
    shared, own = lora.init(layer), random_fast(lora, layer, 3)
    for name in shared:
        with (
            pytest.raises(ProblemError, match="all fast weights"),
            lora.bind(layer, {**own, name: shared[name]}),
        ):
            pass
    wrong = {k: v[None] for k, v in own.items()}
    with pytest.raises(ProblemError, match="behind the number"), lora.bind(layer, wrong):
        pass


def test_the_output_head_is_refused():
    model = build(tied=False)
    adapter = mf.LoRA(mf.matching("lm_head"), rank=2)
    batch = chat_batch()
    with pytest.raises(ProblemError, match="output head"):
        meta_of(model, adapter=adapter, per_example=True)({}, mf.Episode(batch, batch))


def test_full_weights_are_refused():
    adapter = mf.FullWeights(mf.top_layers(0.5, NAMES))
    batch = chat_batch()
    with pytest.raises(ProblemError, match=r"for each example are LoRA's"):
        meta_of(build(), adapter=adapter, per_example=True)({}, mf.Episode(batch, batch))


def test_an_empty_placement_is_plain_fine_tuning():
    batch = chat_batch()
    meta = focusft(build(), adapter=mf.LoRA(mf.top_layers(0.0, NAMES)), per_example=True)
    loss, aux = meta({}, mf.Episode(batch, batch))
    same = focusft(build(), adapter=mf.LoRA(mf.top_layers(0.0, NAMES)))
    assert aux.params == {} and loss == same({}, mf.Episode(batch, batch))[0]


@pytest.mark.parametrize(
    "solver",
    [*SOLVERS.values(), mf.RMSprop(0.1, 2), mf.Adagrad(0.1, 2), mf.Muon(0.1, 2)],
    ids=lambda s: type(s).__name__,
)
def test_the_solver_sees_one_example_at_a_time(solver):
    generator = torch.Generator().manual_seed(0)
    params, grads = (
        {k: torch.randn(3, *s, generator=generator).double() for k, s in SHAPES.items()}
        for _ in range(2)
    )
    each = PerExampleSolver(solver)
    state = each.init(params)
    apart = [(one_of(params, i), solver.init(one_of(params, i))) for i in range(3)]
    for step in range(2):
        params, state = each.update(params, grads, state, step, {})
        apart = [solver.update(p, one_of(grads, i), s, step, {}) for i, (p, s) in enumerate(apart)]
    for i, (own, _) in enumerate(apart):
        for name, value in own.items():
            torch.testing.assert_close(params[name][i], value, rtol=1e-12, atol=1e-14)


SHAPES = {"a": (4, 5), "b": (5, 4)}
