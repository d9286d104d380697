"""Operators inside an inner loss, under every way to differentiate it twice.

Each row of the table is an operator of one fast weight and one piece of data, in
`inner_loss = score(op(fast * slow, data))`. The hypergradient of two inner steps is taken in four
ways, all through metafocus: the graph of all steps (gradient of a gradient), `hvp_forward` (jvp of
a gradient), and both under `over_tasks` (vmap). The oracles do not use metafocus: central
differences of the whole map by first derivatives only, and the eager double backward through the
plain operators, where torch has one that is right.

Everything is exact but for the refusals in `REFUSED`, each by an error that names the operator:

| operator | ways refused | what to use instead |
|---|---|---|
| LSTM, GRU, RNN | forward mode under vmap: no batching rule | `over_tasks(how="loop")`: exact |
| rrelu, gaussian_nll_loss | both under vmap: no batching rule, a branch on values | the same |
| grid_sample | both with jvp: no forward mode | `hvp_reverse`, the default |
| the same in torch 2.11 | all: no double backward there | `hvp_finite()`: exact, tested |
| embedding_bag, multi_margin_loss | all: no double backward | `hvp_finite()`: exact, tested |
| ctc_loss | all: no double backward, nothing under torch.func | `FirstOrder()`, tested |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from problems import assert_close, central_difference, flat
from torch import Tensor

import metafocus as mf
from metafocus.autodiff.safe_operators import swapping

pytestmark = pytest.mark.usefixtures("float64")

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def score(y: Tensor) -> Tensor:
    """A smooth scalar in which every entry counts differently."""
    y = y.reshape(-1)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype)
    return (torch.sin(y) * weights + 0.1 * y * y).mean()


@dataclass(frozen=True)
class Op:
    """`run(weight, data) -> tensor` and the shapes of both."""

    run: Callable[[Tensor, Any], Tensor]
    weight: tuple[int, ...] = (3, 4)
    data: tuple[int, ...] = (5, 4)
    eager: bool = True  # whether torch's own double backward is right


CLASSES = torch.tensor([0, 2, 1, 2, 0])
INDEX = torch.tensor([[0, 2, 1, 0], [1, 1, 0, 2], [2, 0, 2, 1]])
ROWS = torch.tensor([[2], [0], [1]])
TOKENS = torch.tensor([[0, 2, 1], [1, 1, 2]])
E4 = torch.eye(4, dtype=F64)


def rnn(kind):
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]

    def run(w, x):
        ih, hh = w[:, :2], w[:, 2:]
        flat_weights = [ih, hh, w.sum(1) * 0.1, w[:, 0]]
        start = torch.zeros(1, 2, 2, dtype=F64)
        sequence = x.reshape(5, 2, 2)
        if kind == "lstm":
            return torch.lstm(
                sequence, [start, start], flat_weights, True, 1, 0.0, True, False, False
            )[0]
        fn = torch.gru if kind == "gru" else torch.rnn_tanh
        return fn(sequence, start, flat_weights, True, 1, 0.0, True, False, False)[0]

    return Op(run, (2 * gates, 4), (5, 4))


def self_attention(w, x, **kwargs):
    h = (x @ w.mT).reshape(1, 5, 3, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(h, h * 0.7, h.sin(), **kwargs)


def multi_head(w, x, **kwargs):
    return F.multi_head_attention_forward(
        x[:, None], x[:, None] * 0.5, x[:, None].cos(), 4, 2, w[:12], w[12:].reshape(-1)[:12],
        None, None, False, 0.0, E4 + w[12:16], None, **kwargs,
    )[0]  # fmt: skip


def seeded(fn):
    def run(w, x):
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            return fn(w, x)

    return run


def spd(w):
    return w @ w.mT + 3 * torch.eye(w.shape[-1], dtype=F64)


def near(w):
    return w + 4 * torch.eye(w.shape[-1], dtype=F64)


def embed(w, x, **kwargs):
    return F.embedding(TOKENS, w, **kwargs) * x[:2, None]


def loss_of(fn, to=lambda x: x, of=lambda x: x):
    """A regression loss between x w' and a target made from x."""

    def run(w, x):
        h = of(x @ w.mT)
        return fn(h, to(x[:, :3]))

    return Op(run)


IMAGE = (2, 3, 6, 6)


def conv(fn, weight=(4, 3, 3, 3), data=IMAGE):
    return Op(lambda w, x: fn(x, w), weight, data)


def map_of(fn):
    """An operator on x w', of shape [5, 3]."""
    return Op(lambda w, x: fn(x @ w.mT))


def image_of(fn):
    """An operator on a picture made by a convolution, of shape [2, 4, 6, 6]."""
    return Op(lambda w, x: fn(F.conv2d(x, w, padding=1)), (4, 3, 3, 3), IMAGE)


def square(fn):
    return Op(fn, (4, 4), (4, 4))


OPS: dict[str, Op] = {
    # losses
    "mse_loss": loss_of(F.mse_loss),
    "l1_loss": loss_of(F.l1_loss),
    "smooth_l1_loss": loss_of(F.smooth_l1_loss),
    "huber_loss": loss_of(F.huber_loss),
    "cross_entropy": map_of(lambda h: F.cross_entropy(h, CLASSES)),
    "cross_entropy smoothing": map_of(lambda h: F.cross_entropy(h, CLASSES, label_smoothing=0.1)),
    "cross_entropy ignore": map_of(lambda h: F.cross_entropy(h, CLASSES, ignore_index=2)),
    "cross_entropy weight": map_of(
        lambda h: F.cross_entropy(h, CLASSES, weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64))
    ),
    "cross_entropy soft": loss_of(F.cross_entropy, lambda x: x.softmax(-1)),
    "nll_loss": map_of(lambda h: F.nll_loss(h.log_softmax(-1), CLASSES)),
    "kl_div": loss_of(
        functools.partial(F.kl_div, reduction="batchmean"),
        lambda x: x.softmax(-1),
        lambda h: h.log_softmax(-1),
    ),
    "bce": loss_of(F.binary_cross_entropy, torch.sigmoid, torch.sigmoid),
    "bce_with_logits": loss_of(F.binary_cross_entropy_with_logits, torch.sigmoid),
    "gaussian_nll_loss": loss_of(
        lambda h, y: F.gaussian_nll_loss(h, y, h.exp()),
    ),
    "poisson_nll_loss": loss_of(F.poisson_nll_loss, torch.exp),
    "hinge_embedding_loss": loss_of(F.hinge_embedding_loss, lambda x: x.sign().detach()),
    "soft_margin_loss": loss_of(F.soft_margin_loss, lambda x: x.sign().detach()),
    "margin_ranking_loss": loss_of(
        lambda h, y: F.margin_ranking_loss(h, h.flip(0), y.sign().detach()),
    ),
    "multi_margin_loss": map_of(lambda h: F.multi_margin_loss(h, CLASSES)),
    "multilabel_soft_margin": loss_of(F.multilabel_soft_margin_loss, lambda x: (x > 0).double()),
    "triplet_margin_loss": loss_of(lambda h, y: F.triplet_margin_loss(h, y, y.flip(0))),
    "cosine_embedding_loss": loss_of(
        lambda h, y: F.cosine_embedding_loss(h, y, torch.ones(5, dtype=F64))
    ),
    "ctc_loss": Op(
        lambda w, x: F.ctc_loss(
            (x @ w.mT).log_softmax(-1)[:, None], torch.tensor([[1, 2]]), (5,), (2,)
        ),
    ),
    # norms
    "layer_norm": Op(lambda w, x: F.layer_norm(x @ w.mT, (3,), w[:, 0], w[:, 1])),
    "rms_norm": Op(lambda w, x: F.rms_norm(x @ w.mT, (3,), w[:, 0])),
    "group_norm": image_of(lambda h: F.group_norm(h, 2)),
    "batch_norm": image_of(lambda h: F.batch_norm(h, None, None, training=True)),
    "instance_norm": image_of(F.instance_norm),
    "local_response_norm": image_of(lambda h: F.local_response_norm(h, 2)),
    "normalize": map_of(lambda h: F.normalize(h, dim=-1)),
    # torch 2.13 holds the saved norm constant: its double backward is off by a third here.
    "weight_norm": Op(lambda w, x: x @ torch._weight_norm(w, w[:, :1] ** 2 + 1, 0).mT, eager=False),
    # activations
    **{
        f.__name__: map_of(f)
        for f in (
            F.relu,
            F.relu6,
            F.leaky_relu,
            F.elu,
            F.selu,
            F.celu,
            F.silu,
            F.mish,
            F.softplus,
            F.softsign,
            F.tanhshrink,
            F.hardtanh,
            F.hardswish,
            F.hardsigmoid,
            F.logsigmoid,
            F.softshrink,
            F.hardshrink,
            torch.sigmoid,
            torch.tanh,
            torch.erf,
        )
    },
    "gelu": map_of(F.gelu),
    "gelu tanh": map_of(lambda h: F.gelu(h, approximate="tanh")),
    "glu": Op(lambda w, x: F.glu(x @ w.mT), (4, 4)),
    "prelu": Op(lambda w, x: F.prelu(x @ w.mT, w[:, 0])),
    "rrelu": Op(seeded(lambda w, x: F.rrelu(x @ w.mT, training=True))),
    # convolution, pooling, resampling
    "conv1d": conv(F.conv1d, (4, 3, 2), (2, 3, 7)),
    "conv2d": conv(functools.partial(F.conv2d, stride=2, padding=1)),
    "conv2d groups": conv(functools.partial(F.conv2d, groups=3), (6, 1, 3, 3)),
    "conv3d": conv(F.conv3d, (2, 2, 2, 2, 2), (1, 2, 3, 3, 3)),
    "conv_transpose2d": conv(functools.partial(F.conv_transpose2d, stride=2), (3, 2, 2, 2)),
    "max_pool2d": image_of(lambda h: F.max_pool2d(h, 2)),
    "avg_pool2d": image_of(lambda h: F.avg_pool2d(h, 3, 2, 1)),
    "adaptive_avg_pool2d": image_of(lambda h: F.adaptive_avg_pool2d(h, 4)),
    "adaptive_max_pool2d": image_of(lambda h: F.adaptive_max_pool2d(h, 2)),
    "lp_pool2d": image_of(lambda h: F.lp_pool2d(h.sigmoid(), 2, 2)),
    "interpolate nearest": image_of(lambda h: F.interpolate(h, scale_factor=2)),
    "interpolate bilinear": image_of(
        lambda h: F.interpolate(h, size=(9, 9), mode="bilinear", align_corners=False)
    ),
    "interpolate bicubic": image_of(lambda h: F.interpolate(h, size=(8, 8), mode="bicubic")),
    "pixel_shuffle": image_of(lambda h: F.pixel_shuffle(h, 2)),
    "unfold": image_of(lambda h: F.unfold(h, 3)),
    "grid_sample": image_of(
        lambda h: F.grid_sample(h, 0.1 * h[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False)
    ),
    "pad reflect": image_of(lambda h: F.pad(h, (1, 1, 2, 0), mode="reflect")),
    # embedding, indexing, ordering
    "embedding": Op(embed),
    "embedding padding": Op(functools.partial(embed, padding_idx=1)),
    "embedding_bag": Op(lambda w, x: F.embedding_bag(TOKENS, w) * x[:2]),
    "gather": Op(lambda w, x: w.gather(0, INDEX) * x[:3]),
    "scatter": Op(lambda w, x: x[:3].scatter(0, ROWS.expand(3, 4), w**2)),
    "scatter_add": Op(lambda w, x: x[:3].scatter_add(0, INDEX, w**2)),
    "scatter_reduce": Op(lambda w, x: x[:3].scatter_reduce(0, INDEX, w**2, "mean")),
    "index_select": Op(lambda w, x: w.index_select(0, CLASSES) * x),
    "advanced index": Op(lambda w, x: w[CLASSES, :3] * x[:, :3]),
    "index_add": Op(lambda w, x: x.index_add(0, torch.tensor([1, 1, 4]), w**2)),
    "index_put": Op(lambda w, x: x.index_put((torch.tensor([1, 2, 4]),), w**2)),
    "masked_fill": Op(lambda w, x: (w**2).masked_fill(INDEX == 1, 0.3) * x[:3]),
    "where": Op(lambda w, x: torch.where(INDEX == 1, w**2, w) * x[:3]),
    "take_along_dim": Op(lambda w, x: torch.take_along_dim(w**2, INDEX, 0) * x[:3]),
    "topk": map_of(lambda h: h.topk(2, dim=-1).values),
    "sort": map_of(lambda h: h.sort(dim=0).values),
    "kthvalue": map_of(lambda h: h.kthvalue(2, dim=0).values),
    "median": map_of(lambda h: h.median(dim=0).values),
    "amax": map_of(lambda h: h.amax(-1)),
    "max": map_of(lambda h: h.max(-1).values),
    "cummax": map_of(lambda h: h.cummax(0).values),
    "maximum": map_of(lambda h: torch.maximum(h, h.flip(0))),
    # softmax and reductions
    "softmax": map_of(lambda h: h.softmax(-1)),
    "softmin": map_of(lambda h: F.softmin(h, -1)),
    "log_softmax": map_of(lambda h: h.log_softmax(-1)),
    "logsumexp": map_of(lambda h: h.logsumexp(-1)),
    "gumbel_softmax": Op(seeded(lambda w, x: F.gumbel_softmax(x @ w.mT))),
    "cumsum": map_of(lambda h: h.cumsum(0)),
    "cumprod": map_of(lambda h: h.cumprod(0)),
    "prod": map_of(lambda h: h.prod(-1)),
    "var": map_of(lambda h: h.var(-1)),
    "std": map_of(lambda h: h.std(-1)),
    "norm": map_of(lambda h: h.norm(dim=-1)),
    "logcumsumexp": map_of(lambda h: h.logcumsumexp(0)),
    # products and linear algebra
    "linear": Op(lambda w, x: F.linear(x, w, w[:, 0])),
    "bilinear": Op(lambda w, x: F.bilinear(x, x, w), (2, 4, 4)),
    "einsum": Op(lambda w, x: torch.einsum("ij,kj,kl->il", w, w, w) @ x.mT),
    "bmm": Op(lambda w, x: torch.bmm(w.expand(2, 3, 4), x.mT.expand(2, 4, 5))),
    "baddbmm": Op(lambda w, x: torch.baddbmm(w[None], w[None], (x.mT @ x)[None])),
    "outer": Op(lambda w, x: torch.outer(w[0], x[0])),
    "matrix_power": square(lambda w, x: torch.linalg.matrix_power(w, 3) + x),
    "matrix_exp": square(lambda w, x: torch.linalg.matrix_exp(w) @ x),
    "solve": square(lambda w, x: torch.linalg.solve(near(w), x)),
    "solve itself": square(lambda w, x: torch.linalg.solve(near(w @ x), w)),
    "solve_triangular": square(
        lambda w, x: torch.linalg.solve_triangular(near(w).tril(), x, upper=False)
    ),
    "cholesky_solve": square(lambda w, x: torch.cholesky_solve(x, torch.linalg.cholesky(spd(w)))),
    "lstsq": square(lambda w, x: torch.linalg.lstsq(near(w), x).solution),
    "inv": square(lambda w, x: torch.linalg.inv(near(w)) @ x),
    "pinv": square(lambda w, x: torch.linalg.pinv(near(w)) @ x),
    "det": square(lambda w, x: torch.linalg.det(near(w) * 0.3) + x),
    "slogdet": square(lambda w, x: torch.linalg.slogdet(near(w))[1] + x),
    "logdet": square(lambda w, x: torch.logdet(spd(w)) + x),
    "cholesky": square(lambda w, x: torch.linalg.cholesky(spd(w)) @ x),
    "qr": square(lambda w, x: torch.linalg.qr(near(w))[1] @ x),
    "eigh": square(lambda w, x: torch.linalg.eigh(spd(w))[0] + x),
    "svdvals": square(lambda w, x: torch.linalg.svdvals(near(w)) + x),
    "svd": square(lambda w, x: torch.linalg.svd(near(w))[0] ** 2 + x),
    "matrix_norm": square(lambda w, x: torch.linalg.matrix_norm(near(w), 2) + x),
    "cdist": Op(lambda w, x: torch.cdist(w, x)),
    "cdist p=1": Op(lambda w, x: torch.cdist(w, x, p=1.0)),
    "cdist p=3": Op(lambda w, x: torch.cdist(w, x, p=3.0)),
    "cdist p=inf": Op(lambda w, x: torch.cdist(w, x, p=float("inf"))),
    "cdist itself": Op(lambda w, x: torch.cdist(w, w) * x[:3, :3]),
    "pdist": Op(lambda w, x: F.pdist(w * x[:3])),
    "pairwise_distance": loss_of(F.pairwise_distance),
    "cosine_similarity": loss_of(F.cosine_similarity),
    "fft": map_of(lambda h: torch.fft.rfft(h, dim=0).abs()),
    # attention, recurrence, dropout
    "attention": Op(self_attention, (12, 4)),
    "attention causal": Op(functools.partial(self_attention, is_causal=True), (12, 4)),
    "multi_head_attention": Op(multi_head, (16, 4)),
    "multi_head_attention no weights": Op(
        functools.partial(multi_head, need_weights=False), (16, 4)
    ),
    "LSTM": rnn("lstm"),
    "GRU": rnn("gru"),
    "RNN": rnn("rnn"),
    "dropout": Op(seeded(lambda w, x: F.dropout(x @ w.mT, 0.5))),
    "dropout2d": Op(seeded(lambda w, x: F.dropout2d(F.conv2d(x, w), 0.5)), (4, 3, 3, 3), IMAGE),
    "alpha_dropout": Op(seeded(lambda w, x: F.alpha_dropout(x @ w.mT, 0.5, True))),
}

WAYS = ("grad grad", "jvp grad", "vmap grad", "vmap jvp")
VMAPPED, FORWARD = WAYS[2:], ("jvp grad", "vmap jvp")

# name: (the ways that are refused, what every message holds)
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "LSTM": (("vmap jvp",), "Batching rule not implemented for aten::lstm"),
    "GRU": (("vmap jvp",), "Batching rule not implemented for aten::gru"),
    "RNN": (("vmap jvp",), "Batching rule not implemented for aten::rnn_tanh"),
    "rrelu": (VMAPPED, "vmap: we do not yet support aten::rrelu"),
    "gaussian_nll_loss": (VMAPPED, "vmap: .* data-dependent control flow"),
    "grid_sample": (FORWARD, "forward AD with grid_sampler_2d that does not support it"),
    # Under vmap, torch itself stops the trial evaluation that comes first.
    "ctc_loss": (WAYS, "ctc_loss has no second .* Use FirstOrder|Tensor that doesn't have storage"),
    "embedding_bag": (WAYS, "_embedding_bag"),
    "multi_margin_loss": (WAYS, "multi_margin_loss"),
}


def refused(name: str) -> tuple[tuple[str, ...], str]:
    """The ways that this torch refuses, and what the message holds."""
    if name == "grid_sample" and oracles(name, 0)[2] is None:
        # torch 2.11 cannot differentiate it twice on the tape either, torch 2.13 can.
        return WAYS, "grid_sampler_2d"
    return REFUSED.get(name, ((), ""))


def data_of(op: Op, task: int = 0) -> Tensor:
    return randn(*op.data, seed=10 + task)


def setting(op: Op) -> tuple[dict[str, Tensor], mf.Problem]:
    outer = {"w": 0.7 * randn(*op.weight, seed=1), "s": 1 + 0.2 * randn(*op.weight, seed=2)}

    def inner(fast, slow, x):
        return score(op.run(fast["w"] * slow["s"], x))

    def outer_loss(fast, slow, x):
        return (fast["w"] ** 3).mean() + fast["w"].sin().sum()

    return outer, mf.Problem(inner, outer_loss, lambda slow, support: {"w": slow["w"]})


LR, STEPS = 0.3, 2


def plain(op: Op, outer: dict[str, Tensor], x: Tensor, create_graph: bool) -> Tensor:
    """The outer loss by hand: no metafocus, the plain operators, the tape."""
    _, problem = setting(op)
    w = outer["w"]
    for _ in range(STEPS):
        w = w if create_graph else w.detach().requires_grad_()
        value = problem.inner_loss({"w": w}, outer, x)
        (g,) = torch.autograd.grad(value, w, create_graph=create_graph)
        w = w - LR * g
    return problem.outer_loss({"w": w}, outer, x)


@functools.cache
def oracles(name: str, task: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A direction, the central difference along it, and the eager hypergradient if there is one."""
    op = OPS[name]
    outer, _ = setting(op)
    x = data_of(op, task)
    direction = randn(2 * outer["w"].numel(), seed=5)
    direction = direction / direction.norm()

    def whole(v: Tensor) -> Tensor:
        w, s = (p.reshape(op.weight) for p in v.chunk(2))
        return plain(op, {"w": w, "s": s}, x, create_graph=False).detach()

    slope = central_difference(whole, flat(outer), direction)
    if not op.eager:
        return direction, slope, None
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    try:
        eager = torch.autograd.grad(
            plain(op, leaves, x, create_graph=True), list(leaves.values()), materialize_grads=True
        )
    except (RuntimeError, NotImplementedError):
        return direction, slope, None
    return direction, slope, flat(list(eager))


def hypergradient(name: str, way: str, how: str = "vmap", hvp: Any = None) -> Tensor:
    """One row for each task."""
    op = OPS[name]
    outer, problem = setting(op)
    hvp = hvp or (mf.hvp_forward if way in FORWARD else mf.hvp_reverse)
    meta = mf.bilevel(problem, solver=mf.SGD(LR, STEPS), estimator=mf.Unrolled(hvp=hvp))
    if way not in VMAPPED:
        x = data_of(op)
        return flat(mf.hypergrad(meta)(outer, mf.Episode(x, x))[0])[None]
    xs = torch.stack([data_of(op, task) for task in range(2)])
    # Outer parameters of their own for each task, so that a mix-up of tasks shows.
    many = {k: v.expand(2, *v.shape).clone() for k, v in outer.items()}

    def own(_, episode):
        x, mine = episode
        loss, aux = meta(mine, mf.Episode(x, x))
        return loss * 2, aux

    total = mf.over_tasks(own, how=how, randomness="same")
    grads = torch.func.grad(lambda o: total({}, (xs, o))[0])(many)
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


def check(name: str, rows: Tensor, tolerance: float = 1e-10) -> None:
    for task, row in enumerate(rows):
        direction, slope, eager = oracles(name, task)
        # Central differences: 1e-16 / 1e-5 of rounding, magnified by the operator's own
        # condition, and h^2 = 1e-10 times the third derivative.
        assert_close(row @ direction, slope, 1e-6)
        if eager is not None:
            assert_close(row, eager, tolerance)


# torch loops over the tasks where it has no batching rule, and says so: slow, not wrong.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPS)
def test_operator(name, way):
    ways, message = refused(name)
    if way in ways:
        with pytest.raises((RuntimeError, mf.errors.TransformError), match=message):
            hypergradient(name, way)
    else:
        # The same derivative by other formulas in float64.
        check(name, hypergradient(name, way))


@pytest.mark.parametrize(
    "name", [k for k, (ways, _) in REFUSED.items() if set(ways) <= set(VMAPPED)]
)
def test_what_vmap_refuses_a_loop_over_tasks_does(name):
    check(name, hypergradient(name, "vmap grad", how="loop"))


@pytest.mark.parametrize("name", ["embedding_bag", "multi_margin_loss", "grid_sample"])
def test_without_any_second_derivative_finite_differences_remain(name):
    # A central difference whose step is the cube root of rounding: it errs by the step's square,
    # 4e-11, times a third derivative over the first.
    check(name, hypergradient(name, "grad grad", hvp=mf.hvp_finite()), tolerance=1e-8)


def test_ctc_loss_works_at_first_order():
    op = OPS["ctc_loss"]
    outer, problem = setting(op)
    meta = mf.bilevel(problem, solver=mf.SGD(LR, STEPS), estimator=mf.FirstOrder())
    x = data_of(op)
    adapted = mf.adapt(problem, outer, x, solver=mf.SGD(LR, STEPS)).params
    want = torch.func.grad(lambda w: problem.outer_loss({"w": w}, outer, x))(adapted["w"])
    assert torch.equal(mf.hypergrad(meta)(outer, mf.Episode(x, x))[0]["w"], want)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf")])
def test_distances_are_those_of_torch(p):
    x, y = randn(2, 1, 4, 3), randn(5, 3, seed=1)
    x[0, 0, 1] = y[2]
    # Powers in another order.
    assert_close(swapping.cdist(x, y, p), torch.cdist(x, y, p), 1e-14)
    assert_close(swapping.pdist(y, p), F.pdist(y, p), 1e-14)
    for ours, theirs in (
        (lambda x: swapping.cdist(x, y, p), lambda x: torch.cdist(x, y, p)),
        (lambda x: swapping.pdist(x[0, 0], p), lambda x: F.pdist(x[0, 0], p)),
    ):
        got, want = (torch.func.grad(lambda x, f=f: score(f(x)))(x) for f in (ours, theirs))
        if p:
            assert_close(got, want, 1e-13)
        else:
            assert not got.any()
    second = torch.func.grad(lambda x: score(torch.func.grad(lambda x: score(ours(x)))(x)))(x)
    assert second.isfinite().all()


def test_small_composites_are_the_operators_of_torch():
    x, y = 40 * randn(5, 3), randn(5, 3, seed=1).sign()
    assert_close(swapping.hardsigmoid(x), F.hardsigmoid(x), 1e-15)
    for reduction in ("mean", "sum", "none"):
        # Without the threshold of softplus: exact to rounding, also far out.
        assert_close(
            swapping.soft_margin_loss(x, y, reduction=reduction),
            F.soft_margin_loss(x, y, reduction=reduction),
            1e-14,
        )


# --- torch.autograd.forward_ad around an estimator ----------------------------------------------

LINALG = ("solve", "slogdet", "det", "inv", "cholesky", "silu")
ESTIMATORS = {
    "unrolled": mf.Unrolled(),
    "last": mf.Unrolled(last=1),
    "recompute": mf.Unrolled(recompute=True),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "first order": mf.FirstOrder(),
}


def plain_forward_mode(name: str, estimator: mf.Unrolled, tracked: bool, grad_mode: bool):
    """The derivative of the meta loss along a direction, by a dual level, and as it should be."""
    op = OPS[name]
    outer, problem = setting(op)
    meta = mf.bilevel(problem, solver=mf.SGD(LR, STEPS), estimator=estimator)
    x = data_of(op)
    direction = {k: randn(*v.shape, seed=7) for k, v in outer.items()}
    exact = mf.hypergrad(meta)(outer, mf.Episode(x, x))[0]
    want = sum((exact[k] * direction[k]).sum() for k in outer)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        dual = {
            k: forward_ad.make_dual(v.clone().requires_grad_(tracked), direction[k])
            for k, v in outer.items()
        }
        tangent = forward_ad.unpack_dual(meta(dual, mf.Episode(x, x))[0]).tangent
    return tangent.detach(), want


@pytest.mark.parametrize("tracked, grad_mode", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", LINALG)
def test_plain_forward_mode_is_exact(name, estimator, tracked, grad_mode):
    got, want = plain_forward_mode(name, ESTIMATORS[estimator], tracked, grad_mode)
    # Forward and reverse mode through one set of formulas; det cancels some digits.
    assert_close(got, want, 1e-11)


def test_a_dual_level_without_duals_is_harmless():
    outer, problem = setting(OPS["solve"])
    x = data_of(OPS["solve"])
    meta = mf.bilevel(problem, solver=mf.SGD(LR, STEPS), estimator=mf.Unrolled())
    want = mf.hypergrad(meta)(outer, mf.Episode(x, x))[0]
    with forward_ad.dual_level(), torch.no_grad():
        got = mf.hypergrad(meta)(outer, mf.Episode(x, x))[0]
    assert_close(got, want, 1e-15)  # the same operations
