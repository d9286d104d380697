"""Linear solvers against a dense solve, in every type, at every scale, and where there is none."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, assert_close, flat
from torch.utils._python_dispatch import TorchDispatchMode

import metafocus as mf
from metafocus.linear.inverse import Operator, inverse

pytestmark = pytest.mark.usefixtures("float64")

DIM = 6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def basis(seed=0, dim=DIM):
    return torch.linalg.qr(randn(dim, dim, seed=seed))[0]


def symmetric(eigenvalues, seed=0):
    q = basis(seed, len(eigenvalues))
    a = q @ torch.diag(torch.as_tensor(eigenvalues, dtype=F64)) @ q.T
    return (a + a.T) / 2


POSITIVE = symmetric([1.0, 2, 5, 10, 40, 100])
INDEFINITE = symmetric([-30.0, -2, -1, 1, 8, 60])
# Singular values 1 to 50, and nothing symmetric about it.
GENERAL = basis(1) @ torch.diag(torch.tensor([1.0, 2, 5, 10, 20, 50], dtype=F64)) @ basis(2)
SINGULAR = symmetric([0.0, 0, 1, 3, 7, 20])
ZERO = torch.zeros(DIM, DIM, dtype=F64)
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


# --- exact where they say so ---------------------------------------------------------------------

EXACT = {
    # A few steps more than unknowns: rounding costs CG orthogonality.
    "CG": (lambda damping: mf.CG(DIM + 2, damping), ["positive"]),
    "GMRES": (lambda damping: mf.GMRES(DIM, damping), list(MATRICES)),
    "Dense": (lambda damping: mf.Dense(damping), list(MATRICES)),
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("name", EXACT)
def test_exact_solvers_equal_a_dense_solve(name, damping, batched):
    make, matrices = EXACT[name]
    solve, eye = make(damping), damping * torch.eye(DIM)
    for A in (MATRICES[k] for k in matrices):
        if (A + eye).equal(INDEFINITE + 30 * torch.eye(DIM)):
            continue  # singular
        want = torch.linalg.solve(A + eye, B)
        if batched:
            As, bs = torch.stack([A, 2 * A + eye]), torch.stack([B, 2 * B])
            got, twin = torch.func.vmap(lambda a, b: solved(solve, a, b))(As, bs)
            # (2 A + 2 d) x = 2 b has the same solution.
            assert_close(twin, want, 1e-10)
        else:
            got = solved(solve, A, B)
        # As many steps as unknowns: rounding times the condition number, at most 100.
        assert_close(got, want, 1e-11)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(3, 8), st.floats(1, 1e4), st.floats(-6, 6))
def test_cg_is_exact_after_as_many_steps_as_unknowns(seed, half, condition, scale):
    dim = 2 * half
    values = torch.logspace(0, float(torch.log10(torch.tensor(condition))), dim, dtype=F64)
    A, b = 10**scale * symmetric(values, seed), 10**-scale * randn(dim, seed=seed + 2)
    # Loss of orthogonality costs steps, so four times as many; then rounding times condition.
    assert_close(solved(mf.CG(4 * dim), A, b), torch.linalg.solve(A, b), 1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(1, 1e4), st.floats(-6, 6))
def test_gmres_is_exact_after_as_many_steps_as_unknowns(seed, condition, scale):
    values = torch.logspace(0, float(torch.log10(torch.tensor(condition))), DIM, dtype=F64)
    A = 10**scale * basis(seed) @ torch.diag(values) @ basis(seed + 1)
    b = 10**-scale * randn(DIM, seed=seed + 2)
    # Rounding times the condition number.
    assert_close(solved(mf.GMRES(DIM), A, b), torch.linalg.solve(A, b), 1e-11 * condition)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_cg_is_the_best_point_of_its_krylov_space(steps):
    exact = torch.linalg.solve(POSITIVE, B)
    space = krylov(POSITIVE, B, steps)
    best = space @ torch.linalg.solve(space.T @ POSITIVE @ space, space.T @ B)
    got = solved(mf.CG(steps), POSITIVE, B)
    # Galerkin in the Krylov space: the definition of CG. Powers of A are ill-conditioned.
    assert_close(got, best, 1e-7)
    error = (got - exact) @ POSITIVE @ (got - exact)
    rate = (10 - 1) / (10 + 1)
    assert error <= 4 * rate ** (2 * steps) * (exact @ POSITIVE @ exact)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MATRICES)
def test_gmres_has_the_smallest_residual_of_its_krylov_space(name, steps):
    A = MATRICES[name]
    space = krylov(A, B, steps)
    best = space @ torch.linalg.lstsq(A @ space, B[:, None]).solution[:, 0]
    # The definition of GMRES. The powers of A behind the oracle are ill-conditioned.
    assert_close(solved(mf.GMRES(steps), A, B), best, 1e-9)


def test_conjugate_gradients_tell_rounding_from_a_residual_of_too_few_steps():
    """In a half type: what two steps leave is expected, unless there is negative curvature."""
    A, b = POSITIVE.to(torch.bfloat16), B.to(torch.bfloat16)
    got, lost = mf.CG(2).with_residual(matvec_of(A), split(b))
    assert (B - POSITIVE @ flat(got).double()).norm() > 0.3 * B.norm()
    assert lost < 0.05  # a few units of 2^-8
    got, lost = mf.CG(2).with_residual(matvec_of(-A), split(b))
    left = (B + POSITIVE @ flat(got).double()).norm() / B.norm()
    assert left > 0.3 and abs(lost - left) < 0.1 * left


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_neumann_is_its_sum(steps):
    scale, want, term = 0.015, torch.zeros(DIM), 0.015 * B
    for _ in range(steps):
        want, term = want + term, term - scale * POSITIVE @ term
    # Order of sums.
    assert_close(solved(mf.Neumann(steps, scale), POSITIVE, B), want, 1e-13)


def test_neumann_converges_where_it_says_and_knows_its_last_term():
    want, scale = torch.linalg.solve(POSITIVE, B), 2 / (1 + 100)
    rate = torch.eye(DIM) - scale * POSITIVE
    for steps in (2, 100, 1000):
        got, last = mf.Neumann(steps, scale).with_residual(matvec_of(POSITIVE), split(B))
        # Exactly |I - scale A|^steps of the solution; symmetric, so the bound is tight.
        bound = (1 - scale) ** steps * want.norm()
        assert (flat(got) - want).norm() <= bound * (1 + 1e-9) + 1e-12
        term = torch.linalg.matrix_power(rate, steps - 1) @ B
        assert abs(last - term.norm() / B.norm()) < 1e-12
    assert mf.Neumann(1, scale).with_residual(matvec_of(POSITIVE), split(B))[1] == 1


@pytest.mark.parametrize("solve", [mf.CG(1), mf.CG(5), mf.Dense(), mf.Neumann(3, 1.0)], ids=str)
def test_the_identity(solve):
    # One step; further ones find nothing left to do.
    assert_close(flat(solve(lambda v: v, split(B))), B, 1e-15)


@pytest.mark.parametrize("steps", [DIM, DIM + 1, 12, 60, 200])
@pytest.mark.parametrize("make", [mf.CG, mf.GMRES])
def test_beyond_convergence_they_stay_there(make, steps):
    for name, A in MATRICES.items():
        if make is mf.GMRES or name == "positive":
            # No division of noise by noise.
            assert_close(solved(make(steps), A, B), torch.linalg.solve(A, B), 1e-11)


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


def test_gmres_keeps_its_basis_orthogonal():
    A = basis(1) @ torch.diag(torch.logspace(0, -9, DIM, dtype=F64)) @ basis(2)
    x = torch.linspace(1, 2, DIM)
    residual = A @ (solved(mf.GMRES(DIM), A, A @ x) - x)
    # Backward stable: rounding of A x, whatever the condition number of 1e9.
    assert residual.norm() < 1e-13


# --- Nystrom -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-12, 1e-3, 0.5, 10.0])
@pytest.mark.parametrize("rank", [DIM, DIM + 5])
def test_nystrom_with_all_columns_is_the_damped_inverse(rank, damping):
    for A in (POSITIVE, INDEFINITE, SINGULAR):
        want = torch.linalg.solve(A + damping * torch.eye(DIM), B)
        # Rounding times the condition number, which is not squared: 100 / 1, or 20 / damping.
        condition = 20 / min(damping, 0.2)
        bound = 1e-15 * condition if A is SINGULAR else 1e-12
        assert_close(solved(mf.Nystrom(rank, damping), A, B), want, max(bound, 1e-12))


@pytest.mark.parametrize("damping", [1e-12, 1e-9, 1e-6])
def test_nystrom_at_full_rank_and_tiny_damping_does_not_cancel(damping):
    A = symmetric([1e-5, 1e-4, 1e-2, 1.0, 10, 100])
    want = torch.linalg.solve(A + damping * torch.eye(DIM), B)
    # Rounding times the condition number of 1e7; (b - C w) / damping would lose all digits.
    assert_close(solved(mf.Nystrom(DIM, damping), A, B), want, 1e-8)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_nystrom_is_its_formula(rank, seed):
    for A in (POSITIVE, INDEFINITE):
        chosen = sorted(random.Random(seed).sample(range(DIM), rank))
        columns = A[:, chosen]
        low = columns @ torch.linalg.inv(columns[chosen]) @ columns.T
        want = torch.linalg.solve(low + 0.3 * torch.eye(DIM), B)
        # Another order of operations; the condition of a few columns.
        assert_close(solved(mf.Nystrom(rank, 0.3, seed), A, B), want, 1e-11)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_nystrom_is_exact_for_low_rank_also_with_columns_to_spare(rank):
    root = randn(DIM, 2, seed=5)
    A = root @ root.T
    want = torch.linalg.solve(A + 0.1 * torch.eye(DIM), B)
    # Dependent columns: rounding over the damping.
    assert_close(solved(mf.Nystrom(rank, 0.1), A, B), want, 1e-13)


def test_nystrom_on_zero_and_under_vmap():
    # 1 / 0.5 for any basis.
    assert_close(solved(mf.Nystrom(3, 0.5), ZERO, B), 2 * B, 1e-15)
    As = torch.stack([POSITIVE, ZERO, INDEFINITE])
    got = torch.func.vmap(lambda a: solved(mf.Nystrom(3, 0.5), a, B))(As)
    # The same operations in another kernel.
    for one, A in zip(got, As, strict=True):
        assert_close(one, solved(mf.Nystrom(3, 0.5), A, B), 1e-12)


# --- Identity and WarmStart ----------------------------------------------------------------------


def test_identity_is_a_multiple_for_any_matrix():
    for A in (GENERAL, SINGULAR):
        # One multiplication.
        assert torch.equal(solved(mf.Identity(0.25), A, B), B / 4)
    batched = torch.func.vmap(lambda b: solved(mf.Identity(), GENERAL, b))(torch.stack([B, 2 * B]))
    assert torch.equal(batched[1], 2 * B)


@pytest.mark.parametrize(
    "solve",
    [mf.CG(DIM + 2), mf.GMRES(DIM), mf.Dense(), mf.Neumann(4000, 2 / 101)],
    ids=lambda s: type(s).__name__,
)
def test_warm_start_does_not_change_an_exact_solution(solve):
    want = torch.linalg.solve(POSITIVE, B)
    for start in (torch.zeros(DIM), randn(DIM, seed=9), want):
        # Rounding times the condition number.
        assert_close(solved(mf.WarmStart(solve, split(start)), POSITIVE, B), want, 1e-11)


@pytest.mark.parametrize(
    "rough", [mf.CG(2), mf.GMRES(2), mf.Neumann(9, 0.015)], ids=lambda s: type(s).__name__
)
def test_warm_start_is_its_formula_and_helps(rough):
    want = torch.linalg.solve(POSITIVE, B)
    start = want + 1e-3 * randn(DIM, seed=9)
    warm = mf.WarmStart(rough, split(start))
    got = solved(warm, POSITIVE, B)
    formula = start + solved(rough, POSITIVE, B - POSITIVE @ start)
    # The same operations at another scale; what is missing has lost three digits.
    assert_close(got, formula, 1e-13)
    assert (got - want).norm() < 0.1 * (solved(rough, POSITIVE, B) - want).norm()
    batched = torch.func.vmap(lambda b: solved(warm, POSITIVE, b))(torch.stack([B, 2 * B]))
    assert_close(batched[0], got, 1e-12)


def test_warm_start_with_identity_iterates_richardson():
    x = split(torch.zeros(DIM))
    for _ in range(3):
        x = mf.WarmStart(mf.Identity(0.01), x)(matvec_of(POSITIVE), split(B))
    # Three steps of x += 0.01 (b - A x): the Neumann series.
    assert_close(flat(x), solved(mf.Neumann(3, 0.01), POSITIVE, B), 1e-14)


def test_warm_start_refuses_another_shape():
    warm = mf.WarmStart(mf.CG(2), {"a": torch.zeros(3)})
    with pytest.raises(mf.errors.ProblemError, match="start has the shapes"):
        warm(lambda v: v, {"a": torch.zeros(2)})


# --- no solution: the value shows it -------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 60])
def test_cg_is_nan_once_only_a_direction_without_curvature_is_left(steps):
    # One step reaches x = (2, 2); the next direction is (0, 2), which the matrix sends to zero.
    found = solved(mf.CG(steps), torch.diag(torch.tensor([1.0, 0.0])), torch.ones(2))
    assert found.tolist() == [2.0, 2.0] if steps == 1 else found.isnan().all()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("make", [mf.CG, mf.GMRES])
@pytest.mark.parametrize("dim", [6, 40])
def test_a_singular_system_has_its_least_norm_solution_or_none(dim, make, seed):
    A = symmetric([0.0] * (dim // 2) + torch.linspace(1, 10, dim // 2).tolist(), seed)
    inside, outside = A @ randn(dim, seed=seed), randn(dim, seed=seed)
    for steps in (dim // 2, dim // 2 + 1, 3 * dim):
        # Rounding times the condition of what is left; more steps must not add a multiple of
        # the kernel.
        got = solved(make(steps), A, inside)
        assert_close(got, torch.linalg.pinv(A, rtol=1e-10) @ inside, 1e-12)
    assert solved(make(3 * dim), A, outside).isnan().all()


def test_gmres_is_nan_where_its_krylov_space_holds_no_solution():
    A = torch.diag(torch.ones(DIM - 1), 1)
    # A e_2 = e_1, but the space of e_1 is e_1 alone. B is not in the range.
    for b in (torch.eye(DIM)[0], B):
        assert solved(mf.GMRES(DIM), A, b).isnan().all()
    # Before the space is exhausted x is the point with the smallest residual, as ever.
    got = solved(mf.GMRES(3), A, B)
    assert (B - A @ got).norm() <= B.norm() * (1 + 1e-12)


def test_dense_refuses_a_singular_matrix_and_gives_nan_where_nothing_can_be_looked_at():
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        mf.Dense()(lambda v: {"x": 0 * v["x"]}, {"x": torch.ones(2)})
    got = torch.func.vmap(lambda A: solved(mf.Dense(), A, B))(torch.stack([ZERO, POSITIVE]))
    assert got[0].isnan().all()
    assert_close(got[1], torch.linalg.solve(POSITIVE, B), 1e-12)


def test_neumann_on_a_singular_matrix_is_the_truncation_it_promises():
    # Exact sums of the same number.
    assert torch.equal(solved(mf.Neumann(4, 0.5), ZERO, torch.ones(DIM)), 2 * torch.ones(DIM))


# --- every type, every scale ---------------------------------------------------------------------


def band(diagonal, beside):
    """A tridiagonal matrix whose entries even bfloat16 holds."""
    ones = torch.ones(DIM - 1, dtype=F64)
    return diagonal * torch.eye(DIM, dtype=F64) + beside * (ones.diag(1) + ones.diag(-1))


# Eigenvalues 1.2 to 4.8; -1.6 to 2.1 without one between -0.19 and 0.69; 0.27 to 3.7 and zero.
GOOD, NEGATIVE, LAPLACE = band(3.0, 1.0), band(0.25, 1.0), band(2.0, -1.0)
LAPLACE[0, 0] = LAPLACE[-1, -1] = 1.0
RAMP = torch.linspace(1, 2, DIM, dtype=F64)
SCALES = {
    F64: [1e-300, 1e-30, 1.0, 1e30, 1e300],
    torch.float32: [1e-37, 1e-30, 1e-24, 1.0, 1e30, 1e37],
    torch.bfloat16: [1e-37, 1e-30, 1e-24, 1.0, 1e30, 1e37],
    torch.float16: [1e-6, 1e-4, 1e-3, 1.0, 1e3, 3e4],
}
TABLE = {
    "CG": mf.CG(8),
    "GMRES": mf.GMRES(15),
    "Neumann": mf.Neumann(100, 0.35),
    "Dense": mf.Dense(),
    "Nystrom": mf.Nystrom(DIM, 1e-7),
    "WarmStart": mf.WarmStart(mf.CG(8), split(torch.zeros(DIM, dtype=F64))),
}
types = pytest.mark.parametrize("dtype", SCALES, ids=str)
solvers = pytest.mark.parametrize("name", TABLE)
# No look at a matrix, so neither zeros nor NaN in it change anything.
LOOKING = [name for name in TABLE if name not in ("Neumann", "Nystrom")]


def typed(solve, A, b, dtype):
    """Solve in a type; A is rounded, b is given in it; the result must be of that type too."""
    got = solved(solve, A.to(dtype), b)
    assert got.dtype == dtype
    return got.double()


def rounding(dtype):
    """Products and residuals are right to a few units; the condition number is 4."""
    info = torch.finfo(dtype)
    return 40 * info.eps if info.bits >= 32 else 4 * info.eps


@types
@solvers
def test_any_scale_of_the_right_hand_side(name, dtype):
    for scale in SCALES[dtype]:
        b = (scale * RAMP).to(dtype)
        want = torch.linalg.solve(GOOD, b.double() / scale)
        solve = TABLE[name]
        starts = [solve] if name != "WarmStart" else [solve, mf.WarmStart(mf.CG(8), split(b / 4))]
        for one in starts:
            got = typed(one, GOOD, b, dtype) / scale
            # float16 cannot hold the smallest solutions better than to its smallest number.
            held = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / scale
            error = (got - want).norm()
            # Nystrom solves for A + 1e-7.
            assert error <= (rounding(dtype) + 1e-7 * (name == "Nystrom")) * want.norm() + 3 * held


@types
@solvers
def test_nan_and_infinity_are_passed_on(name, dtype):
    ramp, solve = RAMP.to(dtype), TABLE[name]
    for bad in (torch.nan, torch.inf):
        b, A = ramp.clone(), GOOD.clone()
        b[2], A[2, 3] = bad, bad
        assert not typed(solve, GOOD, b, dtype).isfinite().all()
        assert not typed(solve, A, ramp, dtype).isfinite().all()
        # Not even where nothing is asked of A.
        assert not typed(solve, A, 0 * ramp, dtype).isfinite().all()
    assert not typed(mf.CG(1), A, ramp, dtype).isfinite().all()
    assert typed(mf.Identity(), GOOD, b, dtype).isinf().sum() == 1


@types
@solvers
def test_zero_right_hand_side_and_zero_matrix(name, dtype):
    ramp, solve = RAMP.to(dtype), TABLE[name]
    assert not typed(solve, GOOD, 0 * ramp, dtype).any()
    if name == "Dense":
        return  # refused: above
    got = typed(solve, ZERO, ramp, dtype)
    known = {"Neumann": 35.0, "Nystrom": 1e7}
    if name in known and known[name] < torch.finfo(dtype).max:
        assert_close(got, known[name] * ramp.double(), rounding(dtype))
    else:
        assert not got.isfinite().any()


@types
@pytest.mark.parametrize("name", ["CG", "GMRES", "WarmStart"])
def test_a_singular_matrix(name, dtype):
    # In the range: entries that sum to zero, exactly.
    inside = torch.tensor([1.0, -1, 2, -2, 0.5, -0.5], dtype=F64)
    got = typed(TABLE[name], LAPLACE, inside.to(dtype), dtype)
    # Rounding times a condition number of 14.
    assert_close(got, torch.linalg.pinv(LAPLACE) @ inside, 4 * rounding(dtype))
    # Not in the range, and exactly so for a coordinate that A ignores.
    ignoring = GOOD.clone()
    ignoring[-1] = ignoring[:, -1] = 0
    assert typed(TABLE[name], ignoring, RAMP.to(dtype), dtype).isnan().all()
    if torch.finfo(dtype).bits >= 32:
        # A half type rounds this matrix to one of condition number 1 / eps.
        assert typed(TABLE[name], LAPLACE, RAMP.to(dtype), dtype).isnan().all()


@types
@pytest.mark.parametrize("name", ["CG", "GMRES", "Dense", "Nystrom", "Neumann"])
def test_negative_curvature(name, dtype):
    b = RAMP.to(dtype)
    if name == "Neumann":
        # It diverges, and does as it says.
        got, last = mf.Neumann(9, 0.35).with_residual(matvec_of(NEGATIVE.to(dtype)), split(b))
        rate = torch.eye(DIM) - 0.35 * NEGATIVE
        want = sum(torch.linalg.matrix_power(rate, j) @ b.double() for j in range(9)) * 0.35
        assert_close(flat(got).double(), want, rounding(dtype))
        assert last > 1
    elif name != "CG" or torch.finfo(dtype).bits >= 32:
        # CG wants a positive definite matrix: a half type does not get it through the others.
        got = typed(TABLE[name], NEGATIVE, b, dtype)
        # Rounding times a condition number of 11; CG loses some more.
        bound = (30 if name == "CG" else 3) * rounding(dtype) + 1e-6 * (name == "Nystrom")
        assert_close(got, torch.linalg.solve(NEGATIVE, b.double()), bound)


@types
@solvers
def test_under_vmap_each_task_is_by_itself(name, dtype):
    low, high = (SCALES[dtype][i] for i in (1, -1))
    broken = GOOD.clone()
    broken[0, 0] = torch.nan
    As = torch.stack([GOOD, broken, GOOD, ZERO, GOOD, LAPLACE]).to(dtype)
    scales = torch.tensor([low, 1, high, 1, 1, 1], dtype=F64)
    bs = (scales[:, None] * RAMP).to(dtype)
    bs[4, 1] = torch.nan
    got = torch.func.vmap(lambda A, b: solved(TABLE[name], A, b))(As, bs).double()
    for i in (0, 2):
        want = torch.linalg.solve(GOOD, bs[i].double() / scales[i])
        assert_close(got[i] / scales[i], want, rounding(dtype) + 1e-7 * (name == "Nystrom"))
    assert not got[[1, 4]].isfinite().all(1).any()
    if name in LOOKING:
        assert not got[3].isfinite().any()


@types
@solvers
def test_derivatives_at_any_scale(name, dtype):
    # b small and the cotangent large, so that their product, the derivative by A, is held.
    small, large = SCALES[dtype][1], SCALES[dtype][-2]
    b, w = (small * RAMP).to(dtype), (large * RAMP.flip(0)).to(dtype)
    A = GOOD.to(dtype)
    operator = Operator(lambda theta: matvec_of(theta[0]), lambda theta: matvec_of(theta[0].T))

    def value(A, b):
        return (flat(inverse(operator, TABLE[name], [A], split(b))) * w).sum()

    by_A, by_b = torch.func.grad(value, (0, 1))(A, b)
    adjoint = torch.linalg.solve(GOOD, w.double() / large)
    x = torch.linalg.solve(GOOD, b.double() / small)
    bound = 4 * rounding(dtype) + 1e-6 * (name == "Nystrom")
    assert_close(by_b.double() / large, adjoint, bound)
    assert_close(by_A.double() / (small * large), -torch.outer(adjoint, x), bound)
    # A task of NaN leaves the others alone.
    As, bs = torch.stack([A, torch.nan * A, A]), torch.stack([b, b, b])
    many, _ = torch.func.vmap(torch.func.grad(value, (0, 1)))(As, bs)
    assert_close(many[2].double(), by_A.double(), bound)
    assert many[1].isnan().any()


def test_a_huge_or_tiny_matrix_does_not_overflow():
    for name in ("CG", "GMRES", "Dense", "Nystrom"):
        for scale in (1e-36, 1e-20, 1e20, 1e36):
            solve = mf.Nystrom(DIM, 1e-7 * scale) if name == "Nystrom" else TABLE[name]
            A, b = (scale * GOOD).float(), RAMP.float()
            got = typed(solve, A, b, torch.float32) * scale
            # As for a matrix of ordinary size.
            assert_close(got, torch.linalg.solve(GOOD, RAMP), rounding(torch.float32) + 1e-6)


def test_mixed_types_come_back_as_they_were():
    b = {"a": RAMP[:3].to(torch.bfloat16), "b": RAMP[3:].float()}

    def matvec(v):
        assert {k: x.dtype for k, x in v.items()} == {k: x.dtype for k, x in b.items()}
        return {k: 2 * x for k, x in v.items()}

    for solve in [*TABLE.values(), mf.Identity()]:
        if isinstance(solve, mf.WarmStart):
            solve = mf.WarmStart(mf.GMRES(3), {k: v.float() for k, v in b.items()})
        got = solve(matvec, b)
        assert {k: x.dtype for k, x in got.items()} == {k: x.dtype for k, x in b.items()}
        if not isinstance(solve, mf.Identity):
            # Half of b, to the rounding of bfloat16.
            assert_close(torch.cat([x.double() for x in got.values()]), RAMP / 2, 1e-2)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@solvers
def test_complex_entries_are_pairs_of_real_ones(name, dtype):
    # Hermitian with the eigenvalues of GOOD.
    unitary = torch.linalg.qr(torch.complex(randn(DIM, DIM), randn(DIM, DIM, seed=1)))[0]
    A = unitary @ GOOD.to(torch.complex128) @ unitary.mH
    b = torch.complex(B, B.flip(0))
    solve = TABLE[name]
    if name == "Nystrom":
        solve = mf.Nystrom(2 * DIM, 1e-7)
    want = torch.linalg.solve(A, b)
    for scale in (1e-30, 1.0, 1e30):
        if name == "WarmStart":
            solve = mf.WarmStart(mf.CG(8), split((scale * b).to(dtype)))
        got = solved(solve, A.to(dtype), (scale * b).to(dtype))
        assert got.dtype == dtype
        error = (got.to(torch.complex128) / scale - want).norm()
        assert error <= (rounding(dtype.to_real()) + 1e-7 * (name == "Nystrom")) * want.norm()


def test_autocast_does_not_reach_the_arithmetic():
    # Elementwise, so that autocast leaves the product itself alone.
    D = torch.linspace(1, 5, DIM, dtype=torch.float32)
    b = {"x": RAMP.float()}
    for name, solve in TABLE.items():
        if name == "WarmStart":
            solve = mf.WarmStart(mf.GMRES(DIM), {"x": torch.ones(DIM, dtype=torch.float32)})
        with torch.autocast("cpu", torch.bfloat16):
            got = solve(lambda v: {"x": D * v["x"]}, b)["x"]
        # float32, and the damping of Nystrom.
        assert_close(got, b["x"] / D, rounding(torch.float32) + 1e-6)


# --- no look at a value --------------------------------------------------------------------------


class NoLook(TorchDispatchMode):
    """Refuse whatever waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in ("_local_scalar", "nonzero", "_check_errors")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@solvers
def test_no_solver_looks_at_a_value(name, dtype):
    A, b = GOOD.to(dtype), RAMP.to(dtype)
    with NoLook():
        if name == "Dense":
            torch.func.vmap(lambda A: solved(TABLE[name], A, b))(A[None])
        else:
            solved(TABLE[name], A, b)
    with pytest.raises(AssertionError, match="_local_scalar"), NoLook():
        bool(b.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "solve",
    [mf.CG(2), mf.GMRES(2), mf.Neumann(2, 0.3), mf.Dense(), mf.Nystrom(2, 0.1)],
    ids=lambda s: type(s).__name__,
)
def test_they_compile_into_one_graph(solve, dtype):
    A, b = GOOD.to(dtype), RAMP.to(dtype)

    def run(A, b):
        return solve(lambda v: {"x": A @ v["x"]}, {"x": b})["x"]

    torch._dynamo.reset()
    got = torch.compile(run, backend="eager", fullgraph=True)(A, b)
    # The same operations.
    assert_close(got.double(), run(A, b).double(), rounding(dtype))


# --- the number of products, and arguments -------------------------------------------------------

ALL = [
    mf.CG(4),
    mf.CG(4, 0.3),
    mf.GMRES(4),
    mf.Neumann(4, 0.01),
    mf.Identity(),
    mf.Nystrom(4, 0.1),
    mf.WarmStart(mf.CG(4), split(torch.zeros(DIM, dtype=F64))),
]
PRODUCTS = [4, 4, 4, 3, 0, 4, 5]


@pytest.mark.parametrize(("solve", "count"), list(zip(ALL, PRODUCTS, strict=True)), ids=str)
def test_the_number_of_products_is_fixed(solve, count):
    for A in (POSITIVE, torch.eye(DIM), ZERO):
        calls = []

        def matvec(v, A=A, calls=calls):
            calls.append(1)
            return split(A @ flat(v))

        solve(matvec, split(B))
        assert len(calls) == count


@pytest.mark.parametrize("solve", [*ALL[:6], mf.Dense()], ids=str)
def test_empty_stays_empty(solve):
    assert solve(lambda v: v, {}) == {}
    if not isinstance(solve, mf.Dense):  # torch's vmap has no rows to map over
        assert solve(lambda v: v, {"x": torch.zeros(0, 3)})["x"].shape == (0, 3)


def test_constructors_refuse():
    for bad in (0, -1, True, 1.5):
        for make in (mf.CG, mf.GMRES, lambda s: mf.Neumann(s, 0.1)):
            with pytest.raises(ValueError, match=f"steps must be an integer >= 1, got {bad!r}"):
                make(bad)
        with pytest.raises(ValueError, match=f"rank must be an integer >= 1, got {bad!r}"):
            mf.Nystrom(bad, 0.1)
    for bad in (-1.0, float("nan")):
        for make in (lambda d: mf.CG(1, d), lambda d: mf.GMRES(1, d), mf.Dense):
            with pytest.raises(ValueError, match=f"damping must be >= 0, got {bad}"):
                make(bad)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be positive"):
            mf.Nystrom(1, bad)
        for make in (mf.Identity, lambda s: mf.Neumann(3, s)):
            with pytest.raises(ValueError, match=f"scale must be positive, got {bad}"):
                make(bad)


# --- derivatives of a solve ----------------------------------------------------------------------


@pytest.mark.parametrize("solve", [mf.CG(6), mf.CG(12), mf.Dense(), mf.CG(6, 0.5)], ids=str)
def test_solvers_can_be_differentiated(solve):
    damping = solve.damping * torch.eye(DIM)

    def ours(A, b):
        return solved(solve, (A + A.T) / 2, b).sin().sum()

    def dense(A, b):
        return torch.linalg.solve((A + A.T) / 2 + damping, b).sin().sum()

    got = torch.func.grad(ours, argnums=(0, 1))(POSITIVE, B)
    want = torch.func.grad(dense, argnums=(0, 1))(POSITIVE, B)
    # Rounding times the square of the condition number.
    assert_close(got, want, 1e-9)


@pytest.mark.parametrize("b", [B, 0 * B], ids=["b", "zero"])
def test_gmres_derivatives_through_its_steps_do_not_enlarge_rounding(b):
    # Done after two steps; a third would divide by what rounding has left.
    A = symmetric([2.0, 2, 2, -5, -5, -5])
    slope = torch.func.grad(lambda b: solved(mf.GMRES(5), A, b).sum())(b)
    # |A^-1| is 0.5; two steps' worth of derivatives are of that size.
    assert slope.norm() < 100


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
