"""Full fast weights: copies of parameters, which replace them while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from metafocus.adapters import checks, slots
from metafocus.adapters.placement import Placement
from metafocus.calls import using
from metafocus.errors import PlacementError, ProblemError
from metafocus.files import read_tensors, write_tensors
from metafocus.precision import wide_type
from metafocus.torch_internals import parameter_table

FILE = "fast_weights.safetensors"

# torch reads the parameters of these modules without calling them, or from a list made before.
_BYPASSED = (NonDynamicallyQuantizableLinear, nn.RNNBase)


@dataclass(frozen=True)
class FullWeights:
    """Fast weights that are full copies of the placed modules' parameters, and start equal to them.

    The fast weights are a dict of plain tensors under the model's own parameter names, such as
    `"model.layers.3.mlp.up_proj.weight"`. Any module may be placed: linear, normalisation,
    embedding. If a module contains others, all parameters inside it are copied. A parameter that
    several modules share has one copy, which all of them see.

    `init` copies the current values of the parameters. `metafocus.recipes` call it while the slow
    weights are in the model. So the start is a function of them, `fast_0 = slow`, and the
    hypergradient flows through it, as in MAML. In a `Problem` of your own, write
    `init=lambda slow, support: {name: slow[name] for name in adapter.names(model)}`.

    Args:
        where: The placement, a function from a model to module paths.

    Example:
        >>> from metafocus.adapters import all_linear
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> full = FullWeights(all_linear)
        >>> fast = full.init(model)
        >>> {name: tuple(tensor.shape) for name, tensor in fast.items()}
        {'0.weight': (3, 4), '0.bias': (3,)}
        >>> with full.bind(model, {k: 0 * v for k, v in fast.items()}):
        ...     model(torch.ones(4)).tolist()
        [0.0, 0.0, 0.0]
    """

    where: Placement

    def __post_init__(self) -> None:
        checks.check_where("FullWeights", self.where)

    def modules(self, model: nn.Module) -> tuple[str, ...]:
        """Return the paths of the modules of `model` that see fast weights, in model order.

        Raises:
            PlacementError: If the placement names a module twice, or names one that does not exist,
                that has no parameters, or whose parameters are read without calling it.

        Example:
            >>> FullWeights(lambda model: ("",)).modules(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
            ('0',)
        """
        seen = {path for places in self._places(model).values() for path, _ in places}
        return tuple(path for path, _ in model.named_modules() if path in seen)

    def names(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the fast weights, as in `model.named_parameters()`.

        Raises:
            PlacementError: As for `modules`.

        Example:
            >>> FullWeights(lambda model: ("0",)).names(nn.Sequential(nn.LayerNorm(2)))
            ('0.weight', '0.bias')
        """
        return tuple(self._places(model))

    def init(self, model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Copy the parameters, in float32, or in their own type if that is wider.

        The copies carry a derivative: with respect to the model's parameters if these require
        grad, and with respect to the tensors of a `functional_call` around this call.

        Args:
            model: The model to adapt.
            generator: It is not used, because nothing is drawn.

        Returns:
            The parameters by name.

        Raises:
            PlacementError: As for `modules`.
            ProblemError: If parameters are integers (a quantised model).

        Example:
            >>> layer = nn.Sequential(nn.LayerNorm(2))
            >>> FullWeights(lambda model: ("0",)).init(layer)["0.weight"].tolist()
            [1.0, 1.0]
        """
        fast: dict[str, Tensor] = {}
        for name, places in self._places(model).items():
            for path, _ in places:
                # torch.compile can trace what a hook does, but not its installation.
                slots.slot(model.get_submodule(path))
            own = _read(model, name)
            if not own.is_floating_point():
                raise ProblemError(
                    f"FullWeights: {name!r} is of type {own.dtype}, which cannot be adapted; use "
                    "LoRA on a quantised model"
                )
            fast[name] = own.to(wide_type(own.dtype), copy=True)
        return fast

    @contextmanager
    def bind(self, model: nn.Module, fast: Mapping[str, Tensor]) -> Iterator[None]:
        """Let `model` see the fast weights inside a `with` block.

        They replace the parameters of each module while it runs, rounded to the type of the
        parameters. If code reads a parameter while its module does not run
        (`F.linear(x, child.weight)` in the parent), it gets the slow one. If a module is already
        bound, it sees only the new fast weights until the block ends. This composes with
        `torch.func` transforms, `functional_call` and autograd.

        Args:
            model: The model.
            fast: Exactly the names and shapes that `init` gives.

        Raises:
            ProblemError: If names are missing or unknown, or if a shape does not fit.
            PlacementError: As for `modules`.

        Example:
            >>> model = nn.Sequential(nn.LayerNorm(2))
            >>> full = FullWeights(lambda model: ("0",))
            >>> fast = {"0.weight": torch.zeros(2), "0.bias": torch.ones(2)}
            >>> with full.bind(model, fast):
            ...     model(torch.tensor([1.0, 3.0])).tolist()
            [1.0, 1.0]
        """
        places = self._places(model)
        _check(model, places, fast)
        grouped: dict[str, dict[str, Tensor]] = {}
        # Take the whole mapping, so that the engine sees that a name may be unused, and checks.
        for name, tensor in fast.items():
            for path, own in places[name]:
                grouped.setdefault(path, {})[own] = tensor
        bindings = [
            (model.get_submodule(path), slots.Binding(slots.as_parameters, tensors))
            for path, tensors in grouped.items()
        ]
        with using(model), slots.bind(bindings):
            yield

    def save(self, model: nn.Module, fast: Mapping[str, Tensor], directory: str | Path) -> None:
        """Write the full fast weights, in their own type, under the model's parameter names.

        `load` reads them. `model.load_state_dict(safetensors.torch.load_file(path), strict=False)`
        puts them into the model.

        Args:
            model: The model that the fast weights belong to.
            fast: Exactly the names and shapes that `init` gives.
            directory: It is created if it does not exist, and receives
                `fast_weights.safetensors`.

        Raises:
            ProblemError: As for `bind`.
            PlacementError: As for `modules`, and if there is nothing to save.

        Example:
            >>> import os, tempfile
            >>> model, full = nn.Sequential(nn.LayerNorm(2)), FullWeights(lambda model: ("0",))
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     full.save(model, full.init(model), directory)
            ...     os.listdir(directory), list(full.load(model, directory))
            (['fast_weights.safetensors'], ['0.weight', '0.bias'])
        """
        places = self._places(model)
        _check(model, places, fast)
        if not places:
            raise PlacementError("FullWeights.save: the placement is empty, nothing to save")
        # Copy, because safetensors refuses tensors that share memory, such as a start may be.
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in fast.items()}
        write_tensors(Path(directory) / FILE, tensors)

    def load(self, model: nn.Module, directory: str | Path) -> dict[str, Tensor]:
        """Return the fast weights that `save` wrote, on the devices of the model's parameters.

        Raises:
            ProblemError: If the file belongs to another model or placement.
            DataError: If the file is missing or incomplete.
            PlacementError: As for `modules`.
        """
        places = self._places(model)
        found = read_tensors(Path(directory) / FILE)
        _check(model, places, found)
        return {name: found[name].to(_read(model, name).device) for name in places}

    def _places(self, model: nn.Module) -> dict[str, list[tuple[str, str]]]:
        """Return for each fast weight the module paths that see it, and its name there."""
        modules = dict(model.named_modules())
        # named_parameters() lists a shared parameter under the first of its names.
        homes: dict[int, list[tuple[str, str]]] = {}
        for path, module in modules.items():
            for own, value in parameter_table(module).items():
                if value is not None:
                    homes.setdefault(id(value), []).append((path, own))
        places: dict[str, list[tuple[str, str]]] = {}
        for path, module in checks.placed("FullWeights", self.where, model).items():
            inside = [p for m in module.modules() for p in parameter_table(m).values()]
            found = [homes[id(value)] for value in inside if value is not None]
            if not found:
                raise PlacementError(
                    f"FullWeights: module {path!r} is a {type(module).__name__} without "
                    "parameters; place FullWeights on modules that have some"
                )
            places.update({slots.join(*home[0]): home for home in found})
        for home in places.values():
            for path, _ in home:
                if isinstance(modules[path], _BYPASSED):
                    raise PlacementError(
                        f"FullWeights: torch reads the parameters of {path!r}, a "
                        f"{type(modules[path]).__name__}, without calling it, and so would not "
                        "see fast weights; leave it out of the placement"
                    )
        return places


def _check(
    model: nn.Module, places: Mapping[str, list[tuple[str, str]]], fast: Mapping[str, Tensor]
) -> None:
    checks.check_fast("FullWeights", fast, places)
    for name in places:
        shape, own = tuple(fast[name].shape), tuple(_read(model, name).shape)
        if shape != own:
            hint = (
                ": fast weights for each example are LoRA's; with FullWeights take one example at "
                "a time (mf.over_tasks for several)"
                if shape[1:] == own
                else ""
            )
            raise ProblemError(
                f"FullWeights: {name!r} has shape {list(shape)}, expected {list(own)}{hint}"
            )


def _read(model: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    value = parameter_table(model.get_submodule(path))[own]
    assert value is not None
    return value
