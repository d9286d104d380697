"""A rebuilt step sees the data of the first time, or the stream is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.errors import ProblemError
from metafocus.streams import Stream, is_stream
from metafocus.torch_internals import outside_transforms, pytree, tracing


class Watched:
    """A stream that notices when a rebuilt step is given other data than the first time."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.seen: dict[int, list[Tensor]] = {}
        self.compared: set[int] = set()

    def at(self, step: int) -> Any:
        """Return what the stream returns; compare each batch the first time it is asked for again.

        Raises:
            ProblemError: if it differs.
        """
        data = self.stream.at(step)
        if step in self.compared or tracing():
            return data
        with outside_transforms(), torch.no_grad():
            sums = _checksum(pt.tensors(data))
            if step not in self.seen:
                self.seen[step] = sums
                return data
            before = self.seen.pop(step)
            self.compared.add(step)
            same = len(before) == len(sums) and all(map(_equal, before, sums))
        if not same:
            raise ProblemError(
                f"the stream gave other data for inner step {step} when the step was "
                "rebuilt for its derivative: .at(step) must be pure. Draw the order of "
                "rows and random augmentations before the inner loop, by step number "
                "(mf.Batches.from_dataset does), or keep the graph: Unrolled() without "
                "recompute."
            )
        return data


def _checksum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a few sums of each tensor, on its device: only their comparison waits for the host."""
    found = []
    for x in tensors:
        # Sparse and jagged tensors have no entries in a fixed order.
        if x.layout is not torch.strided:
            continue
        flat = torch.view_as_real(x) if x.is_complex() else x
        flat = flat.detach().reshape(-1).double()
        # A weight for each place, so that another order of the rows is seen.
        places = torch.arange(flat.numel(), device=flat.device, dtype=flat.dtype).cos()
        found.append(torch.stack([flat.sum(), flat @ places, flat.new_tensor(flat.numel())]))
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    # The sums of data with NaN in them are NaN.
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def watched(data: Any) -> Any:
    """Return `data`, streams without visible tensors wrapped so that a rebuild is compared."""
    if not is_stream(data):
        return data
    return pytree.tree_map(lambda x: Watched(x) if is_stream(x) else x, data)
