"""Slots: hooks through which a module sees plain tensors that are not its parameters.

A slot is installed on a module once and then stays. While it holds a binding, the module's output
goes through `apply(module, args, output, tensors)`. While it is empty, the output does not change.
With `apply=as_parameters` the tensors replace the module's own parameters while the module runs. A
slot does not depend on the adapter: it holds tensors by name and one pure function.

Activation checkpointing needs the fast weights of a layer as explicit inputs. It reads them with
`bound(layer)` and `functions(layer)` in the forward pass. The backward pass recomputes under
`rebind(layer, tensors, functions)`, because the original binding no longer exists then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from metafocus.calls import changed, undone
from metafocus.errors import ProblemError
from metafocus.torch_internals import forward_hooks, parameter_table

Apply = Callable[[nn.Module, tuple[Any, ...], Any, dict[str, Tensor]], Any]
"""`(module, args, output, tensors) -> new output`, pure."""


class Binding(NamedTuple):
    """The content of a slot: a pure function and its tensors by name (without dots)."""

    apply: Apply
    tensors: dict[str, Tensor]


def as_parameters(
    module: nn.Module, args: tuple[Any, ...], output: Any, tensors: dict[str, Tensor]
) -> Any:
    """Return the output unchanged: the slot has swapped the parameters before the module ran."""
    return output


class Swap(NamedTuple):
    """What a module held before a swap of its parameters, and what it was given."""

    own: dict[str, Any]
    given: dict[str, Tensor]

    @classmethod
    def of(cls, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Swap:
        """Return the swap that gives tensors to a module, cast to the types of its parameters."""
        own = {name: table[name] for name in tensors}
        return cls(own, {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})


class Slot:
    """A forward hook, before and after, that applies its binding, if it has one.

    Parameters are swapped only while the module itself runs. So the swap is inside of any
    `functional_call`, and code outside of the module still reads the slow parameters.

    A copied or unpickled slot is empty, because a binding lasts for one `with` block and its
    tensors may belong to a graph or to a transform.

    Attributes:
        binding: The current binding or None.
        swaps: The swap of parameters, for each running call of the module.
    """

    __slots__ = ("binding", "swaps")

    def __init__(self) -> None:
        self.binding: Binding | None = None
        self.swaps: list[Swap] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        """Return None before the module runs. After it, return the new output, or None."""
        if self.binding is None:
            return None
        if self.binding.apply is as_parameters:
            # An interrupt may come between two statements: a swap is on the stack before it is made
            # and until it is undone.
            table, stack = parameter_table(module), self.swaps
            if output:
                table.update(stack[-1].own)
                stack.pop()
            else:
                stack.append(Swap.of(table, self.binding.tensors))
                table.update(stack[-1].given)
            return None
        if not output:
            return None
        return self.binding.apply(module, args, output[0], self.binding.tensors)

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()


def slot(module: nn.Module) -> Slot:
    """Return the slot of `module`; it is installed at the first call.

    Install it before `torch.compile` sees the module. Compiled code is not compiled again for hooks
    that are added later, and would silently run without them.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> slot(layer) is slot(layer)
        True
    """
    found = _find(module)
    if found is None:
        found = Slot()
        # Both are added at once, because compiled code would not see a hook that is added later.
        module.register_forward_pre_hook(found)
        module.register_forward_hook(found)
    return found


@contextmanager
def bind(bindings: Iterable[tuple[nn.Module, Binding]]) -> Iterator[None]:
    """Put bindings into the slots of modules, and restore the previous ones on exit.

    A binding replaces the slot's previous one and does not stack on it. Other slots do not change.

    Args:
        bindings: Pairs of a module and the binding for its slot.

    Raises:
        ProblemError: If the name of a tensor contains a dot.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> shift = Binding(lambda module, args, output, t: output + t["b"], {"b": torch.ones(2)})
        >>> with bind([(layer, shift)]):
        ...     shifted = layer(torch.zeros(2))
        >>> torch.equal(shifted, layer(torch.zeros(2)) + 1)
        True
    """
    held = [(module, slot(module), binding) for module, binding in bindings]
    for _, _, binding in held:
        dotted = [name for name in binding.tensors if "." in name]
        if dotted:
            raise ProblemError(f"names of bound tensors must not contain a dot, got {dotted}")
    with _held(held):
        yield


def bound(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are bound inside `module` now, by path relative to it.

    Returns:
        For example `{"mlp.gate_proj.lora_A": tensor, ...}`; empty outside of any binding.

    Example:
        >>> bound(nn.Sequential(nn.Linear(2, 2)))
        {}
    """
    return {
        join(path, name): tensor
        for path, _, found in _slots(module)
        if found.binding is not None
        for name, tensor in found.binding.tensors.items()
    }


def functions(module: nn.Module) -> dict[str, Apply]:
    """Return the functions of the bindings inside `module` now, by path relative to it.

    Returns:
        For example `{"mlp.gate_proj": function, ...}`, which `rebind` needs too.

    Example:
        >>> functions(nn.Sequential(nn.Linear(2, 2)))
        {}
    """
    return {
        path: found.binding.apply for path, _, found in _slots(module) if found.binding is not None
    }


@contextmanager
def rebind(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    functions: Mapping[str, Apply] | None = None,
) -> Iterator[None]:
    """Bind exactly `tensors` inside `module`, and restore the previous bindings on exit.

    Slots inside `module` that `tensors` does not name are empty in the block, so that a
    recomputation depends only on its arguments.

    Args:
        module: For example a decoder layer.
        tensors: The tensors by relative path, as `bound(module)` returned them.
        functions: The functions by relative path, as `functions(module)` returned them at the same
            time. None takes those of the bindings that are active now.

    Raises:
        ProblemError: If a tensor belongs to no slot, or its slot has no function.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> shift = lambda module, args, output, tensors: output + tensors["b"]
        >>> with bind([(layer, Binding(shift, {"b": torch.ones(2)}))]):
        ...     with rebind(layer, {"b": torch.zeros(2)}):
        ...         unshifted = layer(torch.zeros(2))
        >>> torch.equal(unshifted, layer(torch.zeros(2)))
        True
    """
    installed = list(_slots(module))
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        grouped.setdefault(path, {})[name] = tensor
    held: list[tuple[nn.Module, Slot, Binding | None]] = []
    for path, child, found in installed:
        values = grouped.pop(path, None)
        if values is None:
            held.append((child, found, None))
            continue
        apply = None if functions is None else functions.get(path)
        if functions is None and found.binding is not None:
            apply = found.binding.apply
        if apply is None:
            raise ProblemError(
                f"rebind: nothing says how the tensors {sorted(values)} of {path!r} act on it; "
                "pass functions=functions(module), read while they were bound"
            )
        held.append((child, found, Binding(apply, values)))
    if grouped:
        raise ProblemError(
            f"rebind: no slot in {type(module).__name__} for {sorted(grouped)}; "
            f"its slots are {sorted(path for path, _, _ in installed)}"
        )
    with _held(held):
        yield


@contextmanager
def _held(held: list[tuple[nn.Module, Slot, Any]]) -> Iterator[None]:
    before = [(module, found, len(found.swaps)) for module, found, _ in held]

    def put_back() -> None:
        # An exception may leave a module while its parameters are swapped.
        for module, found, depth in before:
            table, swaps = parameter_table(module), found.swaps
            for own, given in reversed(swaps[depth:]):
                # A `functional_call` around the module may have put back its own parameters.
                table.update({k: x for k, x in own.items() if table.get(k) is given[k]})
            del swaps[depth:]

    with changed(*((found, "binding", binding) for _, found, binding in held)), undone(put_back):
        yield


def _find(module: nn.Module) -> Slot | None:
    return next((hook for hook in forward_hooks(module) if isinstance(hook, Slot)), None)


def _slots(module: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    for path, child in module.named_modules():
        found = _find(child)
        if found is not None:
            yield path, child, found


def join(path: str, name: str) -> str:
    """Return the name of a tensor with the path of its module, which is empty for the root."""
    return f"{path}.{name}" if path else name
