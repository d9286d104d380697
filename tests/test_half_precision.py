"""A step in bfloat16 is as near to float64 as with products of fast weights in float32."""

from __future__ import annotations

import pytest

from benchmarks.half_precision import ESTIMATORS, errors


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_products_in_the_type_of_the_activations_cost_no_precision(estimator):
    found = [errors(64, 64, seed, ESTIMATORS[estimator]) for seed in range(4)]
    narrow, wide = (
        sum(row[name] ** 2 for row in found) ** 0.5 for name in ("narrow", "wide")
    )  # fmt: skip
    # Independent roundings add up in squares. A layer rounds activations about 12 times, and the
    # three updates of a layer with fast weights round twice more each, in half of the layers:
    # a quarter more at the most.
    assert narrow < 1.25**0.5 * wide
    # The roundings of bfloat16 are there: 2^-9 each.
    assert wide / 2 > 2**-9
