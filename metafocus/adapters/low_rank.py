"""The low-rank update of a linear module: one for all rows of a batch, or one for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from metafocus.adapters.placement import is_conv1d
from metafocus.errors import ProblemError


def sizes(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output features of a linear module.

    Example:
        >>> sizes(nn.Linear(2, 3))
        (2, 3)
    """
    if is_conv1d(module):
        return int(module.nx), int(module.nf)  # pyright: ignore[reportArgumentType]
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def update(
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
    tensors: dict[str, Tensor],
    *,
    scale: float,
) -> Tensor:
    """Return `output + scale * B (A x)`, where each row of the batch may have its own A and B.

    The products are in the type of the output, in which A and B are rounded: in bfloat16 the
    update and the gradients of A and B have its relative precision of 2^-8, as those of every
    other weight of the module have, and no float32 tensor is as large as the output. A and B
    themselves, and what is added to them, keep their type.

    Args:
        module: The linear module.
        args: `x`, `[..., in]`; or `[batch, ..., in]`, if `tensors` have a leading dimension.
        output: The output of the module for `x`.
        tensors: `lora_A` `[rank, in]` and `lora_B` `[out, rank]`; or `[batch, rank, in]` and
            `[batch, out, rank]`.
        scale: The scale of the update.

    Raises:
        ProblemError: If the leading dimension is not that of `x`.
    """
    inputs, a, b = (x.to(output.dtype) for x in (args[0], tensors["lora_A"], tensors["lora_B"]))
    if a.ndim == 2:
        low = functional.linear(inputs, a)
        # addmm adds the product to the output and rounds the sum once.
        added = torch.addmm(_rows(output), _rows(low), b.mT, alpha=scale)
        return added.view(output.shape)
    # A row of a matrix may be a token or an example, so only batches of sequences are accepted.
    if inputs.ndim < 3 or len(inputs) != len(a):
        raise ProblemError(
            f"{type(module).__name__} has fast weights for each of {len(a)} examples, but its "
            f"input has shape {list(inputs.shape)} and not [{len(a)}, ..., {a.shape[-1]}]: bind "
            "fast weights made for this batch, and only on modules that see whole sequences (not "
            "the output head, not experts that tokens are routed to)"
        )
    low = torch.bmm(inputs.flatten(1, -2), a.mT)
    return torch.baddbmm(output.flatten(1, -2), low, b.mT, alpha=scale).view(output.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def of_examples(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether fast weights of a module are there for each example, not shared.

    Example:
        >>> of_examples({"lora_A": torch.zeros(5, 4, 2)}), of_examples({})
        (True, False)
    """
    return any(x.ndim > 2 for name, x in tensors.items() if name.endswith("lora_A"))


def examples(fast: Mapping[str, Tensor], names: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of examples that fast weights belong to; None if they are shared.

    Args:
        fast: The fast weights.
        names: Their names with the shapes of shared fast weights.

    Raises:
        ProblemError: If a shape fits neither form, or the numbers of examples differ.

    Example:
        >>> examples({"w": torch.zeros(5, 2)}, {"w": (2,)})
        5
    """
    leading: dict[str, tuple[int, ...]] = {}
    for name, shape in names.items():
        found = tuple(fast[name].shape)
        extra = found[: len(found) - len(shape)]
        if len(extra) > 1 or found != extra + tuple(shape):
            raise ProblemError(
                f"LoRA: {name!r} has shape {list(found)}, expected {list(shape)}, or that behind "
                "the number of examples"
            )
        leading[name] = extra
    if len(set(leading.values())) > 1:
        one, other = (next(k for k, v in leading.items() if v == x) for x in set(leading.values()))
        raise ProblemError(
            f"LoRA: {one!r} has shape {list(fast[one].shape)} and {other!r} "
            f"{list(fast[other].shape)}: all fast weights have the same number of examples in "
            "front, or none has"
        )
    extra = next(iter(leading.values()), ())
    return extra[0] if extra else None


def for_each(fast: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return equal fast weights for each of `number` examples: `[...] -> [number, ...]`.

    Example:
        >>> for_each({"w": torch.zeros(2)}, 5)["w"].shape
        torch.Size([5, 2])
    """
    # The result is contiguous, because forward mode refuses tensors whose elements share memory.
    return {k: v.expand(number, *v.shape).contiguous() for k, v in fast.items()}


def one_of(fast: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the fast weights of one example, in the shared form: `[number, ...] -> [...]`.

    Example:
        >>> one_of({"w": torch.zeros(5, 2)}, 0)["w"].shape
        torch.Size([2])
    """
    return {name: value[index] for name, value in fast.items()}
