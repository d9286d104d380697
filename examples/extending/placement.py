"""A placement of your own: fast weights in every second layer.

A placement is any function from a model to module paths. Raise an error if nothing matches, because
an inner loop without fast weights would do nothing without any message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

import metafocus as mf


@dataclass(frozen=True)
class EveryNth:
    """Modules called `names` in layers `n - 1`, `2 n - 1`, ...: with `n = 2` every second one."""

    n: int
    names: Sequence[str]

    def __call__(self, model: nn.Module) -> tuple[str, ...]:
        everywhere = mf.top_layers(1.0, self.names)(model)
        per_layer = len(self.names)
        chosen = tuple(
            path for i, path in enumerate(everywhere) if i // per_layer % self.n == self.n - 1
        )
        if not chosen:
            raise mf.errors.PlacementError(
                f"EveryNth(n={self.n}) places nothing in {len(everywhere) // per_layer} layers; "
                "choose a smaller n."
            )
        return chosen


def main() -> tuple[str, ...]:
    layers = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(4)
    )
    model = nn.ModuleDict({"layers": layers})
    lora = mf.LoRA(EveryNth(2, ("up", "down")), rank=2, alpha=4.0)
    print(EveryNth(2, ("up", "down"))(model))
    print({name: list(value.shape) for name, value in lora.init(model).items()})
    return EveryNth(2, ("up", "down"))(model)


if __name__ == "__main__":
    main()
