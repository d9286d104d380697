"""GMRES, Nystrom, Identity, WarmStart and derivatives of solves, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, assert_close, flat

import metafocus as mf
from metafocus.linear.inverse import Operator, inverse

pytestmark = pytest.mark.usefixtures("float64")

DIM = 6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def basis(seed=0, dim=DIM):
    return torch.linalg.qr(randn(dim, dim, seed=seed))[0]


def symmetric(eigenvalues, seed=0):
    q = basis(seed)
    a = q @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ q.T
    return (a + a.T) / 2


POSITIVE = symmetric([1.0, 2, 5, 10, 40, 100])
INDEFINITE = symmetric([-30.0, -2, -1, 1, 8, 60])
# Singular values 1 to 50, and nothing symmetric about it.
GENERAL = basis(1) @ torch.diag(torch.tensor([1.0, 2, 5, 10, 20, 50], dtype=F64)) @ basis(2)
SINGULAR = symmetric([0.0, 0, 1, 3, 7, 20])
B = randn(DIM, seed=3)
MATRICES = {"positive": POSITIVE, "indefinite": INDEFINITE, "general": GENERAL}


def split(v):
    return {"a": v[:2], "b": v[2:].reshape(2, -1)}


def matvec_of(A):
    return lambda v: split(A @ flat(v))


def solved(solve, A, b):
    return flat(solve(matvec_of(A), split(b)))


def krylov(A, b, steps):
    """Orthonormal basis of b, A b, ..., A^(steps-1) b."""
    vectors = [b / b.norm()]
    for _ in range(steps - 1):
        image = A @ vectors[-1]
        vectors.append(image / image.norm())
    return torch.linalg.qr(torch.stack(vectors, 1))[0]


# --- CG ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 60])
def test_cg_ends_where_the_curvature_is_zero(steps):
    # One step reaches x = (2, 2); the next direction is (0, 2), which the matrix sends to zero.
    found = solved(mf.CG(steps), torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), torch.ones(2))
    assert found.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e15])
def test_cg_beyond_convergence_stays_finite_when_all_squares_underflow(scale, dtype):
    A, b = 1e6 * POSITIVE.to(dtype), scale * B.to(dtype)
    found = solved(mf.CG(300), A, b)
    assert found.dtype == dtype
    # Rounding times the condition number of 100; in the smallest case squares start at 1e-36,
    # a step or two above the smallest normal number. Compared in float64, for the same reason.
    assert_close(found.double(), torch.linalg.solve(A, b).double(), 1e4 * torch.finfo(dtype).eps)


def test_cg_lets_nan_through():
    assert solved(mf.CG(3), POSITIVE * torch.nan, B).isnan().all()


# --- GMRES -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("name", MATRICES)
def test_gmres_equals_a_dense_solve(name, damping, batched):
    A = MATRICES[name]
    want = torch.linalg.solve(A + damping * torch.eye(DIM), B)
    solve = mf.GMRES(DIM, damping)
    if batched:
        A = torch.stack([A, 2 * A + damping * torch.eye(DIM)])
        got = torch.func.vmap(lambda a, b: solved(solve, a, b))(A, torch.stack([B, 2 * B]))
        # (2 A + 2 d) x = 2 b has the same solution.
        assert_close(got[1], want, 1e-11)
        got = got[0]
    else:
        got = solved(solve, A, B)
    # Exact after as many steps as unknowns; rounding times the condition number, at most 100.
    assert_close(got, want, 1e-11)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MATRICES)
def test_gmres_has_the_smallest_residual_of_its_krylov_space(name, steps):
    A = MATRICES[name]
    space = krylov(A, B, steps)
    best = space @ torch.linalg.lstsq(A @ space, B[:, None]).solution[:, 0]
    got = solved(mf.GMRES(steps), A, B)
    # The definition of GMRES. The powers of A behind the oracle are ill-conditioned.
    assert_close(got, best, 1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(1, 1e4), st.floats(-6, 6))
def test_gmres_is_exact_after_as_many_steps_as_unknowns(seed, condition, scale):
    values = torch.logspace(0, float(torch.log10(torch.tensor(condition))), DIM, dtype=F64)
    A = 10**scale * basis(seed) @ torch.diag(values) @ basis(seed + 1)
    b = 10**-scale * randn(DIM, seed=seed + 2)
    # Rounding times the condition number.
    assert_close(solved(mf.GMRES(DIM), A, b), torch.linalg.solve(A, b), 1e-11 * condition)


@pytest.mark.parametrize("steps", [DIM, DIM + 1, 20, 60])
@pytest.mark.parametrize("name", MATRICES)
def test_gmres_beyond_convergence_stays_there(name, steps):
    A = MATRICES[name]
    # No division of noise by noise.
    assert_close(solved(mf.GMRES(steps), A, B), torch.linalg.solve(A, B), 1e-11)


def test_gmres_stops_as_early_as_the_eigenvalues_allow():
    A = symmetric([2.0, 2, 2, -5, -5, -5])
    for steps in (2, 3, 6, 10):
        # Two distinct eigenvalues: two steps.
        assert_close(solved(mf.GMRES(steps), A, B), torch.linalg.solve(A, B), 1e-13)
    seen = []

    def matvec(v):
        seen.append(flat(v))
        return split(A @ flat(v))

    mf.GMRES(5)(matvec, split(B))
    # Then nothing is left: no basis vector is made of rounding.
    assert [bool(v.any()) for v in seen] == [True, True, False, False, False]


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 6, 12])
def test_gmres_on_singular_symmetric_input_is_a_least_squares_point(steps):
    inside = SINGULAR @ B
    got = solved(mf.GMRES(steps), SINGULAR, inside)
    assert got.isfinite().all()
    if steps >= 4:
        # Four eigenvalues are left, and the start is in the range: the least-norm solution.
        assert_close(got, torch.linalg.pinv(SINGULAR) @ inside, 1e-11)
    # Not in the range: nothing can be done about the part in the kernel.
    got = solved(mf.GMRES(steps), SINGULAR, B)
    assert got.isfinite().all()
    kernel = B - SINGULAR @ torch.linalg.pinv(SINGULAR) @ B
    residual = B - SINGULAR @ got
    assert residual.norm() >= kernel.norm() * (1 - 1e-12)
    if steps >= 5:
        # The Krylov space of five vectors holds the kernel's part too.
        assert_close(residual, kernel, 1e-10)


def test_gmres_on_a_nilpotent_matrix_is_finite_and_no_worse_than_zero():
    A = torch.diag(torch.ones(DIM - 1), 1)
    for b in (torch.eye(DIM)[0], B):
        for steps in (1, 3, DIM, 10):
            got = solved(mf.GMRES(steps), A, b)
            assert got.isfinite().all()
            assert (b - A @ got).norm() <= b.norm() * (1 + 1e-12)


def test_gmres_under_vmap_where_tasks_break_down_at_different_steps():
    As = torch.stack([torch.eye(DIM), GENERAL, torch.zeros(DIM, DIM), SINGULAR, GENERAL])
    bs = torch.stack([B, B, B, SINGULAR @ B, 0 * B])
    got = torch.func.vmap(lambda a, b: solved(mf.GMRES(9), a, b))(As, bs)
    # Rounding times the condition number, in each task by itself.
    assert_close(got[0], B, 1e-14)
    assert_close(got[1], torch.linalg.solve(GENERAL, B), 1e-11)
    assert not got[2].any()
    assert_close(got[3], torch.linalg.pinv(SINGULAR) @ SINGULAR @ B, 1e-11)
    assert not got[4].any()


@pytest.mark.parametrize("b", [B, 0 * B], ids=["b", "zero"])
def test_gmres_derivatives_through_its_steps_do_not_enlarge_rounding(b):
    # Done after two steps; a third would divide by what rounding has left.
    A = symmetric([2.0, 2, 2, -5, -5, -5])
    slope = torch.func.grad(lambda b: solved(mf.GMRES(5), A, b).sum())(b)
    # |A^-1| is 0.5; two steps' worth of derivatives are of that size.
    assert slope.norm() < 100


def test_gmres_keeps_its_basis_orthogonal():
    A = basis(1) @ torch.diag(torch.logspace(0, -9, DIM, dtype=F64)) @ basis(2)
    x = torch.linspace(1, 2, DIM)
    residual = A @ (solved(mf.GMRES(DIM), A, A @ x) - x)
    # Backward stable: rounding of A x, whatever the condition number of 1e9.
    assert residual.norm() < 1e-13


# --- Nystrom ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-3, 0.5, 10.0])
@pytest.mark.parametrize("rank", [DIM, DIM + 5])
def test_nystrom_with_all_columns_is_the_damped_inverse(rank, damping):
    for A in (POSITIVE, SINGULAR, INDEFINITE):
        want = torch.linalg.solve(A + damping * torch.eye(DIM), B)
        # The normal equations of the columns square the condition, 1e5 at most.
        assert_close(solved(mf.Nystrom(rank, damping), A, B), want, 1e-7)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_nystrom_is_its_formula(rank, seed):
    import random

    for A in (POSITIVE, INDEFINITE):
        chosen = sorted(random.Random(seed).sample(range(DIM), rank))
        columns = A[:, chosen]
        low = columns @ torch.linalg.inv(columns[chosen]) @ columns.T
        want = torch.linalg.solve(low + 0.3 * torch.eye(DIM), B)
        # Another order of operations; the squared condition of a few columns.
        assert_close(solved(mf.Nystrom(rank, 0.3, seed), A, B), want, 1e-9)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_nystrom_is_exact_for_low_rank_also_with_columns_to_spare(rank):
    root = randn(DIM, 2, seed=5)
    A = root @ root.T
    want = torch.linalg.solve(A + 0.1 * torch.eye(DIM), B)
    # Dependent columns: the shift by rounding enlarged by 1 / damping^2.
    assert_close(solved(mf.Nystrom(rank, 0.1), A, B), want, 1e-10)


def test_nystrom_on_zero_and_under_vmap():
    zero = torch.zeros(DIM, DIM)
    assert_close(solved(mf.Nystrom(3, 0.5), zero, B), 2 * B, 1e-15)
    As = torch.stack([POSITIVE, zero, INDEFINITE])
    got = torch.func.vmap(lambda a: solved(mf.Nystrom(3, 0.5), a, B))(As)
    # The same operations in another kernel.
    for one, A in zip(got, As, strict=True):
        assert_close(one, solved(mf.Nystrom(3, 0.5), A, B), 1e-12)


# --- Identity and WarmStart ------------------------------------------------------------------


def test_identity_is_a_multiple_for_any_matrix():
    for A in (GENERAL, SINGULAR):
        # One multiplication.
        assert torch.equal(solved(mf.Identity(0.25), A, B), B / 4)
    batched = torch.func.vmap(lambda b: solved(mf.Identity(), GENERAL, b))(torch.stack([B, 2 * B]))
    assert torch.equal(batched[1], 2 * B)


EXACT = {
    # A few steps more than unknowns: rounding costs CG orthogonality.
    "CG": mf.CG(DIM + 2),
    "GMRES": mf.GMRES(DIM),
    "Dense": mf.Dense(),
    "Neumann": mf.Neumann(4000, 2 / 101),
}
ROUGH = {"CG": mf.CG(2), "GMRES": mf.GMRES(2), "Neumann": mf.Neumann(9, 0.015)}


@pytest.mark.parametrize("name", EXACT)
def test_warm_start_does_not_change_an_exact_solution(name):
    want = torch.linalg.solve(POSITIVE, B)
    for start in (torch.zeros(DIM), randn(DIM, seed=9), want):
        got = solved(mf.WarmStart(EXACT[name], split(start)), POSITIVE, B)
        # Rounding times the condition number.
        assert_close(got, want, 1e-11)


@pytest.mark.parametrize("name", ROUGH)
def test_warm_start_is_its_formula_and_helps(name):
    want = torch.linalg.solve(POSITIVE, B)
    start = want + 1e-3 * randn(DIM, seed=9)
    got = solved(mf.WarmStart(ROUGH[name], split(start)), POSITIVE, B)
    formula = start + solved(ROUGH[name], POSITIVE, B - POSITIVE @ start)
    # The same operations.
    assert_close(got, formula, 1e-15)
    cold = solved(ROUGH[name], POSITIVE, B)
    assert (got - want).norm() < 0.1 * (cold - want).norm()
    batched = torch.func.vmap(
        lambda b: solved(mf.WarmStart(ROUGH[name], split(start)), POSITIVE, b)
    )(torch.stack([B, 2 * B]))
    assert_close(batched[0], got, 1e-12)


def test_warm_start_with_identity_iterates_richardson():
    x = split(torch.zeros(DIM))
    for _ in range(3):
        x = mf.WarmStart(mf.Identity(0.01), x)(matvec_of(POSITIVE), split(B))
    # Three steps of x += 0.01 (b - A x): the Neumann series, in the same order of operations.
    assert_close(flat(x), solved(mf.Neumann(3, 0.01), POSITIVE, B), 1e-14)


def test_warm_start_refuses_another_shape():
    warm = mf.WarmStart(mf.CG(2), {"a": torch.zeros(3)})
    with pytest.raises(mf.errors.ProblemError, match="start has the shapes"):
        warm(lambda v: v, {"a": torch.zeros(2)})


# --- all of them -----------------------------------------------------------------------------

ALL = [
    mf.CG(4),
    mf.GMRES(4),
    mf.Neumann(4, 0.01),
    mf.Identity(),
    mf.Nystrom(4, 0.1),
    mf.WarmStart(mf.CG(4), split(torch.zeros(DIM, dtype=F64))),
]
PRODUCTS = [4, 4, 3, 0, 4, 5]


@pytest.mark.parametrize(("solve", "count"), list(zip(ALL, PRODUCTS, strict=True)), ids=str)
def test_the_number_of_products_is_fixed(solve, count):
    for A in (POSITIVE, torch.eye(DIM), torch.zeros(DIM, DIM)):
        calls = []

        def matvec(v, A=A, calls=calls):
            calls.append(1)
            return split(A @ flat(v))

        solve(matvec, split(B))
        assert len(calls) == count


@pytest.mark.parametrize("solve", ALL, ids=str)
@pytest.mark.parametrize("A", [SINGULAR, INDEFINITE, torch.zeros(DIM, DIM, dtype=F64)])
def test_singular_and_indefinite_input_is_never_nan(solve, A):
    for b in (B, SINGULAR @ B, 0 * B):
        assert solved(solve, A, b).isfinite().all()


@pytest.mark.parametrize("solve", ALL[:5], ids=str)
def test_float32_stays_float32_and_empty_stays_empty(solve):
    got = solve(lambda v: {"x": 2 * v["x"]}, {"x": torch.ones(3, dtype=torch.float32)})
    assert got["x"].dtype == torch.float32
    assert solve(lambda v: v, {}) == {}


def test_constructors_refuse():
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=f"steps must be an integer >= 1, got {bad!r}"):
            mf.GMRES(bad)
        with pytest.raises(ValueError, match=f"rank must be an integer >= 1, got {bad!r}"):
            mf.Nystrom(bad, 0.1)
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        mf.GMRES(1, -1.0)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be positive"):
            mf.Nystrom(1, bad)
        with pytest.raises(ValueError, match="scale must be positive"):
            mf.Identity(bad)


# --- derivatives of a solve ------------------------------------------------------------------

MATRIX = Operator(lambda theta: matvec_of(theta[0]), lambda theta: matvec_of(theta[0].T))
DIFFERENTIABLE = {
    "CG": (mf.CG(DIM), [POSITIVE, 3 * torch.eye(DIM, dtype=F64)]),
    "GMRES": (mf.GMRES(DIM), [GENERAL, INDEFINITE, 3 * torch.eye(DIM, dtype=F64)]),
    "Dense": (mf.Dense(), [GENERAL, INDEFINITE]),
    "WarmStart": (
        mf.WarmStart(mf.GMRES(DIM), split(randn(DIM, seed=4))),
        [GENERAL, 3 * torch.eye(DIM, dtype=F64)],
    ),
}


@pytest.mark.parametrize("b", [B, 0 * B], ids=["b", "zero"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_a_solve_are_solves(name, b):
    solve, matrices = DIFFERENTIABLE[name]
    weights = randn(DIM, seed=8)

    def taken(z):
        A = z[:-DIM].reshape(DIM, DIM)
        # CG may be asked for symmetric matrices only.
        return (A + A.T) / 2 if name == "CG" else A, z[-DIM:]

    def ours(z):
        A, b = taken(z)
        return flat(inverse(MATRIX, solve, [A], split(b))).sin() @ weights

    def dense(z):
        return torch.linalg.solve(*taken(z)).sin() @ weights

    for A in matrices:
        z = torch.cat([A.reshape(-1), b])
        t = randn(len(z), seed=5)
        want = torch.func.grad(dense)(z)
        exact = torch.func.jacrev(torch.func.grad(dense))(z)
        # Rounding times the square of the condition number, at second order its cube.
        assert_close(torch.func.grad(ours)(z), want, 1e-10)
        assert abs(torch.func.jvp(ours, (z,), (t,))[1] - want @ t) <= 1e-10 * want.norm() * t.norm()
        many = torch.func.vmap(torch.func.grad(ours))(torch.stack([z, z + 0.1 * t]))
        assert_close(many[0], want, 1e-10)
        assert_close(many[1], torch.func.grad(dense)(z + 0.1 * t), 1e-9)
        assert_close(torch.func.jacrev(torch.func.grad(ours))(z), exact, 1e-9)
        assert_close(torch.func.jacfwd(torch.func.grad(ours))(z), exact, 1e-9)
        leaf = z.clone().requires_grad_()
        (first,) = torch.autograd.grad(ours(leaf), leaf, create_graph=True)
        assert_close(first.detach(), want, 1e-10)
        assert_close(torch.autograd.grad(first @ t, leaf)[0], exact @ t, 1e-9)
