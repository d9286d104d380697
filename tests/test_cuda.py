"""What the CPU tests say, on a CUDA device: there the same numbers must come out."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
import ways
from commands import chat, report, training, write
from models import build, build_exact, chat_batch
from problems import Case, Quadratic, maml, rate_each, scalar_rate
from test_safe_operators import autocast_calls, check_autocast
from torch.utils import _pytree as pytree

import metafocus as mf
from metafocus.autodiff.recompute import recompute
from metafocus.lm.token_loss import token_loss
from metafocus.recipes import focusft

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
F64 = torch.float64
SOLVERS = {
    "sgd": mf.SGD(scalar_rate, 4, momentum=0.9, clip=mf.clip_global(0.5)),
    "sgd, rates": mf.SGD(rate_each, 4),
    "adam": mf.Adam(scalar_rate, 4),
    "adagrad": mf.Adagrad(scalar_rate, 4),
    "muon": mf.Muon(scalar_rate, 4),
}


def there(x):
    """The same tensors on the device."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), x)


def near(got, want, bound: float) -> None:
    """Each tensor to `bound` of its largest entry."""
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.device.type == DEVICE and y.device.type == "cpu"
        x, y = x.detach().double().cpu(), y.detach().double()
        assert (x - y).abs().max() <= bound * y.abs().max().clamp(min=1e-6)


# --- the engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("estimator", ways.UNROLLED)
def test_estimators_that_unroll(estimator, solver):
    """Sums and products in another order; Adam and Muon enlarge their rounding (`ways`)."""
    case, bound = maml(), 1e-5 if estimator.startswith("finite") else 1e-10
    meta = mf.bilevel(case.problem, solver=SOLVERS[solver], estimator=ways.UNROLLED[estimator][0])
    want = mf.hypergrad(mf.over_tasks(meta))(case.outer, case.episodes)[0]
    for how in ("vmap", "loop"):
        got = mf.hypergrad(mf.over_tasks(meta, how=how))(there(case.outer), there(case.episodes))
        near(got[0], want, bound)


IMPLICIT = {
    "cg": mf.Implicit(mf.CG(13)),
    "cg, forward": mf.Implicit(mf.CG(13), mf.hvp_forward),
    "neumann": mf.Implicit(mf.Neumann(40, 0.04)),
    "dense": mf.Implicit(mf.Dense()),
    "nystrom": mf.Implicit(mf.Nystrom(8, 0.01)),
}


@pytest.mark.parametrize("estimator", IMPLICIT)
def test_implicit_estimators(estimator):
    """On a quadratic with condition 100, solved to rounding."""
    found = []
    for device in ("cpu", DEVICE):
        quadratic = Quadratic()
        for name, value in vars(quadratic).items():
            setattr(quadratic, name, value.to(device) if torch.is_tensor(value) else value)
        solver, case = ways.fast_sgd(quadratic), quadratic.case()
        meta = mf.bilevel(case.problem, solver=solver, estimator=IMPLICIT[estimator])
        found.append(mf.hypergrad(meta)(case.outer, case.episode(0))[0])
    near(found[1], found[0], 1e-8)


@pytest.mark.parametrize("way", ways.WAYS)
def test_every_way_to_ask(way):
    case = maml()
    meta = mf.bilevel(case.problem, solver=SOLVERS["sgd"], estimator=mf.Unrolled(recompute=2))
    moved = Case(case.problem, there(case.outer), there(case.episodes))
    near(ways.WAYS[way](meta, moved), ways.WAYS[way](meta, case), 1e-12)


@pytest.mark.parametrize("estimator", [mf.Unrolled(recompute=k) for k in (True, 2)], ids=str)
def test_dropout_is_the_same_when_steps_are_rebuilt(estimator):
    """The generator of the device is set back too, and left where the forward pass left it."""
    w = {"w": torch.randn(64, 64, device=DEVICE, dtype=F64)}
    data = torch.randn(8, 64, device=DEVICE, dtype=F64)

    def inner(fast, outer, x):
        return torch.nn.functional.dropout(torch.tanh(x @ fast["w"]), 0.5).square().mean()

    problem = mf.Problem(
        inner, lambda f, s, x: (x @ f["w"]).square().mean(), lambda s, support: dict(s)
    )

    def run(how):
        torch.manual_seed(3)
        meta = mf.bilevel(problem, solver=mf.SGD(0.1, 5), estimator=how)
        return mf.hypergrad(meta)(w, mf.Episode(data, data))[0]["w"], torch.rand(2, device=DEVICE)

    (got, after), (want, expected) = run(estimator), run(mf.Unrolled())
    assert (got - want).norm() <= 1e-12 * want.norm()
    assert torch.equal(after, expected)


def test_recompute_replays_dropout():
    x = torch.randn(1000, device=DEVICE, requires_grad=True)
    y = recompute(partial(torch.nn.functional.dropout, p=0.5), x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, torch.where(y == 0, 0.0, 2.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
def test_compiled_hypergradient():
    case = maml()
    meta = mf.over_tasks(mf.bilevel(case.problem, solver=SOLVERS["sgd"], estimator=mf.Unrolled()))
    want = mf.hypergrad(meta)(case.outer, case.episodes)[0]
    got = mf.compiled(mf.hypergrad(meta))(there(case.outer), there(case.episodes))[0]
    near(got, want, 1e-10)


# --- language models ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first order", "unrolled", "recompute", "forward"])
@pytest.mark.parametrize("mask", [mf.masks.causal, mf.masks.context_bidirectional])
def test_focusft_step(name, mask):
    """Float64, for which there is no fused kernel of attention."""
    estimator = {
        "first order": mf.FirstOrder(),
        "unrolled": mf.Unrolled(),
        "recompute": mf.Unrolled(recompute=True),
        "forward": mf.Unrolled(hvp=mf.hvp_forward),
    }[name]
    found = []
    for device in ("cpu", DEVICE):
        model, batch = build_exact().to(device), chat_batch()
        batch = {k: v.to(device) for k, v in batch.items()}
        options = {"solver": mf.SGD(0.5, 2, clip=mf.clip_per_tensor(1.0)), "estimator": estimator}
        # Drawn on the CPU, the same start of the fast weights on each device.
        generator = torch.Generator().manual_seed(1)
        meta = focusft(model, mask=mask, generator=generator, **options)
        loss, _ = meta({}, mf.Episode(batch, batch))
        loss.backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    # Rotary embeddings are in float32 in transformers, and differ between devices by its rounding.
    near(found[1], found[0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_focusft_step_in_half_precision_uses_the_fused_kernel(family, dtype):
    """The loss to the type's rounding; the gradient's direction, since single numbers round."""
    found = []
    for device, kind in (("cpu", torch.float32), (DEVICE, dtype)):
        changes = {} if family != "gemma3" else {"attn_logit_softcapping": None}
        model = build(family, dtype=torch.float32, **changes).to(device, kind)
        batch = {k: v.to(device) for k, v in chat_batch(64).items()}
        generator = torch.Generator().manual_seed(1)
        meta = focusft(model, solver=mf.SGD(0.1, 2), generator=generator)
        loss, _ = meta({}, mf.Episode(batch, batch))
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(grads).double().cpu()))
    (loss, grad), (exact, wanted) = found[1], found[0]
    assert loss == pytest.approx(exact, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(grad, wanted, 0) > 0.99


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_token_loss(dtype):
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 32, generator=g).to(dtype) for n in (300, 1000))
    y = torch.randint(0, 1000, (300,), generator=g)

    def run(h, w, y):
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        loss = token_loss(*leaves, y, chunk=128)
        return loss, torch.autograd.grad(loss, leaves)

    bound = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    near(run(*there((h, w, y))), run(*(x.double() for x in (h, w)), y), bound)


@pytest.mark.parametrize("mask", [mf.masks.causal, mf.masks.context_bidirectional])
def test_attention_profile(mask):
    found = []
    for device in ("cpu", DEVICE):
        batch = {k: v.to(device) for k, v in chat_batch().items()}
        found.append(mf.diagnostics.attention_profile(build().to(device), batch, mask=mask))
    ours, theirs = found[1], found[0]
    for queries, measures in theirs.layers.items():
        for name, value in measures.items():
            got = dict(ours.layers[queries].items())[name]
            torch.testing.assert_close(got.cpu(), value, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("words", [[], ["--estimator", "unrolled"], ["--gradient_checkpointing"]])
def test_command_line_trains_where_the_device_is(tmp_path, words):
    """From chats to a saved model."""
    chats, out = write(tmp_path / "chats.jsonl", *[chat(0)] * 8), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "metafocus",
        *training(chats, out, max_steps=10, use_cpu=False),
    ]
    ran = subprocess.run([*command, *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = report(out)
    assert found["environment"]["device"] == torch.cuda.get_device_name()
    assert found["history"][-1]["loss"] < found["history"][0]["loss"]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_trainer(tmp_path, precision):
    from trainer_script import tiny, trainer

    run = trainer(tiny().float(), tmp_path, use_cpu=False, max_steps=3, **precision)
    assert run.args.device.type == DEVICE
    told = run.train()
    assert torch.isfinite(torch.tensor(told.training_loss))
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_bad_tokens_stop_the_program():
    """Values are not read on the device, so that nothing waits: the check is queued there."""
    code = (
        "import torch, metafocus as mf\n"
        "mask = torch.tensor([[0, 2]]).cuda()\n"
        "batch = {'input_ids': mask, 'turn_ids': mask, 'attention_mask': mask}\n"
        "mf.masks.context_bidirectional(batch)\n"
        "torch.cuda.synchronize()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "attention_mask has entries other than 0 and 1" in ran.stderr


@pytest.mark.parametrize("name", autocast_calls("cpu"))
def test_autocast_takes_composites_where_it_takes_operators(name):
    check_autocast(name, DEVICE)
