"""Fast weights on a model that PEFT has wrapped: outer LoRA trained, inner LoRA adapted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from metafocus.adapters.placement import Placement


@dataclass(frozen=True)
class BelowPeft:
    """A placement that means the base layer where PEFT has put its own adapter around one.

    PEFT replaces `...mlp.up_proj` by a module that holds the original as `base_layer` and its own
    matrices as further linear layers. With fast weights on the base layer the module computes
    `W x + s B A x + s' B' A' x`: PEFT's adapter `B A` is trained, the fast weights `B' A'` adapt.

    Args:
        where: any placement; paths of PEFT's own matrices are left out of it.

    Example:
        >>> from metafocus.adapters import top_layers
        >>> BelowPeft(top_layers(0.5, ("up",)))
        BelowPeft(where=top_layers(fraction=0.5, names=('up',)))
    """

    where: Placement

    def __call__(self, model: nn.Module) -> tuple[str, ...]:
        """The module paths in `model`."""
        modules = dict(model.named_modules())
        wrapped = {path for path, m in modules.items() if hasattr(m, "base_layer")}
        found: dict[str, None] = {}
        for path in self.where(model):
            home = _enclosing(path, wrapped)
            if home is None:
                found[path] = None
            elif path in (home, f"{home}.base_layer"):
                found[f"{home}.base_layer"] = None
        return tuple(found)


def _enclosing(path: str, wrapped: set[str]) -> str | None:
    """The wrapped module that `path` is or lies in."""
    parts = path.split(".")
    starts = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((start for start in starts if start in wrapped), None)


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into the model.

    Example:
        >>> is_peft(nn.Linear(2, 2))
        False
    """
    return hasattr(model, "peft_config")
