"""Finite-sum quadratic bilevel problems with a known value function.

Of the form that benchopt's benchmark_bilevel simulates, written anew: the inner term is
`1/2 z'A_i z + x'B_i z + a_i'z`, the outer term `1/2 z'C_j z + 1/2 x'D_j x + x'E_j z + c_j'z +
d_j'x`, for fast weights z and outer parameters x. Matrix algebra only, no metafocus oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import metafocus as mf

F64 = torch.float64


def _spd(count: int, dim: int, low: float, spread: float, g: torch.Generator) -> Tensor:
    """Symmetric matrices [count, dim, dim] around one with eigenvalues in [low, 1]."""
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=F64))
    mean = basis @ torch.diag(torch.linspace(low, 1.0, dim, dtype=F64)) @ basis.T
    noise = torch.randn(count, dim, dim, generator=g, dtype=F64)
    noise = spread * (noise + noise.mT) / dim
    return mean + noise - noise.mean(0)


@dataclass(frozen=True)
class Quadratics:
    """Terms on axis 0: inner (A, B, a), outer (C, D, E, c, d)."""

    inner: tuple[Tensor, Tensor, Tensor]
    outer: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

    @staticmethod
    def make(
        seed: int = 0,
        n: int = 12,
        m: int = 8,
        dim: int = 5,
        outer_dim: int = 3,
        spread: float = 0.3,
    ) -> Quadratics:
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=F64)

        inner = (
            _spd(n, dim, 0.2, spread, g),
            0.3 * randn(outer_dim, dim) + spread * 0.3 * randn(n, outer_dim, dim),
            randn(n, dim),
        )
        outer = (
            _spd(m, dim, 0.2, spread, g),
            _spd(m, outer_dim, 0.5, spread, g),
            0.1 * randn(m, outer_dim, dim),
            randn(m, dim),
            randn(m, outer_dim),
        )
        return Quadratics(inner, outer)

    # what metafocus sees

    @staticmethod
    def inner_loss(fast: Any, slow: Any, data: Any) -> Tensor:
        z, x, (A, B, a) = fast["z"], slow["x"], data
        return 0.5 * z @ A @ z + x @ B @ z + a @ z

    @staticmethod
    def outer_loss(fast: Any, slow: Any, data: Any) -> Tensor:
        z, x, (C, D, E, c, d) = fast["z"], slow["x"], data
        return 0.5 * z @ C @ z + 0.5 * x @ D @ x + x @ E @ z + c @ z + d @ x

    def problem(self) -> mf.Problem:
        zeros = torch.zeros(self.inner[0].shape[-1], dtype=F64)
        return mf.Problem(self.inner_loss, self.outer_loss, lambda slow, support: {"z": zeros})

    @property
    def data(self) -> mf.Episode:
        """All terms, stacked."""
        return mf.Episode(self.inner, self.outer)

    @property
    def full(self) -> mf.Episode:
        """The mean over all terms, as one term: the full batch."""
        return mf.Episode(
            tuple(x.mean(0) for x in self.inner), tuple(x.mean(0) for x in self.outer)
        )

    def start(self) -> dict[str, Tensor]:
        return {"x": torch.ones(self.inner[1].shape[1], dtype=F64)}

    # oracles

    def best(self, x: Tensor) -> Tensor:
        (A, B, a), _ = self.full
        return -torch.linalg.solve(A, B.T @ x + a)

    def value(self, x: Tensor) -> Tensor:
        return self.outer_loss({"z": self.best(x)}, {"x": x}, self.full.query)

    def hypergradient(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The implicit gradient at `z`, by default the exact inner minimum."""
        (A, B, _), (C, D, E, c, d) = self.full
        z = self.best(x) if z is None else z
        v = -torch.linalg.solve(A, C @ z + E.T @ x + c)
        return D @ x + E @ z + d + B @ v

    def hessian(self) -> Tensor:
        """The Hessian of the value function."""
        (A, B, _), (C, D, E, _, _) = self.full
        J = -torch.linalg.solve(A, B.T)
        return J.T @ C @ J + D + E @ J + (E @ J).T

    def solution(self) -> Tensor:
        zero = torch.zeros(len(self.hessian()), dtype=F64)
        return -torch.linalg.solve(self.hessian(), self.hypergradient(zero))

    def gap(self, x: Tensor) -> float:
        """Sub-optimality of the value function, by its Hessian: no cancellation."""
        e = x - self.solution()
        return (0.5 * e @ self.hessian() @ e).item()

    def penalised(self, strength: float) -> Tensor:
        """The minimum over x of `min_z (F + s G) - s min_z G`: where F2SA converges to."""
        (A, B, a), (C, D, E, c, d) = self.full
        s = strength

        def gradient(x: Tensor) -> Tensor:
            nudged = -torch.linalg.solve(C + s * A, (E + s * B).T @ x + c + s * a)
            return D @ x + E @ nudged + d + s * B @ (nudged - self.best(x))

        zero = torch.zeros(len(D), dtype=F64)
        columns = [gradient(e) - gradient(zero) for e in torch.eye(len(D), dtype=F64)]
        return -torch.linalg.solve(torch.stack(columns, dim=1), gradient(zero))


def descend(algorithm: Any, outer: Any, state: Any, episodes: Any, lr: float) -> tuple[Any, Any]:
    """Plain gradient descent outside; returns the outer parameters and the state."""
    aux = None
    for episode in episodes:
        grads, state, aux = algorithm.step(outer, state, episode)
        outer = {k: v - lr * grads[k] for k, v in outer.items()}
    assert aux is not None
    return outer, state
