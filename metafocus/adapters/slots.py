"""Slots: hooks through which a module sees plain tensors that are not its parameters.

A slot is installed on a module once and then stays. While a binding is in it, the module's output
goes through `apply(module, args, output, tensors)`; while it is empty, the output is untouched.
With `apply=as_parameters` the tensors stand in for the module's own parameters while it runs.
Which adapter bound it is of no concern here: a slot holds tensors by name and one pure function.

Activation checkpointing needs the fast weights of a layer as explicit inputs. It reads them with
`bound(layer)` and `functions(layer)` in the forward pass, and recomputes under
`rebind(layer, tensors, functions)`, when the original binding is long gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from metafocus.errors import ProblemError
from metafocus.torch_internals import forward_hooks, parameter_table

Apply = Callable[[nn.Module, tuple[Any, ...], Any, dict[str, Tensor]], Any]
"""`(module, args, output, tensors) -> new output`, pure."""


class Binding(NamedTuple):
    """What a slot holds: a pure function and the tensors it is given, by name (without dots)."""

    apply: Apply
    tensors: dict[str, Tensor]


def as_parameters(
    module: nn.Module, args: tuple[Any, ...], output: Any, tensors: dict[str, Tensor]
) -> Any:
    """Return the output as it is: the slot has swapped the parameters before the module ran."""
    return output


class Slot:
    """A forward hook, before and after, that applies its binding, if it has one.

    Parameters are swapped only while the module itself runs. So the swap lies inside of any
    `functional_call`, and whoever asks for the parameters meanwhile gets the slow ones.

    A copied or unpickled slot is empty: a binding lasts for one `with` block, and its tensors may
    belong to a graph or to a transform.

    Attributes:
        binding: The current binding or None.
        saved_parameters: What the module held before the swap, for each call that is under way.
    """

    __slots__ = ("binding", "saved_parameters")

    def __init__(self) -> None:
        self.binding: Binding | None = None
        self.saved_parameters: list[dict[str, Tensor | None]] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        """Return None before the module runs; then its new output, or None to leave it."""
        if self.binding is None:
            return None
        if self.binding.apply is as_parameters:
            if output:
                parameter_table(module).update(self.saved_parameters.pop())
            else:
                self.saved_parameters.append(_exchange(module, self.binding.tensors))
            return None
        if not output:
            return None
        return self.binding.apply(module, args, output[0], self.binding.tensors)

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()


def slot(module: nn.Module) -> Slot:
    """The slot of `module`, installed at the first call.

    Install it before `torch.compile` sees the module: compiled code is not recompiled for hooks
    that appear later and would silently go on without them.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> slot(layer) is slot(layer)
        True
    """
    found = _find(module)
    if found is None:
        found = Slot()
        # Both at once: compiled code would not see a hook that comes later.
        module.register_forward_pre_hook(found)
        module.register_forward_hook(found)
    return found


@contextmanager
def bind(bindings: Iterable[tuple[nn.Module, Binding]]) -> Iterator[None]:
    """Put bindings into the slots of modules and restore what was there on exit.

    A binding replaces the slot's previous one, it never stacks on it; other slots are left alone.

    Args:
        bindings: Pairs of a module and what its slot shall hold.

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
    """The tensors bound inside `module` at this moment, by path relative to it.

    Args:
        module: For example a decoder layer.

    Returns:
        Such as `{"mlp.gate_proj.lora_A": tensor, ...}`; empty outside of any binding.

    Example:
        >>> bound(nn.Sequential(nn.Linear(2, 2)))
        {}
    """
    return {
        _join(path, name): tensor
        for path, _, found in _slots(module)
        if found.binding is not None
        for name, tensor in found.binding.tensors.items()
    }


def functions(module: nn.Module) -> dict[str, Apply]:
    """The functions of the bindings inside `module` at this moment, by path relative to it.

    Args:
        module: For example a decoder layer.

    Returns:
        Such as `{"mlp.gate_proj": function, ...}`: what `rebind` needs beside the tensors.

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
    """Make exactly `tensors` the ones bound inside `module`, and restore what was there on exit.

    Slots inside `module` that `tensors` does not name are empty meanwhile, so that a recomputation
    depends on nothing but its arguments.

    Args:
        module: For example a decoder layer.
        tensors: By relative path, as `bound(module)` returned them.
        functions: By relative path, as `functions(module)` returned them together with `tensors`;
            None takes those of the bindings that are active now.

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
def _held(held: Iterable[tuple[nn.Module, Slot, Any]]) -> Iterator[None]:
    before: list[tuple[nn.Module, Slot, tuple[Any, Any], dict[str, Any]]] = []
    try:
        for module, found, binding in held:
            state = found.binding, found.saved_parameters
            before.append((module, found, state, dict(parameter_table(module))))
            found.binding, found.saved_parameters = binding, []
        yield
    finally:
        # Backwards, so that a slot named twice ends with what it held first.
        for module, found, state, own in reversed(before):
            if found.saved_parameters:
                # A call was interrupted while the module's parameters were swapped.
                parameter_table(module).update(own)
            found.binding, found.saved_parameters = state


def _exchange(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Put tensors where the parameters are, in the parameters' types; return the parameters."""
    table = parameter_table(module)
    own: dict[str, Any] = {name: table[name] for name in tensors}
    table.update({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})
    return own


def _find(module: nn.Module) -> Slot | None:
    return next((hook for hook in forward_hooks(module) if isinstance(hook, Slot)), None)


def _slots(module: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    for path, child in module.named_modules():
        found = _find(child)
        if found is not None:
            yield path, child, found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
