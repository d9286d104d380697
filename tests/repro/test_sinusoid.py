"""Published claims about few-shot learning on sinusoids (T12-T16).

One set of runs for all claims: 25 tasks in each outer step, Adam outside, three seeds trained at
once by `vmap`, each with its own start and its own tasks. The full form is the published budget,
4000 outer steps with rate 1e-3; the quick form takes 1500 with rate 3e-3 and ends where the full
form ends. Errors are mean squared errors over 600 new tasks with 100 queries each, adapted with
rate 0.01 to as many points as in training.

Tolerances come from the spread of single runs over five seeds (quick form, MAML): 0.055 after one
step, 0.03 after five and ten; of the mean of three seeds, 0.03 and 0.02. Bounds lie four of these
away or more, so that another version of torch, which is a new draw, passes.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

import metafocus as mf
from metafocus.recipes import fewshot

pytestmark = [pytest.mark.repro, pytest.mark.xdist_group("sinusoid")]

SEEDS, TASKS, LR = 3, 25, 0.01
HEAD = ("w3", "b3")


def features(params, x):
    h = torch.relu(x @ params["w1"].mT + params["b1"])
    return torch.relu(h @ params["w2"].mT + params["b2"])


def loss(params, data):
    x, y = data
    return ((features(params, x) @ params["w3"].mT + params["b3"] - y) ** 2).mean()


def weights(generator, hidden=40):
    """Draw the network of the paper, 1-40-40-1, as torch starts its linear layers."""
    outer = {}
    for i, (fan, out) in enumerate([(1, hidden), (hidden, hidden), (hidden, 1)], 1):
        for name, shape in ((f"w{i}", (out, fan)), (f"b{i}", (out,))):
            unit = torch.rand(SEEDS, *shape, generator=generator)
            outer[name] = (2 * unit - 1) / math.sqrt(fan)
    return outer


MAML, ANIL, META_SGD = fewshot.maml(loss), fewshot.anil(loss, HEAD), fewshot.meta_sgd(loss)
METHODS = {
    "MAML": (MAML, mf.SGD(LR, 1), mf.Unrolled()),
    "FOMAML": (MAML, mf.SGD(LR, 1), mf.FirstOrder()),
    "Reptile": (fewshot.reptile(loss), mf.SGD(2 * LR, 5), mf.FirstOrder()),
    "pretrained": (MAML, mf.SGD(LR, 0), mf.FirstOrder()),
    "ANIL": (ANIL, mf.SGD(LR, 1), mf.Unrolled()),
    "Meta-SGD": (META_SGD, mf.SGD(fewshot.learned_rates, 1), mf.Unrolled()),
}


def batch(name, shots, generator):
    """Tasks for every seed, `[seeds, tasks, points, 1]`."""
    drawn = fewshot.sinusoids(SEEDS * TASKS, shots, shots, generator=generator)
    stacked = [[v.unflatten(0, (SEEDS, TASKS)) for v in part] for part in drawn]
    if name == "Reptile":
        # Not split in two: it learns from all points that the others see.
        stacked[0] = stacked[1] = [torch.cat(pair, 2) for pair in zip(*stacked, strict=True)]
    return mf.Episode(*map(tuple, stacked))


def train(iterations, rate, name, shots=10):
    """Return the outer parameters of all seeds, stacked on axis 0."""
    problem, solver, estimator = METHODS[name]
    meta = mf.over_tasks(mf.bilevel(problem, solver=solver, estimator=estimator))
    hypergrad = torch.func.vmap(mf.hypergrad(meta))
    generator = torch.Generator().manual_seed(7)
    outer = weights(generator)
    if name == "Meta-SGD":
        outer = fewshot.with_rates(outer, LR)
    leaves = [v.requires_grad_() for v in outer.values()]
    optimizer = torch.optim.Adam(leaves, rate)
    for _ in range(iterations):
        now = {k: v.detach() for k, v in outer.items()}
        grads, _ = hypergrad(now, batch(name, shots, generator))
        for v, g in zip(leaves, grads.values(), strict=True):
            v.grad = g
        optimizer.step()
    return {k: v.detach() for k, v in outer.items()}


@pytest.fixture(scope="module")
def trained(pytestconfig):
    """`trained(method, shots)`, trained once."""
    budget = (4000, 1e-3) if pytestconfig.getoption("claims_full") else (1500, 3e-3)
    return functools.cache(functools.partial(train, *budget))


@functools.cache
def unseen(shots):
    return fewshot.sinusoids(600, shots, 100, generator=torch.Generator().manual_seed(999))


def errors(problem, outer, solver, shots=10):
    """Return the error of every seed and task after adaptation, `[seeds, tasks]`, and `Aux`."""
    meta = mf.bilevel(problem, solver=solver, estimator=mf.FirstOrder())
    each = torch.func.vmap(torch.func.vmap(meta, in_dims=(None, 0)), in_dims=(0, None))
    with torch.no_grad():
        return each(outer, unseen(shots))


def curve(problem, outer, shots=10):
    """Return the mean error of every seed after 0, 1, 5 and 10 steps, `[4, seeds]`."""
    found = [errors(problem, outer, mf.SGD(LR, k), shots)[0].mean(1) for k in (0, 1, 5, 10)]
    return torch.stack(found)


def rounded(values):
    return [round(v, 3) for v in values.tolist()]


# --- T12, T13: the curve and the order of the methods ---------------------------------------------


@pytest.mark.claim(
    "T12",
    paper="Finn et al., arXiv 1703.03400, section 5.1",
    says="MAML fits a new sinusoid after one step and keeps improving to ten",
    published="curves; formerly measured 3.35 / 0.72 / 0.34 / 0.285 after 0 / 1 / 5 / 10 steps",
)
def test_t12_the_curve_of_maml(trained, claim):
    """T12. Finn et al., MAML, arXiv 1703.03400, figures 2 and 3.

    Claim: trained for one step on 10 points, the error falls steeply after one step and goes on
    falling to ten.
    Published as curves; formerly measured 3.35, 0.72, 0.34, 0.285 after 0, 1, 5 and 10 steps.
    Tolerance: 0.14, 0.09 and 0.09 on both sides, four standard errors of the mean of three seeds
    and the difference between the two forms. Before adaptation 0.1: no more than the best constant
    predictor can vary.
    Ours: 3.315, 0.727, 0.309, 0.253 in the quick form, 3.338, 0.700, 0.307, 0.254 in the full one.
    """
    found = curve(MAML, trained("MAML")).mean(1)
    claim(rounded(found))
    wanted, tolerance = (3.35, 0.72, 0.34, 0.285), (0.1, 0.14, 0.09, 0.09)
    for value, want, within in zip(found.tolist(), wanted, tolerance, strict=True):
        assert abs(value - want) < within
    assert (found.diff() < 0).all()


@pytest.mark.claim(
    "T13",
    paper="Finn et al., arXiv 1703.03400; Nichol et al., arXiv 1803.02999",
    says="after one step MAML < FOMAML < Reptile < pretrained",
    published="formerly measured 0.72 < 1.02 < 1.30 < 2.70; after ten 0.285, 0.43, 0.31, 1.74",
)
def test_t13_the_order_of_the_methods(trained, claim):
    """T13. MAML (arXiv 1703.03400), Reptile (arXiv 1803.02999).

    Claim: after one step MAML < first-order MAML < Reptile (five steps of rate 0.02) < a network
    trained on all tasks together, which hardly adapts.
    Formerly measured 0.72, 1.02, 1.30, 2.70; after ten steps 0.285, 0.43, 0.31, 1.74.
    Tolerance: the order of the means of three seeds; neighbours are 0.17 apart at least, their
    standard errors are 0.04 (0.09 of the last). After ten steps MAML and Reptile cannot be told
    apart with so few seeds (full form, paired differences over five: 0.016 +- 0.016), so what is
    asked there is MAML < FOMAML < a third of pretrained, and Reptile within a factor of 1.5 of
    MAML.
    The pretrained network is no straw man: before adaptation it is within 5 % of the best
    function without adaptation, `E[y | x] = - 2.55 (2 / pi) cos x`.
    Ours, after one step: 0.727, 0.969, 1.231, 2.776 in the quick form, 0.700, 0.874, 1.232, 2.902
    in the full one; after ten 0.253, 0.339, 0.270, 1.894 and 0.254, 0.320, 0.278, 1.976.
    """
    methods = ("MAML", "FOMAML", "Reptile", "pretrained")
    curves = {name: curve(MAML, trained(name)).mean(1) for name in methods}
    claim({name: rounded(values) for name, values in curves.items()})
    one = [curves[name][1].item() for name in methods]
    assert all(better < worse for better, worse in itertools.pairwise(one))
    maml, fomaml, reptile, pretrained = (curves[name][3] for name in methods)
    assert maml < fomaml < pretrained / 3
    assert reptile < 1.5 * maml
    x, y = unseen(10).query
    best = ((y + 2.55 * 2 / math.pi * x.cos()) ** 2).mean()
    assert curves["pretrained"][0] < 1.05 * best


@pytest.mark.claim(
    "T14",
    paper="Finn et al., arXiv 1703.03400; table 1 of Li et al., arXiv 1707.09835",
    says="five points are worse than ten, and still fit the sinusoid",
    published="5-shot MAML 1.13 after one step; formerly measured 1.06 / 0.77 / 0.72",
)
def test_t14_five_points(trained, claim):
    """T14. MAML (arXiv 1703.03400) with 5 points; a number in Meta-SGD (arXiv 1707.09835).

    Claim: fewer points than ten give a larger error at every number of steps.
    Published: 1.13 after one step; formerly measured 1.06, 0.77, 0.72 after 1, 5 and 10.
    Tolerance: after one step 0.2 around what was published; at every number of steps at least
    1.2 times the error of ten points (means of three seeds; found are 1.4 to 3.2).
    Ours: 1.043, 0.722, 0.669 in the quick form, 1.003, 0.987, 0.676 in the full one, where one of
    the seeds gets worse at five steps before it gets better.
    """
    five = curve(MAML, trained("MAML", 5), shots=5).mean(1)
    claim(rounded(five))
    ten = curve(MAML, trained("MAML")).mean(1)
    assert abs(five[1] - 1.13) < 0.2
    assert (five[1:] > 1.2 * ten[1:]).all()
    assert five[3] < five[1] < five[0]


# --- T15: adapting the head only ------------------------------------------------------------------


@pytest.mark.claim(
    "T15",
    paper="Raghu et al., arXiv 1909.09157",
    says="adapting the head alone learns, but here less than MAML",
    published="as good as MAML on miniImageNet; formerly measured here 1.17 after one step",
    note="on sinusoids the head alone is not enough; the published claim is about images",
)
def test_t15_the_head_alone(trained, claim):
    """T15. Raghu et al., ANIL, arXiv 1909.09157.

    Claim, on images: adapting only the head is as good as MAML. On sinusoids it learns, but less:
    formerly measured 1.17 after one step, above MAML's 0.72.
    Tolerance: in every seed 1.8 times less than without a step and 1.2 times more than MAML; found
    are 2.3 to 2.9 times less and 1.5 to 2 times more.
    Ours, by seed: 1.139, 1.237, 1.440 in the quick form, 1.135, 1.229, 1.217 in the full one.
    """
    found = curve(ANIL, trained("ANIL"))
    claim(rounded(found[1]))
    assert (found[1] < found[0] / 1.8).all()
    assert (found[1] > 1.2 * curve(MAML, trained("MAML"))[1]).all()


@pytest.mark.claim(
    "T15",
    paper="Raghu et al., arXiv 1909.09157",
    says="with more steps some tasks diverge, and which ones is known",
    published="formerly measured a mean of 7.1 after ten steps, interval 12",
)
def test_t15_which_tasks_diverge_is_flagged(trained, claim):
    """T15. ANIL (arXiv 1909.09157) with more steps than it was trained for.

    Claim: after ten steps the mean over tasks is ruined by a few of them (formerly measured: 7.1,
    with an interval of 12).
    The inner problem of a linear head is quadratic, so a task diverges if and only if its rate
    times the largest eigenvalue of its Hessian is above 2: algebra that does not look at a loss.
    Tolerance: after 100 steps `diverging` names no other task, and each whose factor is above 2.05
    (its loss has grown by 1.05^200; nearer to 2 it needs more steps). Without them the error after
    ten steps is at most 0.7 times that after one (found: 0.4). After 3000 steps the error that
    stops the run names one of them. MAML has none.
    Ours, by seed, after ten steps: 0.587, 1.459, 141.2, of 600 tasks 6, 7 and 16 unstable and all
    of them flagged, without them 0.368, 0.459, 0.636. Full: 0.837, 1.051, 1.591, unstable 6, 6, 6,
    flagged 5, 6, 6, without them 0.363, 0.457, 0.483.
    """
    outer = trained("ANIL")
    x = unseen(10).support[0]
    each = torch.func.vmap(features, in_dims=(0, None))(outer, x)
    design = torch.cat([each, torch.ones_like(each[..., :1])], -1).double()
    hessian = 2 / design.shape[-2] * design.mT @ design
    factor = LR * torch.linalg.eigvalsh(hessian)[..., -1]
    unstable = factor > 2
    after = errors(ANIL, outer, mf.SGD(LR, 10))[0]
    flagged = fewshot.diverging(errors(ANIL, outer, mf.SGD(LR, 100))[1])
    stable = torch.where(unstable, torch.nan, after).nanmean(1)
    claim(
        {
            "after ten": rounded(after.mean(1)),
            "without them": rounded(stable),
            "unstable": unstable.sum(1),
            "flagged": flagged.sum(1),
        }
    )
    assert unstable.any(1).all() and unstable.float().mean() < 0.05
    assert unstable[flagged].all() and flagged[factor > 2.05].all() and flagged.any()
    assert (after.mean(1) > stable).all()
    assert stable.mean() < 0.7 * errors(ANIL, outer, mf.SGD(LR, 1))[0].mean()
    assert not fewshot.diverging(errors(MAML, trained("MAML"), mf.SGD(LR, 100))[1]).any()

    first = {k: v[0] for k, v in outer.items()}
    meta = mf.bilevel(ANIL, solver=mf.SGD(LR, 3000), estimator=mf.FirstOrder())
    with torch.no_grad(), pytest.raises(mf.errors.NonFiniteError, match=r"task \d+") as caught:
        mf.over_tasks(meta)(first, unseen(10))
    named = int(str(caught.value).partition("task ")[2].partition(",")[0])
    assert unstable[0, named]


# --- T16: learned rates ---------------------------------------------------------------------------


@pytest.mark.claim(
    "T16",
    paper="Li et al., arXiv 1707.09835, table 1",
    says="learned rates beat a fixed one with 5 and with 10 points",
    published="5-shot 0.90 against 1.13, 10-shot 0.53 against 0.77",
)
@pytest.mark.parametrize("shots", [5, 10])
def test_t16_meta_sgd(trained, shots, claim):
    """T16. Li et al., Meta-SGD, arXiv 1707.09835, table 1.

    Claim: one learned rate for each weight beats MAML's fixed rate at the same budget.
    Published: 0.90 against 1.13 with 5 points, 0.53 against 0.77 with 10, after one step.
    Tolerance: in every seed the published factor with 5 points, 0.8; found are 0.41 to 0.70.
    Ours, by seed: 0.606, 0.706, 0.614 against 1.020, 1.004, 1.105 with 5 points and 0.344, 0.401,
    0.366 against 0.763, 0.651, 0.767 with 10. Full: 0.523, 0.568, 0.559 against 0.970, 0.932,
    1.108 and 0.309, 0.363, 0.335 against 0.688, 0.604, 0.810.
    """
    outer = trained("Meta-SGD", shots)
    learned = errors(META_SGD, outer, mf.SGD(fewshot.learned_rates, 1), shots)[0].mean(1)
    fixed = errors(MAML, trained("MAML", shots), mf.SGD(LR, 1), shots)[0].mean(1)
    claim({"learned": rounded(learned), "fixed": rounded(fixed)})
    assert (learned < 0.8 * fixed).all()
