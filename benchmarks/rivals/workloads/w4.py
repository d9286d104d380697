"""W4: an implicit hypergradient: 64 regularisation strengths of logistic regression on digits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals.targets import Target

TITLE = "W4: an implicit gradient"
TEXT = """
64 regularisation strengths of a 10-class logistic regression on scikit-learn's digits, 640 fast
weights, condition number 600, float64; conjugate gradients with 20 products. The inner solution is
given to all, so the hypergradient alone is measured. 20 products leave an error of 8e-3 in the
exact gradient, for all alike; the errors here are against the same 20 products by hand. Betty's
engine and BOAT's iteration cannot be asked for the gradient alone: they take an inner step too, of
length zero or from the minimum.
"""
REFERENCE = "torch.autograd by hand"
TOLERANCE = 1e-2  # the error of 20 products
REPEATS = 20
DTYPE = "float64"
PRODUCTS = 20


def cases(quick: bool) -> list[dict[str, Any]]:
    """One."""
    return [{"products": PRODUCTS}]


def inner(w: Tensor, log_l2: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy and a ridge with one strength for each pixel."""
    return F.cross_entropy(x @ w, y) + 0.5 * (log_l2.exp()[:, None] * w**2).sum()


def outer(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy on other images."""
    return F.cross_entropy(x @ w, y)


def data(case: dict[str, Any]) -> dict[str, Any]:
    """Return the images and the minimum of the inner loss."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(pixels, dtype=torch.float64) / 16, torch.as_tensor(labels)
    log_l2 = torch.full((64,), -4.0, dtype=torch.float64)
    w = torch.zeros(64, 10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = inner(w, log_l2, x[:900], y[:900])
        value.backward()
        return value

    optimizer.step(closure)
    return {
        "w": w.detach(),
        "log_l2": log_l2,
        "train": (x[:900], y[:900]),
        "test": (x[900:], y[900:]),
    }


TARGETS = [
    Target("no slower than hypertorch", "metafocus Implicit(CG(20))", "hypertorch CG", 1.0),
]
