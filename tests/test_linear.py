"""Linear solvers against a dense solve."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, assert_close, flat

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")


def system(dim=6, condition=100.0, seed=0):
    """A positive definite matrix on two fast weights, one of them a matrix."""
    g = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=F64))
    eigenvalues = torch.logspace(0, float(torch.log10(torch.tensor(condition))), dim, dtype=F64)
    A = basis @ torch.diag(eigenvalues) @ basis.T
    A = (A + A.T) / 2
    return A, torch.randn(dim, generator=g, dtype=F64)


def split(v):
    return {"a": v[:2], "b": v[2:].reshape(2, -1)}


def matvec_of(A):
    return lambda v: split(A @ flat(v))


@pytest.mark.parametrize("damping", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("make", [lambda d: mf.CG(6, d), mf.Dense])
@pytest.mark.parametrize("batched", [False, True])
def test_direct_and_cg_equal_a_dense_solve(make, damping, batched):
    A, b = system()
    want = torch.linalg.solve(A + damping * torch.eye(6), b)

    def run(A, b):
        return flat(make(damping)(matvec_of(A), split(b)))

    if batched:
        got = torch.func.vmap(run)(
            torch.stack([A, 2 * A + damping * torch.eye(6)]), torch.stack([b, 2 * b])
        )
        # (2 A + 2 d) x = 2 b has the same solution.
        assert_close(got[1], want, 1e-10)
        got = got[0]
    else:
        got = run(A, b)
    # CG on six unknowns: exact up to rounding times the condition number 100.
    assert_close(got, want, 1e-11)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(3, 8), st.floats(1, 1e4), st.floats(-6, 6))
def test_cg_is_exact_after_as_many_steps_as_unknowns(seed, half, condition, scale):
    dim = 2 * half
    A, b = system(dim, condition, seed)
    A, b = A * 10**scale, b * 10**-scale
    want = torch.linalg.solve(A, b)
    got = flat(mf.CG(4 * dim)(matvec_of(A), split(b)))
    # Loss of orthogonality costs steps, so four times as many; then rounding times condition.
    assert_close(got, want, 1e-9)


def test_cg_is_the_best_point_of_its_krylov_space():
    A, b = system()
    exact = torch.linalg.solve(A, b)
    for steps in (1, 2, 3, 4, 5):
        space = torch.stack([torch.linalg.matrix_power(A, j) @ b for j in range(steps)], 1)
        space, _ = torch.linalg.qr(space)
        best = space @ torch.linalg.solve(space.T @ A @ space, space.T @ b)
        got = flat(mf.CG(steps)(matvec_of(A), split(b)))
        # Galerkin in the Krylov space: the definition of CG. Powers of A are ill-conditioned.
        assert_close(got, best, 1e-7)
        error = (got - exact) @ A @ (got - exact)
        rate = (10 - 1) / (10 + 1)
        assert error <= 4 * rate ** (2 * steps) * (exact @ A @ exact)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_neumann_is_its_sum(steps):
    A, b = system()
    scale = 0.015
    want, term = torch.zeros(6), scale * b
    for _ in range(steps):
        want, term = want + term, term - scale * A @ term
    # Order of sums.
    assert_close(flat(mf.Neumann(steps, scale)(matvec_of(A), split(b))), want, 1e-13)


def test_neumann_converges_where_it_says():
    A, b = system()
    want = torch.linalg.solve(A, b)
    scale = 2 / (1 + 100)
    rate = 1 - scale
    for steps in (100, 1000):
        got = flat(mf.Neumann(steps, scale)(matvec_of(A), split(b)))
        # Exactly |I - scale A|^steps of the solution; symmetric, so the bound is tight.
        assert (got - want).norm() <= rate**steps * want.norm() * (1 + 1e-9) + 1e-12


def test_the_number_of_products():
    A, b = system()
    calls = []

    def matvec(v):
        calls.append(1)
        return split(A @ flat(v))

    mf.CG(4)(matvec, split(b))
    assert len(calls) == 4
    calls.clear()
    mf.Neumann(4, 0.01)(matvec, split(b))
    assert len(calls) == 3


ALL = [mf.CG(8), mf.CG(8, 0.3), mf.Neumann(5, 0.01), mf.Dense(), mf.Dense(0.3)]


@pytest.mark.parametrize("solve", ALL, ids=str)
def test_zero_right_hand_side(solve):
    A, b = system()
    assert not flat(solve(matvec_of(A), split(0 * b))).any()


@pytest.mark.parametrize("solve", [mf.CG(1), mf.CG(5), mf.Dense(), mf.Neumann(3, 1.0)], ids=str)
def test_the_identity(solve):
    _, b = system()
    got = flat(solve(lambda v: v, split(b)))
    # One step; further ones divide 0 by a guarded 0.
    assert_close(got, b, 1e-15)


def test_cg_on_a_singular_consistent_system_is_the_least_norm_solution():
    A, b = system()
    v = torch.linalg.eigh(A).eigenvectors[:, :2]
    A = A - A @ v @ v.T
    A = (A + A.T) / 2
    b = A @ b
    got = flat(mf.CG(4)(matvec_of(A), split(b)))
    # Four eigenvalues are left; rounding times their condition.
    assert_close(got, torch.linalg.pinv(A) @ b, 1e-9)
    for steps in (5, 6, 12):
        more = flat(mf.CG(steps)(matvec_of(A), split(b)))
        assert more.isfinite().all()


def test_cg_on_zero_and_on_a_null_direction_stays_where_it_is():
    _, b = system()
    assert not flat(mf.CG(5)(lambda v: {k: 0 * x for k, x in v.items()}, split(b))).any()
    A = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0]))
    got = flat(mf.CG(20)(matvec_of(A), split(A @ b)))
    assert_close(got, A @ b, 1e-14)


@pytest.mark.parametrize("steps", [6, 7, 12, 60, 200])
def test_cg_beyond_convergence_stays_there(steps):
    A, b = system()
    got = flat(mf.CG(steps)(matvec_of(A), split(b)))
    # Rounding times the condition number, and no division of noise by noise.
    assert_close(got, torch.linalg.solve(A, b), 1e-11)


def test_cg_under_vmap_where_tasks_converge_at_different_steps():
    A, b = system()
    As = torch.stack([torch.eye(6), A, torch.zeros(6, 6)])
    bs = torch.stack([b, b, b])
    got = torch.func.vmap(lambda A, b: flat(mf.CG(8)(matvec_of(A), split(b))))(As, bs)
    assert_close(got[0], b, 1e-15)
    assert_close(got[1], torch.linalg.solve(A, b), 1e-11)
    assert not got[2].any()


@pytest.mark.parametrize("solve", [mf.CG(6), mf.CG(12), mf.Dense(), mf.CG(6, 0.5)], ids=str)
def test_solvers_can_be_differentiated(solve):
    A, b = system()
    damping = solve.damping * torch.eye(6)

    def ours(A, b):
        return flat(solve(lambda v: split((A + A.T) / 2 @ flat(v)), split(b))).sin().sum()

    def dense(A, b):
        return torch.linalg.solve((A + A.T) / 2 + damping, b).sin().sum()

    got = torch.func.grad(ours, argnums=(0, 1))(A, b)
    want = torch.func.grad(dense, argnums=(0, 1))(A, b)
    # Rounding times the square of the condition number.
    assert_close(got, want, 1e-9)


def test_dense_refuses_a_singular_matrix():
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        mf.Dense()(lambda v: {"x": 0 * v["x"]}, {"x": torch.ones(2)})


def test_dense_wants_no_symmetry():
    A = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    got = mf.Dense()(lambda v: {"x": A @ v["x"]}, {"x": torch.tensor([3.0, 3.0])})
    assert got["x"].tolist() == [1.0, 1.0]


def test_float32_stays_float32():
    for solve in ALL:
        got = solve(lambda v: {"x": 2 * v["x"]}, {"x": torch.ones(3, dtype=torch.float32)})
        assert got["x"].dtype == torch.float32


def test_constructors_refuse():
    for make in (mf.CG, lambda s: mf.Neumann(s, 0.1)):
        for steps in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match=f"steps must be an integer >= 1, got {steps!r}"):
                make(steps)
    for damping in (-1.0, float("nan")):
        for make in (lambda d: mf.CG(1, d), mf.Dense):
            with pytest.raises(ValueError, match=f"damping must be >= 0, got {damping}"):
                make(damping)
    for scale in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"scale must be positive, got {scale}"):
            mf.Neumann(3, scale)
