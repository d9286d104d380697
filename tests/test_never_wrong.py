"""Kinds of input that would be silently wrong: exact or refused, under every way to differentiate.

Each kind is one table: what is done, by which estimators, in which ways, and what must happen.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing._internal.two_tensor import TwoTensor

import metafocus as mf
from metafocus.errors import ProblemError

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning"),
]

STEPS = 3
TWICE = {
    "graph": mf.Unrolled(),
    "last": mf.Unrolled(last=2),
    "recompute": mf.Unrolled(recompute=True),
    "recompute=2": mf.Unrolled(recompute=2),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "implicit": mf.Implicit(mf.CG(4)),
}
ONCE = {
    "first": mf.FirstOrder(),
    "finite": mf.Unrolled(hvp=mf.hvp_finite()),
    "implicit finite": mf.Implicit(mf.CG(4), hvp=mf.hvp_finite()),
    "penalty": mf.Penalty(100.0),
    "evograd": mf.EvoGrad(0.1),
}
EVERY = TWICE | ONCE


def by_backward(meta, outer, episode):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in outer.items()}
    meta(leaves, episode)[0].backward()
    return {k: v.grad for k, v in leaves.items()}


def by_hypergrad(meta, outer, episode):
    return mf.hypergrad(meta)(outer, episode)[0]


def by_func_grad(meta, outer, episode):
    return torch.func.grad(lambda o: meta(o, episode)[0])(outer)


def by_tasks(meta, outer, episode):
    episodes = mf.stack_episodes([episode, episode])
    return mf.hypergrad(mf.over_tasks(meta, randomness="same"))(outer, episodes)[0]


def by_loop(meta, outer, episode):
    episodes = mf.stack_episodes([episode, episode])
    return mf.hypergrad(mf.over_tasks(meta, how="loop"))(outer, episodes)[0]


WAYS = {
    "backward": by_backward,
    "hypergrad": by_hypergrad,
    "func.grad": by_func_grad,
    "vmap over tasks": by_tasks,
    "loop over tasks": by_loop,
}


def flat(grads):
    return torch.cat([g.reshape(-1) for _, g in sorted(grads.items())])


# --- kernels without a second derivative ----------------------------------------------------------


class RawBackward(torch.autograd.Function):
    """x**3 whose backward pass returns numbers without a graph, as a Triton kernel does."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (3 * x**2 * g).detach()


class MixedLost(torch.autograd.Function):
    """x**3 * c whose second derivative is right by x, and lost by c."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, c):
        return x**3 * c

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, c = ctx.saved_tensors
        return 3 * x**2 * c.detach() * g, x**3 * g


@torch.library.custom_op("never_wrong::cube", mutates_args=())
def cube_op(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op("never_wrong::cube_backward", mutates_args=())
def cube_backward(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return 3 * x**2 * g


cube_op.register_fake(lambda x: torch.empty_like(x))
cube_backward.register_fake(lambda x, g: torch.empty_like(x))
cube_op.register_autograd(
    lambda ctx, g: cube_backward(ctx.saved_tensors[0], g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
cube_op.register_vmap(lambda info, in_dims, x: (cube_op(x), in_dims[0]))
cube_backward.register_vmap(
    lambda info, in_dims, x, g: (cube_backward(x, g.expand_as(x)), in_dims[0])
)

KERNELS = {
    "raw backward": lambda w, c: (RawBackward.apply(w) * c).sum(),
    "inside a recomputed function": lambda w, c: mf.recompute(
        lambda x, y: (RawBackward.apply(x) * y).sum(), w, c
    ),
    "mixed derivative lost": lambda w, c: MixedLost.apply(w, c.expand_as(w)).sum(),
    "custom op": lambda w, c: (cube_op(w) * c).sum(),
    # The second derivative of x**3 is zero at the start, and lost at every later step.
    "without curvature at the start": lambda w, c: (RawBackward.apply(w - W) * c).sum(),
    "a small share of the curvature": lambda w, c: 1e-3 * (RawBackward.apply(w) * c).sum(),
    "near an entry that dwarfs it": lambda w, c: (
        (RawBackward.apply(w[:4]) * c).sum() + 1e4 * c * w[4] ** 2
    ),
}
W = torch.tensor([0.5, -0.7, 0.9, 1.2, -0.3], dtype=torch.float64)
OUTER = {"w": W, "c": torch.tensor(0.8, dtype=torch.float64)}


def kernel_problem(kernel):
    def inner(fast, slow, x):
        return kernel(fast["w"], slow["c"]) + ((fast["w"] - x) ** 2).sum()

    def upper(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum() + 0 * slow["c"]

    return mf.Problem(inner, upper, init=lambda slow, support: {"w": slow["w"]})


def kernel_meta(kernel, estimator):
    return mf.bilevel(kernel_problem(kernel), solver=mf.SGD(0.05, steps=STEPS), estimator=estimator)


EPISODE = mf.Episode(torch.linspace(-1, 1, 5).double(), torch.linspace(0, 1, 5).double())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", TWICE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_without_a_second_derivative_is_refused(kernel, estimator, way):
    meta = kernel_meta(KERNELS[kernel], TWICE[estimator])
    with pytest.raises(ProblemError, match=r"runs a kernel whose second derivative"):
        WAYS[way](meta, OUTER, EPISODE)


@pytest.mark.parametrize("way", ["backward", "hypergrad"])
@pytest.mark.parametrize("estimator", [k for k in ONCE if k != "evograd"])
@pytest.mark.parametrize("kernel", ["raw backward", "custom op"])
def test_first_derivatives_of_such_a_kernel_are_exact(kernel, estimator, way):
    def exact(w, c):
        return (w**3 * c).sum()

    got = WAYS[way](kernel_meta(KERNELS[kernel], ONCE[estimator]), OUTER, EPISODE)
    want = WAYS[way](kernel_meta(exact, ONCE[estimator]), OUTER, EPISODE)
    # The same first derivatives; finite differences amplify the order of a product.
    torch.testing.assert_close(flat(got), flat(want), rtol=1e-6, atol=1e-9)


def test_windows_refuse_such_a_kernel():
    windows = mf.algorithms.Windows(
        kernel_problem(KERNELS["raw backward"]), solver=mf.SGD(0.05, steps=2)
    )
    outer = {k: v.clone().requires_grad_() for k, v in OUTER.items()}
    with pytest.raises(ProblemError, match="RawBackwardBackward"):
        windows.loss(outer, windows.init(outer, EPISODE.support), EPISODE)


CORRECT = {
    "relu": lambda x: torch.relu(x),
    "dropout": lambda x: F.dropout(x, 0.5),
    "max pool": lambda x: F.max_pool1d(x[None], 2)[0],
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "an exact custom Function": lambda x: ExactFunction.apply(x),
}


class ExactFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.sin(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * torch.cos(ctx.saved_tensors[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", CORRECT)
def test_correct_networks_are_not_refused(layer, dtype):
    torch.manual_seed(0)
    w = torch.randn(4, 6, dtype=dtype)
    x = torch.randn(8, 4, dtype=dtype)

    def loss(fast, slow, data):
        return (CORRECT[layer](data @ fast["w"]) ** 2).mean()

    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    assert flat(mf.hypergrad(meta)({"w": w}, mf.Episode(x, x))[0]).isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_kinks_beside_an_exact_custom_function_are_not_refused(seed):
    torch.manual_seed(seed)
    outer = {"a": torch.randn(8, 64), "b": torch.zeros(64), "c": torch.randn(64, 3)}
    x = torch.randn(32, 8)
    x[:5] = 0  # at the kink itself, as rows of padding are

    def loss(fast, slow, data):
        hidden = torch.relu(data @ fast["a"] + fast["b"])
        return (ExactFunction.apply(hidden @ fast["c"]) ** 2).mean()

    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.01, 2), estimator=mf.Unrolled())
    assert flat(mf.hypergrad(meta)(outer, mf.Episode(x, x))[0]).isfinite().all()


def test_half_precision_of_ordinary_operators_is_not_refused():
    w, x = torch.randn(4, 6).bfloat16(), torch.randn(8, 4).bfloat16()

    def loss(fast, slow, data):
        return (torch.relu(data @ fast["w"]) ** 2).mean()

    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    assert mf.hypergrad(meta)({"w": w}, mf.Episode(x, x))[0]["w"].isfinite().all()


def own_generator(w):
    noise = torch.rand(w.shape, generator=GENERATOR, dtype=w.dtype)
    return (ExactFunction.apply(w) * noise).sum()


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    ("kernel", "dtype", "why"),
    [
        (lambda w: ExactFunction.apply(w).sum(), torch.bfloat16, "half precision"),
        (own_generator, torch.float64, "central difference"),
    ],
)
def test_what_cannot_be_decided_is_refused_unless_trusted(kernel, dtype, why):
    def loss(fast, slow, x):
        return kernel(fast["w"])

    outer = {"w": torch.linspace(0.2, 1, 6).to(dtype)}
    x = torch.zeros(1)

    def meta():
        return mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())

    with pytest.raises(ProblemError, match=rf"cannot be checked .*{why}.*mf\.trust\(\)"):
        mf.hypergrad(meta())(outer, mf.Episode(x, x))
    with mf.trust():
        assert mf.hypergrad(meta())(outer, mf.Episode(x, x))[0]["w"].isfinite().all()


def slope_on_tape(kernel, w, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(kernel.apply(w * x).sum(), x, create_graph=True)[0]


def slope_in_transform(kernel, w, x):
    return torch.func.grad(lambda y: kernel.apply(w * y).sum())(x)


def slope_by_backward(kernel, w, x):
    x = x.detach().requires_grad_()
    kernel.apply(w * x).sum().backward(create_graph=True, inputs=[x])
    return x.grad


SLOPES = {"tape": slope_on_tape, "transform": slope_in_transform, "backward()": slope_by_backward}


def slope_problem(slope, kernel, where):
    """The loss `where` has a gradient penalty: of a kernel, by the data."""

    def penalty(fast, slow, x):
        return ((slope(kernel, fast["w"], x) - slow["c"]) ** 2).sum()

    def plain(fast, slow, x):
        return ((fast["w"] - slow["c"] * x) ** 2).sum()

    losses = (penalty, plain) if where == "inner" else (plain, penalty)
    return mf.Problem(*losses, init=lambda slow, support: {"w": slow["w"]})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", [k for k in EVERY if k != "forward"])
@pytest.mark.parametrize("where", ["inner", "outer"])
def test_a_gradient_inside_a_loss_through_such_a_kernel_is_refused(where, estimator, way):
    """Its own first derivative is lost, so estimators of first derivatives are no way out."""
    problem = slope_problem(slope_in_transform, RawBackward, where)
    meta = mf.bilevel(problem, solver=mf.SGD(0.01, STEPS), estimator=EVERY[estimator])
    with pytest.raises(ProblemError, match=rf"{where}_loss takes a gradient through a kernel"):
        WAYS[way](meta, OUTER, EPISODE)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("where", ["inner", "outer"])
def test_every_way_to_take_a_gradient_inside_a_loss_is_seen(where, slope):
    def built(kernel):
        problem = slope_problem(SLOPES[slope], kernel, where)
        return mf.bilevel(problem, solver=mf.SGD(0.01, STEPS), estimator=mf.FirstOrder())

    with pytest.raises(ProblemError, match="takes a gradient through a kernel"):
        by_hypergrad(built(RawBackward), OUTER, EPISODE)
    with mf.trust():
        by_hypergrad(built(RawBackward), OUTER, EPISODE)
    assert flat(by_hypergrad(built(ExactFunction), OUTER, EPISODE)).isfinite().all()


def by_data(fast, slow, x):
    """What is lost is the derivative by the data alone."""
    return (slope_in_transform(RawBackward, 1.0, x) * fast["w"]).sum()


def in_recomputed(fast, slow, x):
    def cubes(y):
        return mf.recompute(lambda z: RawBackward.apply(z).sum(), fast["w"] * y)

    return (torch.func.grad(cubes)(x) ** 2).sum()


@pytest.mark.parametrize("penalty", [by_data, in_recomputed])
@pytest.mark.parametrize("where", ["inner", "outer"])
def test_a_gradient_by_the_data_or_in_a_recomputed_function_is_seen(where, penalty):
    def plain(fast, slow, x):
        return ((fast["w"] - slow["c"] * x) ** 2).sum()

    losses = (penalty, plain) if where == "inner" else (plain, penalty)
    problem = mf.Problem(*losses, init=lambda slow, support: {"w": slow["w"]})
    meta = mf.bilevel(problem, solver=mf.SGD(0.01, STEPS), estimator=mf.FirstOrder())
    with pytest.raises(ProblemError, match="takes a gradient through a kernel"):
        by_hypergrad(meta, OUTER, EPISODE)


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_single_loops_and_windows_refuse_such_a_gradient(where):
    problem = slope_problem(slope_in_transform, RawBackward, where)
    outer = {k: v.clone().requires_grad_() for k, v in OUTER.items()}
    windows = mf.algorithms.Windows(problem, solver=mf.SGD(0.05, steps=2))
    with pytest.raises(ProblemError, match="takes a gradient through a kernel"):
        windows.loss(outer, windows.init(outer, EPISODE.support), EPISODE)
    soba = mf.algorithms.SOBA(problem, inner_lr=0.01, v_lr=0.01)
    with pytest.raises(ProblemError, match="takes a gradient through a kernel"):
        soba.step(outer, soba.init(outer, EPISODE.support), EPISODE)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 and later")
@pytest.mark.parametrize("way", ["backward", "hypergrad", "func.grad"])
@pytest.mark.parametrize("estimator", TWICE)
def test_linear_cross_entropy_in_chunks_is_exact(estimator, way):
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.randint(12, (32,))
    outer = {"a": torch.randn(4, 4), "w": torch.randn(12, 4) * 0.3}
    options = LinearCrossEntropyOptions(batch_chunk_size=8)

    def loss(chunked):
        def run(fast, slow, data):
            h = torch.tanh(data[0] @ fast["a"])
            decay = 0.05 * sum((v**2).sum() for v in fast.values())
            if chunked:
                return decay + F.linear_cross_entropy(h, fast["w"], data[1], options=options)
            return decay + F.cross_entropy(h @ fast["w"].T, data[1])

        return run

    grads = [
        WAYS[way](
            mf.bilevel(
                mf.Problem(loss(chunked), loss(False)),
                solver=mf.SGD(1.0, STEPS),
                estimator=TWICE[estimator],
            ),
            outer,
            mf.Episode((x, y), (x, y)),
        )
        for chunked in (True, False)
    ]
    # The same composites in another order.
    torch.testing.assert_close(flat(grads[0]), flat(grads[1]), rtol=1e-9, atol=1e-12)


# --- complex leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", [*TWICE, "finite", "implicit finite", "penalty"])
def test_complex_supports_have_derivatives(estimator, way):
    """The same support as pairs of real numbers is the oracle."""

    def problem(real):
        def prepare(slow, episode):
            spectrum = torch.fft.fft(slow["a"] * episode.support)
            return mf.Episode(torch.view_as_real(spectrum) if real else spectrum, episode.query)

        def inner(fast, slow, z):
            z = torch.view_as_complex(z) if real else z
            return ((fast["w"] - z).abs() ** 2).mean()

        def upper(fast, slow, q):
            return ((fast["w"] - q) ** 2).sum()

        return mf.Problem(inner, upper, lambda slow, z: {"w": torch.zeros(4)}, prepare)

    torch.manual_seed(0)
    outer, episode = {"a": torch.randn(4)}, mf.Episode(torch.randn(4), torch.randn(4))
    got, want = (
        WAYS[way](
            mf.bilevel(problem(real), solver=mf.SGD(0.5, 60), estimator=EVERY[estimator]),
            outer,
            episode,
        )
        for real in (False, True)
    )
    assert want["a"].abs().min() > 0.01
    # Sums in another order; finite differences divide them by their step.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


# --- state outside the fast weights ---------------------------------------------------------------


class Counting(nn.Module):
    """Writes to a buffer at every forward pass, in one of four ways."""

    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.how = how

    def forward(self, x):
        if self.how == "in place":
            self.seen += x.detach().mean()
        elif self.how == "data":
            self.seen.data.add_(x.detach().mean())
        elif self.how == "rebound":
            self.seen = 0.9 * self.seen + x.detach().mean()
        else:
            torch.add(self.seen, x.detach().mean(), out=self.seen)
        return self.linear(x) * (1 + 0.1 * self.seen)


def module_problem(net):
    def loss(fast, slow, data):
        return ((functional_call(net, fast, (data[0],)) - data[1]) ** 2).mean()

    return mf.Problem(loss, loss)


DATA = (torch.randn(6, 3).double(), torch.randn(6, 1).double())


def buffers(net):
    return {k: v.clone() for k, v in net.named_buffers()}


def assert_untouched(net, before):
    after = dict(net.named_buffers())
    assert set(after) == set(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("way", ["backward", "func.grad", "loop over tasks", "adapt"])
@pytest.mark.parametrize("estimator", ["graph", "recompute", "first", "penalty", "implicit"])
@pytest.mark.parametrize("how", ["in place", "data", "rebound", "out="])
def test_a_buffer_that_forward_writes_to_is_named_and_put_back(how, estimator, way):
    net = Counting(how)
    before, outer = buffers(net), mf.trainable(net)
    episode = mf.Episode(DATA, DATA)
    with pytest.raises(ProblemError, match=r"inner_loss changes .*seen at every call"):
        if way == "adapt":
            mf.adapt(module_problem(net), outer, DATA, solver=mf.SGD(0.1, 2))
        else:
            meta = mf.bilevel(
                module_problem(net), solver=mf.SGD(0.1, 2), estimator=EVERY[estimator]
            )
            WAYS[way](meta, outer, episode)
    if how != "rebound":
        assert_untouched(net, before)


class Own(torch.Tensor):
    """A tensor with a class of its own."""


KINDS = {
    "own class": lambda x: x.as_subclass(Own),
    # As DTensor, it holds other tensors.
    "wrapper": lambda x: TwoTensor(x, x.clone()),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
}


def dense(x):
    x = x.a if isinstance(x, TwoTensor) else x
    return x.as_subclass(torch.Tensor) if isinstance(x, Own) else x.to_dense()


def stateful(state, change):
    """Return a loss that reads a state after it has changed it."""

    def loss(fast, slow, data):
        change(state)
        return ((fast["w"] - dense(state["x"])) ** 2).sum()

    return mf.Problem(loss, loss)


CHANGES = {
    "in place": lambda state: state["x"].mul_(2.0),
    "rebound": lambda state: state.update(x=2.0 * state["x"]),
    "not at all": lambda state: None,
}


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_state_in_tensors_of_every_kind_is_found_and_constants_are_fine(kind, change):
    state = {"x": KINDS[kind](torch.eye(2))}
    meta = mf.bilevel(
        stateful(state, CHANGES[change]), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled()
    )
    outer, episode = {"w": torch.ones(2, 2, requires_grad=True)}, mf.Episode(None, None)
    if change == "not at all":
        assert meta(outer, episode)[0].isfinite()
        return
    with pytest.raises(ProblemError, match=r"inner_loss changes .*state\['x'\] at every call"):
        meta(outer, episode)
    if change == "in place":
        assert torch.equal(dense(state["x"]), torch.eye(2))


def test_all_parts_of_a_state_are_put_back():
    rows = torch.zeros(3, 2)

    def change(state):
        state["x"][0].add_(1)
        state["x"][1].add_(2)
        state["x"].add_(3)
        state["x"][0].add_(4)

    meta = mf.bilevel(stateful({"x": rows}, change), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    with pytest.raises(ProblemError, match="at every call"):
        meta({"w": torch.ones(3, 2, requires_grad=True)}, mf.Episode(None, None))
    assert not rows.any()


@pytest.fixture
def alone():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("hidden", [False, True])
def test_gathered_parameters_of_fsdp_are_no_state_and_a_sharded_state_is(alone, hidden, reshard):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    net = fully_shard(nn.Linear(3, 1), mesh=alone, reshard_after_forward=reshard)
    assert isinstance(net.weight, DTensor)
    state = DTensor.from_local(torch.ones(()), alone)

    def loss(fast, slow, data):
        nonlocal state
        if hidden:
            state = 0.9 * state
        return ((net(data[0]) * fast["scale"] * state.to_local() - data[1]) ** 2).mean()

    problem = mf.Problem(loss, loss, lambda slow, support: {"scale": torch.ones(1)})
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=mf.FirstOrder())
    with pytest.raises(ProblemError, match="state at every call") if hidden else nullcontext():
        value, _ = meta({}, mf.Episode(DATA, DATA))
        value.backward()
        assert net.weight.grad.to_local().any()


def test_spectral_norm_is_refused_in_training_and_exact_in_evaluation():
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1))
    outer = {k: v.detach().clone() for k, v in net.named_parameters()}
    before, episode = buffers(net), mf.Episode(DATA, DATA)
    meta = mf.bilevel(module_problem(net), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    with pytest.raises(ProblemError, match=r"_u at every call.*eval\(\)"):
        mf.hypergrad(meta)(outer, episode)
    assert_untouched(net, before)
    net.eval()
    got = [
        flat(
            mf.hypergrad(
                mf.bilevel(module_problem(net), solver=mf.SGD(0.1, 2), estimator=TWICE[k])
            )(outer, episode)[0]
        )
        for k in ("graph", "recompute", "forward")
    ]
    # Rounding of the same sums.
    torch.testing.assert_close(got[1], got[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[2], got[0], rtol=1e-10, atol=1e-12)


NORMS = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "without statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
}


@pytest.mark.parametrize("way", [*WAYS, "adapt"])
@pytest.mark.parametrize("estimator", EVERY)
@pytest.mark.parametrize("norm", NORMS)
def test_batch_norm_in_training_mode_leaves_its_buffers_alone(norm, estimator, way):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), NORMS[norm](), nn.Tanh(), nn.Linear(4, 1)).train()
    before, outer = buffers(net), mf.trainable(net)
    if way == "adapt":
        mf.adapt(module_problem(net), outer, DATA, solver=mf.SGD(0.1, 2))
    else:
        meta = mf.bilevel(module_problem(net), solver=mf.SGD(0.1, 2), estimator=EVERY[estimator])
        grads = WAYS[way](meta, outer, mf.Episode(DATA, DATA))
        assert flat(grads).isfinite().all()
    assert_untouched(net, before)


def by_hand_batch_norm(fast, x):
    h = x @ fast["0.weight"].T + fast["0.bias"]
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    h = torch.tanh(h * fast["1.weight"] + fast["1.bias"])
    return h @ fast["3.weight"].T + fast["3.bias"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", ["graph", "recompute", "forward", "first"])
def test_the_default_batch_norm_is_exact(estimator, way):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).train()
    outer = {k: v.detach().clone() for k, v in net.named_parameters()}

    def loss(fast, slow, data):
        return ((by_hand_batch_norm(fast, data[0]) - data[1]) ** 2).mean()

    got, want = (
        WAYS[way](
            mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=EVERY[estimator]),
            outer,
            mf.Episode(DATA, DATA),
        )
        for problem in (module_problem(net), mf.Problem(loss, loss))
    )
    # Fused kernels against pieces: order of sums.
    torch.testing.assert_close(flat(got), flat(want), rtol=1e-9, atol=1e-12)


def test_evaluation_statistics_are_used_in_eval_mode():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net(DATA[0])
    net.eval()
    before = buffers(net)
    meta = mf.bilevel(module_problem(net), solver=mf.SGD(0.1, 0), estimator=mf.FirstOrder())
    with torch.no_grad():
        value, _ = meta(mf.trainable(net), mf.Episode(DATA, DATA))
        want = ((net(DATA[0]) - DATA[1]) ** 2).mean()
    # One fused kernel against another.
    torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    assert_untouched(net, before)


# --- frozen parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", EVERY)
def test_frozen_parameters_do_not_adapt(estimator, way):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    outer = dict(net.named_parameters())
    meta = mf.bilevel(module_problem(net), solver=mf.SGD(0.1, 2), estimator=EVERY[estimator])
    seen = []

    def noting(o, episode):
        loss, aux = meta(o, episode)
        seen.append(set(aux.params))
        return loss, aux

    if way == "backward":
        noting(outer, mf.Episode(DATA, DATA))[0].backward()
        assert net[0].weight.grad is None
    else:
        grads = WAYS[way](noting, outer, mf.Episode(DATA, DATA))
        if way != "func.grad":
            assert not grads["0.weight"].any()
            # The derivative of a minimum by its start is zero.
            assert grads["2.weight"].any() or "implicit" in estimator or estimator == "penalty"
    assert seen[0] == {"2.weight", "2.bias"}


def test_nothing_left_to_adapt_is_refused():
    net = nn.Linear(3, 1).requires_grad_(False)
    with pytest.raises(ProblemError, match="every outer parameter is frozen"):
        mf.adapt(module_problem(net), dict(net.named_parameters()), DATA, solver=mf.SGD(0.1, 1))


def test_trainable_holds_what_requires_grad_and_tied_weights_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net[2].requires_grad_(False)
    assert set(mf.trainable(net)) == {"0.weight", "0.bias", "1.bias"}


# --- updates in place ---------------------------------------------------------------------------


@dataclasses.dataclass
class InPlace:
    """A solver that writes to the fast weights, to its state or to the outer parameters."""

    what: str
    steps: int = 2

    def init(self, params):
        return {k: torch.zeros_like(v) for k, v in params.items()}

    def update(self, params, grads, state, step, outer):
        if self.what == "fast":
            return {k: v.sub_(0.1 * grads[k]) for k, v in params.items()}, state
        if self.what == "data":
            for k, v in params.items():
                v.data -= 0.1 * grads[k]
            return params, state
        if self.what == "state":
            state = {k: m.mul_(0.9).add_(grads[k]) for k, m in state.items()}
        else:
            outer["w"].mul_(0.9)
        return {k: v - 0.1 * state[k] for k, v in params.items()}, state


@pytest.mark.parametrize("way", [*WAYS, "adapt"])
@pytest.mark.parametrize("estimator", ["graph", "recompute", "first", "implicit", "penalty"])
@pytest.mark.parametrize("what", ["fast", "data", "state", "outer"])
def test_a_solver_that_works_in_place_is_refused_and_undone(what, estimator, way):
    def loss(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum()

    problem, outer = mf.Problem(loss, loss), {"w": torch.ones(3)}
    episode = mf.Episode(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ProblemError, match=r"solver\.update changes .* in place"):
        if way == "adapt":
            mf.adapt(problem, outer, episode.support, solver=InPlace(what))
        else:
            meta = mf.bilevel(problem, solver=InPlace(what), estimator=EVERY[estimator])
            WAYS[way](meta, outer, episode)
    assert outer["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("where", ["fast", "support"])
def test_a_loss_that_works_in_place_is_refused_and_undone(where):
    def loss(fast, slow, x):
        if where == "fast":
            fast["w"].data.clamp_(max=0.5)
        else:
            x.sub_(x.mean())
        return ((fast["w"] - x) ** 2).sum()

    outer, x = {"w": torch.ones(3)}, torch.tensor([1.0, 2.0, 3.0])
    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 2), estimator=mf.FirstOrder())
    with pytest.raises(ProblemError, match=r"inner_loss changes the .* in place"):
        mf.hypergrad(meta)(outer, mf.Episode(x, x))
    assert outer["w"].tolist() == [1.0, 1.0, 1.0] and x.tolist() == [1.0, 2.0, 3.0]


# --- mistakes that train nothing, or something else -----------------------------------------------


NET = nn.Linear(3, 1).double()


def net_loss(fast, slow, data):
    return ((functional_call(NET, fast, (data[0],)) - data[1]) ** 2).mean()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", EVERY)
def test_an_outer_loss_that_ignores_the_fast_weights_is_refused(estimator, way):
    problem = mf.Problem(net_loss, lambda fast, slow, data: ((NET(data[0]) - data[1]) ** 2).mean())
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=EVERY[estimator])
    with pytest.raises(ProblemError, match="outer_loss depends on none of the fast weights"):
        WAYS[way](meta, mf.trainable(NET), mf.Episode(DATA, DATA))


@pytest.mark.parametrize("over", [None, "vmap", "loop"])
@pytest.mark.parametrize("estimator", EVERY)
@pytest.mark.parametrize("kind", ["state_dict", "detached"])
def test_an_outer_that_nothing_flows_to_is_refused(kind, estimator, over):
    outer = NET.state_dict()
    if kind == "detached":
        outer = {k: v.detach() for k, v in NET.named_parameters()}
    episode = mf.Episode(DATA, DATA)
    problem = mf.Problem(net_loss, net_loss)
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=EVERY[estimator])
    if over:
        meta = mf.over_tasks(meta, how=over, randomness="same")
        episode = mf.stack_episodes([episode, episode])
    with pytest.raises(ProblemError, match="nothing in outer requires grad"):
        meta(outer, episode)
    with torch.no_grad():
        assert meta(outer, episode)[0].isfinite()
    mf.hypergrad(meta)(outer, episode)


def test_a_closed_over_module_is_something_that_flows():
    net = nn.Linear(3, 1)

    def inner(fast, slow, data):
        return ((net(data[0]) + fast["shift"] - data[1]) ** 2).mean()

    problem = mf.Problem(inner, inner, lambda slow, support: {"shift": torch.zeros(1)})
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    meta({}, mf.Episode(DATA, DATA))[0].backward()
    assert net.weight.grad.any()


class OneValue(InPlace):
    def update(self, params, grads, state, step, outer):
        return {k: v - 0.1 * grads[k] for k, v in params.items()}


class DropsAKey(InPlace):
    def update(self, params, grads, state, step, outer):
        return {"weight": params["weight"] - grads["weight"]}, state


def returns_a_dict(inner_loss, solver, start, outer, support):
    return start


def drops_a_key(inner_loss, solver, start, outer, support):
    return mf.Solution({"weight": start["weight"]}, torch.zeros(0))


GOOD = {"solver": mf.SGD(0.1, 2), "estimator": mf.FirstOrder()}
EPISODES = mf.Episode(DATA, DATA)
MISTAKES = {
    "an optimiser class": (dict(GOOD, solver=torch.optim.SGD), EPISODES, r"class SGD: write mf"),
    "an optimiser": (
        dict(GOOD, solver=torch.optim.SGD(NET.parameters(), 0.1)),
        EPISODES,
        r"steps, init and update.*torch\.optim work in place",
    ),
    "a solver's class": (dict(GOOD, solver=mf.SGD), EPISODES, r"got the class SGD: write mf\.SGD"),
    "a solver's name": (dict(GOOD, solver="sgd"), EPISODES, r"solver must have steps.*got str"),
    "an estimator's class": (
        dict(GOOD, estimator=mf.Unrolled),
        EPISODES,
        r"got the class Unrolled: write mf\.Unrolled\(\)",
    ),
    "an estimator's name": (dict(GOOD, estimator="maml"), EPISODES, r"must be a function.*'maml'"),
    "a list of episodes": (GOOD, [EPISODES, EPISODES], r"list of 2 episodes.*stack_episodes"),
    "an update of one value": (
        dict(GOOD, solver=OneValue("")),
        EPISODES,
        r"update must return \(fast weights, state\).*got dict",
    ),
    "an update that drops a key": (
        dict(GOOD, solver=DropsAKey("")),
        EPISODES,
        r"update must return every fast weight; 'bias'",
    ),
    "an estimator that returns a dict": (
        dict(GOOD, estimator=returns_a_dict),
        EPISODES,
        r"returns_a_dict must return mf\.Solution\(params, losses\), got dict",
    ),
    "an estimator that drops a key": (
        dict(GOOD, estimator=drops_a_key),
        EPISODES,
        r"drops_a_key must return every fast weight.*got \['weight'\]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_clear_sentence(name):
    parts, episode, message = MISTAKES[name]
    with pytest.raises(ProblemError, match=message):
        meta = mf.bilevel(mf.Problem(net_loss, net_loss), **parts)
        meta(mf.trainable(NET), episode)


def test_given_a_dict_is_refused():
    with pytest.raises(ProblemError, match=r"must be a function .*mf\.Given\(lambda.*got dict"):
        mf.Given({"w": torch.zeros(1)})


def test_a_problem_that_is_none_is_refused():
    with pytest.raises(ProblemError, match=r"problem must be an mf\.Problem"):
        mf.bilevel(net_loss, solver=mf.SGD(0.1, 1), estimator=mf.Unrolled())


# --- losses that build a graph of their own are no closures ---------------------------------------


def penalised(fast, slow, data):
    """A gradient penalty as it is written everywhere in torch."""
    x = data.detach().clone().requires_grad_()
    y = torch.tanh(x @ fast["w"])
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (y**2).mean() + slow["lam"] * (g**2).sum(-1).mean()


def penalised_in_closed_form(fast, slow, data):
    y = torch.tanh(data @ fast["w"])
    g = (1 - y**2)[:, None] * fast["w"]
    return (y**2).mean() + slow["lam"] * (g**2).sum(-1).mean()


@pytest.mark.parametrize("estimator", ["graph", "last", "recompute", "recompute=2", "implicit"])
def test_a_gradient_penalty_is_exact(estimator):
    torch.manual_seed(0)
    outer, x = {"lam": torch.tensor(0.5), "w": torch.randn(3)}, torch.randn(5, 3)
    got, want = (
        by_backward(
            mf.bilevel(
                mf.Problem(loss, lambda f, s, d: (f["w"] ** 2).sum(), lambda s, d: {"w": s["w"]}),
                solver=mf.SGD(0.1, 2),
                estimator=TWICE[estimator],
            ),
            outer,
            mf.Episode(x, x),
        )
        for loss in (penalised, penalised_in_closed_form)
    )
    # The same sums in another order.
    torch.testing.assert_close(flat(got), flat(want), rtol=1e-9, atol=1e-12)


def test_a_gradient_penalty_under_torch_func_is_refused_in_words():
    outer, x = {"lam": torch.tensor(0.5), "w": torch.randn(3)}, torch.randn(5, 3)
    problem = mf.Problem(penalised, lambda f, s, d: (f["w"] ** 2).sum(), lambda s, d: {"w": s["w"]})
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled(hvp=mf.hvp_forward))
    with pytest.raises(mf.errors.TransformError, match=r"requires_grad_\(\).*torch\.func\.grad"):
        by_backward(meta, outer, mf.Episode(x, x))


@pytest.mark.parametrize("inside", ["graph", "recompute", "forward", "implicit"])
@pytest.mark.parametrize("outside", ["graph", "recompute", "forward", "implicit"])
def test_three_levels_are_exact(outside, inside):
    """The lower level has the closed form u = w (1 - 0.8^3) of three steps of gradient descent."""
    torch.manual_seed(0)
    outer, x = {"lam": torch.tensor(0.5), "w": torch.randn(3)}, torch.randn(5, 3)
    low = mf.Problem(
        lambda f, s, d: ((f["u"] - s["w"]) ** 2).sum(),
        lambda f, s, d: ((d @ f["u"]) ** 2).mean(),
        lambda s, d: {"u": torch.zeros(3)},
    )
    lower = mf.bilevel(low, solver=mf.SGD(0.1, 3), estimator=TWICE[inside])
    # The implicit derivative is that of the minimum, u = w, at the point that is reached.
    rate = 1 - 0.8**3
    slope = 1.0 if inside == "implicit" else rate

    def nested(f, s, d):
        return lower({"w": f["w"]}, mf.Episode(d, d))[0] + s["lam"] * (f["w"] ** 2).sum()

    def by_hand(f, s, d):
        w = f["w"]
        u = rate * w.detach() + slope * (w - w.detach()) if inside == "implicit" else rate * w
        return ((d @ u) ** 2).mean() + s["lam"] * (w**2).sum()

    if inside == "implicit":
        pytest.skip("the value of an implicit lower level is not the integral of its derivative")
    got, want = (
        by_backward(
            mf.bilevel(
                mf.Problem(loss, lambda f, s, d: (f["w"] ** 2).sum(), lambda s, d: {"w": s["w"]}),
                solver=mf.SGD(0.05, 2),
                estimator=TWICE[outside],
            ),
            outer,
            mf.Episode(x, x),
        )
        for loss in (nested, by_hand)
    )
    # Two orders of the same sums, through two levels.
    torch.testing.assert_close(flat(got), flat(want), rtol=1e-8, atol=1e-11)
