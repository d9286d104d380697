"""The parts that docs/extending.md writes: each does what its page says, in every way to use it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from models import build, chat_batch
from torch.func import grad, vmap

import metafocus as mf

FOLDER = Path(__file__).parent.parent / "examples" / "extending"


def load(name):
    spec = importlib.util.spec_from_file_location(f"extending_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_each_file_runs_by_itself_and_is_on_the_page(name, capsys):
    load(name).main()
    assert capsys.readouterr().out
    page = (FOLDER.parent.parent / "docs" / "extending.md").read_text()
    assert f'--8<-- "examples/extending/{name}.py"' in page


def quartic():
    def loss(fast, slow, data):
        return ((fast["w"] - data) ** 4).sum()

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, dtype=torch.float64, generator=generator)
    tasks = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    return mf.Problem(loss, loss), {"w": start}, mf.Episode(*tasks)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_mix_is_linear_in_its_parts(share):
    problem, outer, episodes = quartic()
    one = mf.Episode(episodes.support[0], episodes.query[0])
    Mix = load("estimator").Mix
    got, first, exact = (
        mf.hypergrad(mf.bilevel(problem, solver=mf.SGD(0.01, 4), estimator=e))(outer, one)[0]["w"]
        for e in (Mix(share), mf.FirstOrder(), mf.Unrolled())
    )
    # Sums of few float64 numbers of order one.
    assert torch.allclose(got, (1 - share) * first + share * exact, rtol=1e-12)
    assert (first - exact).norm() > 1e-2 * exact.norm()


def test_the_mix_works_with_a_path():
    problem, outer, episodes = quartic()
    one = mf.Episode(episodes.support[0], episodes.query[0])
    Mix = load("estimator").Mix
    got, first, exact = (
        mf.hypergrad(
            mf.bilevel(problem, solver=mf.SGD(0.01, 3), estimator=e, path=[0.2, 0.3, 0.5])
        )(outer, one)[0]["w"]
        for e in (Mix(0.3), mf.FirstOrder(), mf.Unrolled())
    )
    assert torch.allclose(got, 0.7 * first + 0.3 * exact, rtol=1e-12)
    assert isinstance(Mix(0.3), mf.Estimator)


def test_the_mix_works_under_every_transform():
    problem, outer, episodes = quartic()
    meta = mf.bilevel(problem, solver=mf.SGD(0.01, 4), estimator=load("estimator").Mix(0.3))
    wanted = torch.stack(
        [
            grad(lambda o, e: meta(o, e)[0])(outer, mf.Episode(*e))["w"]
            for e in zip(*episodes, strict=True)
        ]
    )
    over = vmap(grad(lambda o, e: meta(o, e)[0]), in_dims=(None, 0))(outer, episodes)["w"]
    assert torch.allclose(over, wanted, rtol=1e-12)
    mean = mf.hypergrad(mf.over_tasks(meta))(outer, episodes)[0]["w"]
    assert torch.allclose(mean, wanted.mean(0), rtol=1e-12)
    leaf = {"w": outer["w"].clone().requires_grad_()}
    mf.over_tasks(meta)(leaf, episodes)[0].backward()
    assert leaf["w"].grad is not None
    assert torch.allclose(leaf["w"].grad, wanted.mean(0), rtol=1e-12)


def test_own_inner_objective_lowers_both_losses():
    module = load("inner_objective")
    losses = module.main()
    assert losses[-1] < 0.5 * losses[0]


def test_own_inner_objective_has_the_hypergradient_of_central_differences():
    module = load("inner_objective")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    outer = {
        "w": torch.randn(3, 3, dtype=torch.float64, generator=generator),
        "b": torch.zeros(3, dtype=torch.float64),
    }
    episode = mf.Episode(x, (x, torch.arange(8) % 3))
    meta = mf.bilevel(module.problem, solver=mf.SGD(0.5, 3), estimator=mf.Unrolled())
    along = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    step = 1e-5
    with torch.no_grad():
        moved = [{**outer, "w": outer["w"] + s * along} for s in (step, -step)]
        up, down = (meta(o, episode)[0] for o in moved)
    slope = (mf.hypergrad(meta)(outer, episode)[0]["w"] * along).sum()
    # Central differences: error of order step^2 and rounding over step, both below 1e-9.
    assert torch.allclose(slope, (up - down) / (2 * step), rtol=1e-7)


def test_own_token_policy_scores_the_turn_before_each_answer():
    batch = {
        "input_ids": torch.zeros(2, 8, dtype=torch.long),
        "attention_mask": torch.tensor([[1] * 8, [0, 0] + [1] * 6]),
        "turn_ids": torch.tensor([[0, 0, 1, 1, 2, 3, 3, 4], [-1, -1, 0, 0, 1, 1, 2, 2]]),
        "answer_mask": torch.tensor([[0, 0, 0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1, 0, 0]]).bool(),
    }
    wanted = [[0, 0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0]]
    assert load("inner_objective").last_context_turn(batch).long().tolist() == wanted
    documents = {**batch, "turn_ids": torch.zeros(2, 8, dtype=torch.long)}
    documents["document_ids"] = torch.tensor([[0] * 3 + [1] * 5] * 2)
    assert load("inner_objective").last_context_turn(documents).long().tolist() == [
        [0, 0, 0, 1, 0, 1, 1, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("where", ["placement", "mask_policy", "inner_objective"])
def test_own_parts_train_a_language_model(where):
    module = load(where)
    parts = {
        "placement": lambda: {
            "adapter": mf.LoRA(module.EveryNth(2, ("gate_proj", "up_proj")), rank=2, alpha=4.0)
        },
        "mask_policy": lambda: {"mask": module.LocalContext(2)},
        "inner_objective": lambda: {
            "inner_tokens": module.last_context_turn,
            "mask": mf.masks.causal,
        },
    }[where]()
    model, batch = build(dtype=torch.float32), chat_batch()
    loss, aux = mf.recipes.focusft(model, **parts)({}, mf.Episode(batch, batch))
    loss.backward()
    assert torch.isfinite(loss) and aux.inner_losses.shape == (2,)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_own_placement():
    assert load("placement").main() == (
        "layers.1.up",
        "layers.1.down",
        "layers.3.up",
        "layers.3.down",
    )
    layer = torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2)})
    one = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    with pytest.raises(
        mf.errors.PlacementError, match=r"EveryNth\(n=2\) places nothing in 1 layers"
    ):
        load("placement").EveryNth(2, ("up",))(one)


def test_own_mask_is_its_definition_token_by_token():
    batch = chat_batch()
    width = 3
    seen = load("mask_policy").LocalContext(width)(batch).dense()[:, 0]
    wide = mf.masks.context_bidirectional(batch).dense()[:, 0]
    length = seen.shape[-1]
    near = (torch.arange(length)[:, None] - torch.arange(length)).abs() <= width
    assert (seen == (wide & (near | batch["answer_mask"].bool()[..., None]))).all()
    assert seen.sum() < wide.sum()


def test_own_linear_solver_finds_the_solution():
    HeavyBall = load("linear_solver").HeavyBall
    low, high = 1.0, 9.0
    values = torch.tensor([low, 4.0, high], dtype=torch.float64)
    b = {"x": torch.ones(3, dtype=torch.float64)}
    best = {"lr": 4 / (high**0.5 + low**0.5) ** 2, "momentum": 0.25}
    found = HeavyBall(60, **best)(lambda v: {"x": values * v["x"]}, b)["x"]
    # The best choice contracts by (3 - 1) / (3 + 1) a step: 0.5^60, times a factor of order 60.
    assert torch.allclose(found, 1 / values, rtol=1e-14)


def test_own_linear_solver_in_an_implicit_hypergradient():
    rows = {row["name"]: row for row in load("linear_solver").main().rows}
    assert rows["heavy ball, 20 products"]["relative_error"] < 0.05
    ours, neumann = (rows[k]["relative_error"] for k in list(rows)[1:])
    assert ours < 0.2 * neumann
