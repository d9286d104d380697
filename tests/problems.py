"""Bilevel problems whose hypergradients are known, and oracles that do not use metafocus.

Everything is float64. A `Case` is one problem with outer parameters and a stack of episodes; the
oracles are written with plain `torch.autograd` and matrix algebra.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import metafocus as mf

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """A problem, its outer parameters and episodes stacked on axis 0."""

    problem: mf.Problem
    outer: dict[str, Tensor]
    episodes: mf.Episode

    def episode(self, i: int = 0) -> mf.Episode:
        return mf.Episode(*torch.utils._pytree.tree_map(lambda x: x[i], tuple(self.episodes)))

    @property
    def tasks(self) -> int:
        return torch.utils._pytree.tree_leaves(self.episodes)[0].shape[0]

    def leaves(self) -> dict[str, Tensor]:
        return {k: v.clone().requires_grad_() for k, v in self.outer.items()}


# --- quadratic: everything by matrix algebra -------------------------------------------------


class Quadratic:
    """inner 0.5 (x - B phi)' H (x - B phi) - support' x, outer 0.5 (x - q)' Q (x - q) + phi' phi.

    cond(H) = 100. `x` is split over two fast tensors, one of them a matrix, to catch a mix-up of
    names. The minimum is `x* = B phi + H^-1 support`.
    """

    def __init__(self, seed: int = 0, tasks: int = 3, dim: int = 5, outer_dim: int = 3):
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=F64)

        basis, _ = torch.linalg.qr(randn(dim, dim))
        self.eigenvalues = torch.logspace(0, 2, dim, dtype=F64)
        self.H = basis @ torch.diag(self.eigenvalues) @ basis.T
        self.H = (self.H + self.H.T) / 2
        self.B = randn(dim, outer_dim)
        self.A = randn(dim, outer_dim)
        root = randn(dim, dim)
        self.Q = root @ root.T
        self.phi = randn(outer_dim)
        self.support = randn(tasks, dim)
        self.query = randn(tasks, dim)
        self.lr = 2 / (self.eigenvalues[0] + self.eigenvalues[-1]).item()

    def join(self, fast: dict[str, Tensor]) -> Tensor:
        return torch.cat([fast["head.a"], fast["body"].reshape(-1)])

    def split(self, x: Tensor) -> dict[str, Tensor]:
        return {"head.a": x[:3], "body": x[3:].reshape(2, 1)}

    def inner(self, fast, slow, support):
        x = self.join(fast)
        e = x - self.B @ slow["phi"]
        return 0.5 * e @ self.H @ e - support @ x

    def outer_loss(self, fast, slow, query):
        e = self.join(fast) - query
        return 0.5 * e @ self.Q @ e + slow["phi"] @ slow["phi"]

    def start(self, slow, support):
        return self.split(self.A @ slow["phi"])

    def case(self) -> Case:
        problem = mf.Problem(self.inner, self.outer_loss, self.start)
        return Case(problem, {"phi": self.phi}, mf.Episode(self.support, self.query))

    # oracles, for plain SGD with rate self.lr
    def contraction(self) -> Tensor:
        return torch.eye(len(self.H), dtype=F64) - self.lr * self.H

    def minimum(self, phi: Tensor, support: Tensor) -> Tensor:
        return self.B @ phi + torch.linalg.solve(self.H, support)

    def iterate(self, phi: Tensor, support: Tensor, steps: int) -> Tensor:
        best = self.minimum(phi, support)
        power = torch.linalg.matrix_power(self.contraction(), steps)
        return best + power @ (self.A @ phi - best)

    def residual(self, phi: Tensor, support: Tensor, query: Tensor, steps: int) -> Tensor:
        return self.Q @ (self.iterate(phi, support, steps) - query)

    def unrolled(self, task: int, steps: int, last: int | None = None) -> Tensor:
        """The exact hypergradient through the last `last` steps, straight-through to init."""
        last = steps if last is None else min(last, steps)
        power = torch.linalg.matrix_power(self.contraction(), last)
        eye = torch.eye(len(self.H), dtype=F64)
        jacobian = (eye - power) @ self.B + power @ self.A
        v = self.residual(self.phi, self.support[task], self.query[task], steps)
        return 2 * self.phi + jacobian.T @ v

    def implicit(self, task: int, steps: int, inverse: Tensor | None = None) -> Tensor:
        """`direct - M' inverse v` at the iterate after `steps`; exact at the minimum."""
        inverse = torch.linalg.inv(self.H) if inverse is None else inverse
        v = self.residual(self.phi, self.support[task], self.query[task], steps)
        return 2 * self.phi + self.B.T @ self.H @ inverse @ v

    def neumann(self, terms: int, scale: float) -> Tensor:
        total = torch.zeros_like(self.H)
        term = scale * torch.eye(len(self.H), dtype=F64)
        for _ in range(terms):
            total = total + term
            term = term - scale * self.H @ term
        return total


# --- ridge regression: the regulariser is the hyperparameter ----------------------------------


class Ridge:
    """inner mean (X w - y)^2 + exp(log_l2) |w|^2, outer mean (X' w - y')^2."""

    def __init__(self, seed: int = 0, tasks: int = 3, dim: int = 4, rows: int = 12):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(2, tasks, rows, dim, generator=g, dtype=F64)
        truth = torch.randn(dim, generator=g, dtype=F64)
        y = x @ truth + 0.5 * torch.randn(2, tasks, rows, generator=g, dtype=F64)
        self.support, self.query = (x[0], y[0]), (x[1], y[1])
        self.dim = dim

    def inner(self, fast, slow, data):
        x, y = data
        return ((x @ fast["w"] - y) ** 2).mean() + (slow["log_l2"].exp() * fast["w"] ** 2).sum()

    def outer_loss(self, fast, slow, data):
        x, y = data
        return ((x @ fast["w"] - y) ** 2).mean()

    def case(self) -> Case:
        zeros = torch.zeros(self.dim, dtype=F64)
        problem = mf.Problem(self.inner, self.outer_loss, lambda slow, support: {"w": zeros})
        return Case(
            problem,
            {"log_l2": torch.full((self.dim,), -1.0, dtype=F64)},
            mf.Episode(self.support, self.query),
        )

    def meta(self, log_l2: Tensor, task: int) -> Tensor:
        """The outer loss at the exact minimum, differentiable as often as one likes."""
        x, y = self.support[0][task], self.support[1][task]
        gram = x.T @ x / len(x) + torch.diag(log_l2.exp())
        w = torch.linalg.solve(gram, x.T @ y / len(x))
        return self.outer_loss({"w": w}, {}, (self.query[0][task], self.query[1][task]))


# --- MAML: sinusoids, a tanh network, a proximal pull and a learned rate -----------------------


def sinusoid_tasks(
    tasks: int, shots: int, queries: int, generator: torch.Generator | None = None
) -> mf.Episode:
    """Sinusoid regression: amplitude U[0.1, 5], phase U[0, pi], x U[-5, 5]; y = a sin(x - p)."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=F64)

    amplitude = uniform(0.1, 5.0, tasks, 1, 1)
    phase = uniform(0.0, math.pi, tasks, 1, 1)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        x = uniform(-5.0, 5.0, tasks, n, 1)
        return x, amplitude * torch.sin(x - phase)

    return mf.Episode(draw(shots), draw(queries))


def network(fast: dict[str, Tensor], x: Tensor) -> Tensor:
    h = torch.tanh(x @ fast["0.weight"].T + fast["0.bias"])
    return h @ fast["2.weight"].T + fast["2.bias"]


def regression(fast, slow, data):
    x, y = data
    return ((network(fast, x) - y) ** 2).mean()


PULL = 0.3
FAST = ("0.weight", "0.bias", "2.weight", "2.bias")


def pulled(fast, slow, data):
    """`regression` with the proximal pull written out."""
    pull = sum(((fast[k] - slow[k]) ** 2).sum() for k in fast)
    return regression(fast, slow, data) + 0.5 * PULL * pull


def maml(tasks: int = 3, hidden: int = 4, seed: int = 0) -> Case:
    """A network of 13 parameters, a learned scalar rate and learned rates per parameter."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=g, dtype=F64)

    weights = {
        "0.weight": randn(hidden, 1),
        "0.bias": randn(hidden),
        "2.weight": randn(1, hidden),
        "2.bias": randn(1),
    }
    outer = dict(weights)
    outer["log_lr"] = torch.tensor(-3.0, dtype=F64)
    for k, v in weights.items():
        outer[f"lr.{k}"] = 0.02 + 0.05 * torch.rand(v.shape, generator=g, dtype=F64)
    problem = mf.Problem(
        mf.proximal(regression, PULL), regression, lambda slow, support: {k: slow[k] for k in FAST}
    )
    return Case(problem, outer, sinusoid_tasks(tasks, 5, 6, g))


def scalar_rate(outer):
    return outer["log_lr"].exp()


def rate_each(outer):
    return {k: outer[f"lr.{k}"] for k in FAST}


# --- inner optimisers, once more and naively ---------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The settings of an inner optimiser; `naive_adapt` runs it by its textbook formulas."""

    kind: str = "sgd"
    lr: Any = 0.05
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip: tuple[str, float] | None = None

    def solver(self, steps: int):
        clip = None
        if self.clip is not None:
            kind, limit = self.clip
            clip = mf.clip_global(limit) if kind == "global" else mf.clip_per_tensor(limit)
        if self.kind == "adam":
            return mf.Adam(self.lr, steps, weight_decay=self.weight_decay, clip=clip)
        return mf.SGD(self.lr, steps, self.momentum, self.nesterov, self.weight_decay, clip)


SOLVERS = {
    "plain": Recipe(),
    "momentum": Recipe(momentum=0.8),
    "nesterov": Recipe(momentum=0.8, nesterov=True, weight_decay=0.1),
    "decay": Recipe(weight_decay=0.3),
    "clip_tensor": Recipe(clip=("tensor", 0.7)),
    "clip_global": Recipe(clip=("global", 0.9), momentum=0.5),
    "adam": Recipe(kind="adam", weight_decay=0.1),
    "learned_rate": Recipe(lr=scalar_rate, momentum=0.5),
    "learned_rates": Recipe(lr=rate_each),
}


def naive_adapt(
    inner: Callable[..., Tensor],
    start: dict[str, Tensor],
    outer: dict[str, Tensor],
    support: Any,
    recipe: Recipe,
    steps: int,
    last: int | None = None,
) -> dict[str, Tensor]:
    """A Python loop over `torch.autograd.grad(create_graph=True)`; nothing clever."""
    fast = dict(start)
    head = 0 if last is None else max(steps - last, 0)
    if head:
        fast = {k: v.detach() for k, v in fast.items()}
    velocity = {k: torch.zeros_like(v) for k, v in fast.items()}
    first = {k: torch.zeros_like(v) for k, v in fast.items()}
    second = {k: torch.zeros_like(v) for k, v in fast.items()}
    for t in range(steps):
        constant = t < head
        slow = {k: v.detach() for k, v in outer.items()} if constant else outer
        if constant:
            fast = {k: v.detach().requires_grad_() for k, v in fast.items()}
            velocity = {k: v.detach() for k, v in velocity.items()}
            first = {k: v.detach() for k, v in first.items()}
            second = {k: v.detach() for k, v in second.items()}
        elif t == head and head:
            fast = {k: v.detach() + start[k] - start[k].detach() for k, v in fast.items()}
            velocity = {k: v.detach() for k, v in velocity.items()}
            first = {k: v.detach() for k, v in first.items()}
            second = {k: v.detach() for k, v in second.items()}
        loss = inner(fast, slow, support)
        g = dict(
            zip(
                fast, torch.autograd.grad(loss, list(fast.values()), create_graph=True), strict=True
            )
        )
        if recipe.clip is not None:
            kind, limit = recipe.clip
            if kind == "global":
                size = torch.cat([v.reshape(-1) for v in g.values()]).norm()
                g = {k: v * limit / size if size > limit else v for k, v in g.items()}
            else:
                g = {k: v * limit / v.norm() if v.norm() > limit else v for k, v in g.items()}
        rate = recipe.lr(slow) if callable(recipe.lr) else recipe.lr
        new = {}
        for k, p in fast.items():
            lr = rate[k] if isinstance(rate, dict) else rate
            if recipe.kind == "adam":
                b1, b2, eps = 0.9, 0.999, 1e-8
                first[k] = b1 * first[k] + (1 - b1) * g[k]
                second[k] = b2 * second[k] + (1 - b2) * g[k] ** 2
                m, v = first[k] / (1 - b1 ** (t + 1)), second[k] / (1 - b2 ** (t + 1))
                new[k] = p - lr * recipe.weight_decay * p - lr * m / (v.sqrt() + eps)
                continue
            d = g[k] + recipe.weight_decay * p
            if recipe.momentum:
                velocity[k] = recipe.momentum * velocity[k] + d
                d = d + recipe.momentum * velocity[k] if recipe.nesterov else velocity[k]
            new[k] = p - lr * d
        fast = new
    if head == steps and head:
        fast = {k: v.detach() + start[k] - start[k].detach() for k, v in fast.items()}
    return fast


def naive_meta(
    inner: Callable[..., Tensor],
    outer_loss: Callable[..., Tensor],
    init: Callable[..., dict[str, Tensor]],
    outer: dict[str, Tensor],
    episode: mf.Episode,
    recipe: Recipe,
    steps: int,
    last: int | None = None,
) -> Tensor:
    """The outer loss after `naive_adapt`, on the tape."""
    fast = naive_adapt(
        inner, init(outer, episode.support), outer, episode.support, recipe, steps, last
    )
    return outer_loss(fast, outer, episode.query)


# --- comparing trees ---------------------------------------------------------------------------


def flat(tree: Any) -> Tensor:
    """All tensors of a pytree in one vector; None counts as nothing."""
    leaves = [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]
    return torch.cat([x.reshape(-1) for x in leaves]) if leaves else torch.zeros(0, dtype=F64)


def grads_of(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `.grad` of each leaf, zeros where there is none."""
    return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}


def relative_error(got: Any, want: Any) -> float:
    """|got - want| / |want| over all entries."""
    a, b = flat(got), flat(want)
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Fail unless the trees have the same keys and |got - want| <= tolerance * |want|."""
    if isinstance(want, dict):
        assert list(got) == list(want), (list(got), list(want))
    error = relative_error(got, want)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"


def central_difference(
    f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, h: float = 1e-5
) -> Tensor:
    """(f(x + h d) - f(x - h d)) / 2h: error O(h^2) + O(1e-16 / h), about 1e-10 for h = 1e-5."""
    return (f(x + h * direction) - f(x - h * direction)) / (2 * h)
