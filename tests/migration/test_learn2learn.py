"""Each pair of docs/migration/learn2learn.md gives equal tensors in float64.

`import learn2learn` wants a gym and torchvision; its algorithms do not, and are imported alone.
"""

from __future__ import annotations

import pytest

from migration import pairs

pairs.rival("learn2learn", "learn2learn.algorithms.maml", "learn2learn.algorithms.meta_sgd")


@pytest.mark.parametrize("title", pairs.idioms("learn2learn"))
def test_pair(title):
    pairs.check("learn2learn", title)
