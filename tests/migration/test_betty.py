"""Each pair of docs/migration/betty.md gives equal tensors in float64."""

from __future__ import annotations

import pytest

from migration import pairs

pairs.rival("betty")


@pytest.mark.parametrize("title", pairs.idioms("betty"))
@pytest.mark.filterwarnings("ignore")
def test_pair(title):
    pairs.check("betty", title)
