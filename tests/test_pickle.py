"""What public functions make goes to another process by the pickle of the standard library."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from models import build, chat_batch

import metafocus as mf
from metafocus import algorithms, recipes
from metafocus.recipes import fewshot, hpo

pytestmark = pytest.mark.usefixtures("float64")


def loss(params, data):
    return ((params["w"] - data) ** 2).mean()


def losses(params, data):
    return (params["w"] - data) ** 2


def inner(fast, slow, data):
    return ((fast["w"] - slow["w"] * data) ** 2).mean()


def start():
    return {"w": torch.zeros(3)}


def generate(slow, support):
    return {"w": slow["w"] * support}


def step(fast, slow, data):
    return {"w": 0.5 * fast["w"] + slow["w"]}


def given(slow, data):
    return {"w": slow["w"]}


def falling(outer, index):
    return 0.1 / (1 + index)


def weigh(slow, batch, each):
    return slow["w"]


def rate(slow, batch):
    return slow["w"]


def fetch(index):
    return torch.full((3,), float(index))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


MAML = mf.Problem(inner, inner)
LORA = mf.LoRA(mf.all_linear, rank=2)


def meta_loss(estimator: Any = None, **kwargs: Any) -> mf.MetaLoss:
    estimator = mf.Unrolled() if estimator is None else estimator
    return mf.bilevel(MAML, solver=mf.SGD(0.1, 2), estimator=estimator, **kwargs)


LOSSES = {
    "bilevel": meta_loss,
    "path": lambda: meta_loss(path=[0.5, 0.5]),
    "proximal": lambda: mf.bilevel(
        mf.Problem(mf.proximal(inner, 1.0), inner), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled()
    ),
    "micro_batches": lambda: mf.bilevel(
        mf.Problem(mf.micro_batches(inner, 3), inner),
        solver=mf.SGD(0.1, 2),
        estimator=mf.Unrolled(),
    ),
    "per_step": lambda: mf.bilevel(
        MAML, solver=mf.SGD(mf.per_step(falling), 2), estimator=mf.Unrolled()
    ),
    **{
        str(estimator): lambda estimator=estimator: meta_loss(estimator)
        for estimator in (
            mf.FirstOrder(),
            mf.Unrolled(last=1, hvp=mf.hvp_forward),
            mf.Unrolled(hvp=mf.hvp_finite(1e-3)),
            mf.Unrolled(recompute="auto"),
            mf.Unrolled(store=mf.stores.cpu()),
            mf.Unrolled(store=mf.stores.schedule(2)),
            mf.Unrolled(store=mf.stores.tree(2)),
            mf.Implicit(mf.CG(3)),
            mf.Implicit(mf.GMRES(3)),
            mf.Implicit(mf.Dense()),
            mf.Implicit(mf.Neumann(3, scale=0.1)),
            mf.Implicit(mf.Nystrom(rank=2, damping=0.1)),
            mf.Implicit(mf.Identity()),
            mf.FixedPoint(step, mf.GMRES(3)),
            mf.OneStep(step),
            mf.Penalty(10.0),
        )
    },
    "EvoGrad": lambda: meta_loss(mf.EvoGrad(0.1, copies=2, generator=seeded())),
    "Evolution": lambda: algorithms.Evolution(meta_loss(), sigma=0.1, pairs=2, generator=seeded()),
    **{
        str(solver): lambda solver=solver: mf.bilevel(MAML, solver=solver, estimator=mf.Unrolled())
        for solver in (
            mf.SGD(0.1, 2, clip=mf.clip_global(1.0)),
            mf.SGD(0.1, 2, clip=mf.clip_per_tensor(1.0)),
            mf.Adam(0.1, 2),
            mf.AdamW(0.1, 2),
            mf.RMSprop(0.1, 2),
            mf.Adagrad(0.1, 2),
            mf.Muon(0.1, 2),
        )
    },
    "Given": lambda: mf.bilevel(MAML, solver=mf.Given(given), estimator=mf.Implicit(mf.CG(2))),
    "maml": lambda: of(fewshot.maml(loss)),
    "anil": lambda: of(fewshot.anil(loss, ("w",))),
    "imaml": lambda: of(fewshot.imaml(loss)),
    "reptile": lambda: of(fewshot.reptile(loss), mf.FirstOrder()),
    "generated": lambda: of(recipes.generated(MAML, generate)),
    "generated on top": lambda: of(recipes.generated(MAML, generate, on_top=True)),
    "weights": lambda: of(recipes.weights(losses, start, weigh)),
    "datarater": lambda: of(recipes.datarater(losses, start, rate)),
}


def of(problem: mf.Problem, estimator: Any = None) -> mf.MetaLoss:
    estimator = mf.Unrolled() if estimator is None else estimator
    return mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=estimator)


def again(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


OUTER = {"w": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}
EPISODE = mf.Episode(torch.tensor([0.3, 0.1, 2.0]).double(), torch.tensor([1.0, 0.2, 0.4]).double())


@pytest.mark.parametrize("name", LOSSES, ids=lambda name: name.split(" at 0x")[0])
@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
def test_the_copy_has_the_same_hypergradient(name):
    meta = LOSSES[name]()
    copy = again(meta)
    here, (value, _) = mf.hypergrad(meta)(OUTER, EPISODE)
    there, (other, _) = mf.hypergrad(copy)(OUTER, EPISODE)
    assert torch.equal(value, other) and torch.equal(here["w"], there["w"])
    # And so has one that has passed its checks.
    assert again(meta) is not None


@pytest.mark.parametrize(
    ("problem", "outer"),
    [
        (hpo.log_l2(loss, start), {"log_l2.w": torch.zeros(())}),
        (hpo.reweight(losses, start, 0.1), {"weight": torch.zeros(2)}),
        (hpo.distill(loss, start, torch.ones(3)), {"x": torch.ones(3)}),
        (fewshot.meta_sgd(loss), fewshot.with_rates(OUTER, 0.1)),
    ],
    ids=["log_l2", "reweight", "distill", "meta_sgd"],
)
def test_problems(problem, outer):
    fast = {"w": torch.ones(3)}
    data = (torch.tensor([0, 1, 1]), torch.ones(3)) if "weight" in outer else torch.ones(3)
    copy, args = again(problem), (fast, outer, data)
    if "x" in outer:
        # Its loss takes pairs; here of the learned examples and their labels.
        copy, problem = (p.init for p in (copy, problem))
        assert torch.equal(copy(outer, None)["w"], problem(outer, None)["w"])
        return
    assert torch.equal(copy.inner_loss(*args), problem.inner_loss(*args))
    assert set(copy.init(outer, data)) == set(problem.init(outer, data))


def test_over_tasks_hypergrad_and_compiled():
    meta = mf.over_tasks(meta_loss())
    episodes = mf.stack_episodes([EPISODE, EPISODE])
    expected = mf.hypergrad(meta)(OUTER, episodes)[0]["w"]
    for function in (again(mf.hypergrad(meta)), mf.hypergrad(again(meta))):
        assert torch.equal(function(OUTER, episodes)[0]["w"], expected)
    compiled = again(mf.compiled(mf.hypergrad(meta), backend="eager"))
    torch.testing.assert_close(compiled(OUTER, episodes)[0]["w"], expected)


def test_training_runs_distill():
    meta = again(recipes.distill(loss_of_pairs, start, torch.ones(3), steps=2))
    outer = {"x": torch.ones(3), "log_lr": torch.full((2,), -1.0)}
    found = mf.hypergrad(meta)(outer, mf.Episode(None, (torch.ones(3), torch.ones(3))))
    assert bool(found[0]["x"].any())


def loss_of_pairs(params, data):
    return ((params["w"] * data[0] - data[1]) ** 2).mean()


WINDOWS = algorithms.Windows(MAML, mf.SGD(0.1, 4))

PARTS = {
    "LoRA": LORA,
    "top_layers": mf.LoRA(mf.top_layers(0.5, ("up_proj",)), rank=2),
    "FullWeights": mf.FullWeights(mf.matching("up_proj")),
    "NoAdapter": mf.NoAdapter(),
    "causal": mf.masks.causal,
    "prefix_lm": mf.masks.prefix_lm,
    "context_bidirectional": mf.masks.context_bidirectional,
    "full": mf.masks.full,
    "sliding_window": mf.masks.sliding_window(3),
    "answer_tokens": mf.answer_tokens,
    "context_tokens": mf.context_tokens,
    "all_tokens": mf.all_tokens,
    "PerStep": mf.PerStep(torch.zeros(3)),
    "Batches": mf.Batches(fetch, 3),
    "shared": mf.shared(mf.Batches(fetch, 3)),
    "zipped": mf.zipped(mf.Batches(fetch, 3), mf.PerStep(torch.zeros(3))),
    "from_dataset": mf.Batches.from_dataset(
        [{"x": torch.zeros(1)}] * 4, batch_size=2, steps=3, generator=seeded()
    ),
    "LearnedOptimiser": recipes.LearnedOptimiser(steps=2),
    "Windows": WINDOWS,
    "PES": algorithms.PES(WINDOWS, sigma=0.1, pairs=2),
    "ESSingle": algorithms.ESSingle(WINDOWS, sigma=0.1, pairs=2),
    "SOBA": algorithms.SOBA(MAML, 0.1, 0.1),
    "SABA": algorithms.SABA(MAML, 0.1, 0.1),
    "StocBiO": algorithms.StocBiO(MAML, 0.1, 0.1),
    "AmIGO": algorithms.AmIGO(MAML, 0.1, 0.1),
    "BOME": algorithms.BOME(MAML, 0.1, 0.1),
    "F2SA": algorithms.F2SA(MAML, 0.1, 2.0),
    "Episode": EPISODE,
}


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    copy = again(PARTS[name])
    assert type(copy) is type(PARTS[name])


def test_a_comparison():
    result = mf.compare(
        MAML,
        OUTER,
        EPISODE,
        solver=mf.SGD(0.1, 1),
        estimators={"full": mf.Unrolled()},
        reference="full",
        repeats=1,
    )
    assert again(result).rows == result.rows


def test_made_functions_print_as_the_call_that_made_them():
    text = repr(mf.proximal(inner, 2.0))
    assert text == "proximal(inner, 2.0)"
    assert repr(meta_loss(mf.FirstOrder())).startswith("bilevel(Problem(")


@pytest.mark.parametrize("per_example", [False, True])
def test_focusft_takes_its_model_along(per_example):
    model, batch = build(), chat_batch()
    episode = mf.Episode(batch, batch)

    def made(generator):
        return recipes.focusft(model, adapter=LORA, generator=generator, per_example=per_example)

    copied, copy = again((model, made(seeded())))
    loss, _ = made(seeded())({}, episode)
    loss.backward()
    # Hooks of the adapter are on the model now: it is pickled with them.
    used, once_more = again((model, made(seeded())))
    for twin, meta in ((copied, copy), (used, once_more)):
        twin.zero_grad()
        other, _ = meta({}, episode)
        other.backward()
        assert torch.equal(loss, other)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert mine is not theirs and torch.equal(mine.grad, theirs.grad)


def test_language_model_recipes():
    model, batch = build(), chat_batch()
    one = {k: v[:1] for k, v in batch.items()}
    episode = mf.Episode(one, one)
    for make in (
        lambda: recipes.qttt(model, adapter=LORA, generator=seeded()),
        lambda: recipes.ttt_e2e(
            model,
            chunk=8,
            window=8,
            adapter=mf.FullWeights(mf.matching(r".*1\.mlp\.up_proj")),
            generator=seeded(),
        ),
    ):
        assert torch.equal(again(make())({}, episode)[0], make()({}, episode)[0])
    lm = mf.lm_loss(model, adapter=LORA, mask=mf.masks.causal)
    fast = LORA.init(model, seeded())
    assert torch.equal(again(lm)(fast, {}, batch), lm(fast, {}, batch))
