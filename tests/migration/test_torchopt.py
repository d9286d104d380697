"""Each pair of docs/migration/torchopt.md gives equal tensors in float64."""

from __future__ import annotations

import pytest

from migration import pairs

pairs.rival("torchopt")


# TorchOpt corrects the bias of Adam in torch's default dtype, whatever that of the weights.
@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning")
@pytest.mark.parametrize("title", pairs.idioms("torchopt"))
def test_pair(title):
    pairs.check("torchopt", title)
