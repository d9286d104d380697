"""Each pair of docs/migration/higher.md gives equal tensors in float64."""

from __future__ import annotations

import pytest

from migration import pairs

pairs.rival("higher")


@pytest.mark.parametrize("title", pairs.idioms("higher"))
def test_pair(title):
    pairs.check("higher", title)
