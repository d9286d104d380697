"""Linear solvers `x = solve(matvec, b)` on fast weights, with a fixed number of products.

All compute in float32 or wider on `b` over its largest entry, so any scale that the type of `b`
holds is right, and all pass NaN and infinity on. Where a system has no solution `x` is NaN. None of
them looks at a value on the host, so all work under `vmap` and `torch.compile`; `Dense` alone
raises for a singular matrix where it can be looked at. Where products are rounded to a half type,
`with_residual` of `CG`, `GMRES` and `Dense` measures what is lost.
"""

from __future__ import annotations

from metafocus.linear.direct import Dense, Nystrom
from metafocus.linear.krylov import CG, GMRES
from metafocus.linear.series import Identity, Neumann
from metafocus.linear.warm_start import WarmStart

__all__ = [
    "CG",
    "GMRES",
    "Dense",
    "Identity",
    "Neumann",
    "Nystrom",
    "WarmStart",
]
