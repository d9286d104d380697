"""LoRA as plain tensors, which are added to the output of linear modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from metafocus.adapters import checks, low_rank, peft_format, slots
from metafocus.adapters.placement import Placement, adaptable
from metafocus.calls import using
from metafocus.checks import number, whole
from metafocus.errors import PlacementError, ProblemError
from metafocus.precision import wide_type

if TYPE_CHECKING:
    from peft import LoraConfig

MOST = 2**16
"""The largest rank: it guards against typos that would ask for all of the memory."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank fast weights: each placed module computes `W x + (alpha / rank) * B (A x)`.

    The fast weights are a dict of plain tensors, `"<module path>.lora_A"` `[rank, in]` and
    `"<module path>.lora_B"` `[out, rank]`. They are never registered in the model, so its
    parameters and its state dict stay those of the plain checkpoint.

    Fast weights with a leading dimension, `[B, rank, in]` and `[B, out, rank]`, belong to B
    examples: row `b` of a batch sees its own, in batched products. `for_each(fast, B)` makes them
    from shared fast weights.

    Args:
        where: The placement, a function from a model to module paths.
        rank: Rank of the update, at least 1.
        alpha: Numerator of its scale; None: twice the rank.

    Raises:
        ProblemError: If `rank` is not an integer of at least 1 or `alpha` is not finite.

    Example:
        >>> from metafocus.adapters import all_linear
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> lora = LoRA(all_linear, rank=2, alpha=4.0)
        >>> fast = lora.init(model)
        >>> {name: tuple(tensor.shape) for name, tensor in fast.items()}
        {'0.lora_A': (2, 4), '0.lora_B': (3, 2)}
        >>> with lora.bind(model, fast):
        ...     adapted = model(torch.ones(4))
        >>> torch.equal(adapted, model(torch.ones(4)))  # B starts at zero
        True

    References:
        Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.
    """

    where: Placement
    rank: int = 32
    alpha: float | None = None

    def __post_init__(self) -> None:
        checks.check_where("LoRA", self.where)
        whole("LoRA: rank", self.rank, 1, error=ProblemError)
        if self.rank > MOST:
            raise ProblemError(
                f"LoRA(rank={self.rank}) must be at most {MOST}: no layer is that wide"
            )
        if self.alpha is not None:
            number("LoRA: alpha", self.alpha, error=ProblemError)

    @property
    def scale(self) -> float:
        """`alpha / rank`, which is 2 where no alpha is given."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def modules(self, model: nn.Module) -> tuple[str, ...]:
        """Return the paths of the modules of `model` that get fast weights, in model order.

        Raises:
            PlacementError: If the placement names a module twice, or names one that does not exist
                or is not a linear layer.

        Example:
            >>> from metafocus.adapters import matching
            >>> LoRA(matching("1")).modules(nn.Sequential(nn.Tanh(), nn.Linear(2, 2)))
            ('1',)
        """
        return tuple(path for path, _ in self._placed(model))

    def init(self, model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw `A ~ U(-1/sqrt(in), 1/sqrt(in))` (kaiming, as PEFT does) and set `B = 0`.

        The global random state is neither read nor changed. The fast weights are on the device of
        their module's weight, in float32, or in the weight's type if that is wider. The hooks of
        the model are installed here or at the first `bind`. Compile the model only after that:
        `torch.compile` neither traces their installation nor notices it later.

        Args:
            model: The model to adapt.
            generator: Source of the draws, on any device. None means a new one seeded with 0, so
                that every call without a generator gives the same fast weights.

        Returns:
            `"<path>.lora_A"` `[rank, in]` and `"<path>.lora_B"` `[out, rank]` for each module.

        Raises:
            PlacementError: As for `modules`.

        Example:
            >>> from metafocus.adapters import all_linear
            >>> layer = nn.Sequential(nn.Linear(2, 3))
            >>> LoRA(all_linear, rank=1).init(layer)["0.lora_B"].tolist()
            [[0.0], [0.0], [0.0]]
        """
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        fast: dict[str, Tensor] = {}
        for path, module in self._placed(model):
            # torch.compile can trace what a hook does, but not its installation.
            slots.slot(module)
            inputs, outputs = low_rank.sizes(module)
            weight = module.weight
            assert isinstance(weight, Tensor)
            dtype = wide_type(weight.dtype)
            # Draw in float32 for all types, so that a test in float64 starts from equal values.
            unit = torch.rand(
                self.rank,
                inputs,
                generator=generator,
                device=generator.device,
                dtype=torch.float32,
            )
            uniform = (2 * unit.to(weight.device, dtype) - 1) / math.sqrt(inputs)
            fast[f"{path}.lora_A"] = uniform
            fast[f"{path}.lora_B"] = uniform.new_zeros(outputs, self.rank)
        return fast

    @contextmanager
    def bind(self, model: nn.Module, fast: Mapping[str, Tensor]) -> Iterator[None]:
        """Let `model` see the fast weights inside a `with` block.

        The update is computed in the type of the module's output (under autocast: in autocast's
        type), whatever the type of the fast weights. If a module is already bound, it sees only the
        new fast weights until the block ends. Modules that only another adapter binds do not
        change. This composes with `torch.func` transforms, `functional_call` and autograd.

        Args:
            model: The model.
            fast: Exactly the names and shapes that `init` gives, or all of them with the number of
                examples as leading dimension.

        Raises:
            ProblemError: If names are missing or unknown, or if a shape does not fit. In the
                block, if the input of an adapted module is not a batch with one sequence for each
                example.
            PlacementError: As for `modules`.

        Example:
            >>> from metafocus.adapters import all_linear
            >>> model = nn.Sequential(nn.Linear(2, 2))
            >>> lora = LoRA(all_linear, rank=1, alpha=1.0)
            >>> fast = {"0.lora_A": torch.ones(1, 2), "0.lora_B": torch.ones(2, 1)}
            >>> base = model(torch.ones(2))
            >>> with lora.bind(model, fast):
            ...     print((model(torch.ones(2)) - base).round().tolist())
            [2.0, 2.0]
        """
        placed = self._placed(model)
        self._check(placed, fast)
        apply = partial(low_rank.update, scale=self.scale)
        names = ("lora_A", "lora_B")
        bindings = [
            (module, slots.Binding(apply, {name: fast[f"{path}.{name}"] for name in names}))
            for path, module in placed
        ]
        with using(model), slots.bind(bindings):
            yield

    def save(self, model: nn.Module, fast: Mapping[str, Tensor], directory: str | Path) -> None:
        """Write a PEFT adapter that `peft.PeftModel.from_pretrained(model, directory)` loads.

        Args:
            model: The model that the fast weights belong to.
            fast: Exactly the names and shapes that `init` gives.
            directory: It is created if it does not exist, and receives `adapter_config.json` and
                `adapter_model.safetensors`.

        Raises:
            ProblemError: As for `bind`, and for fast weights of several examples.
            PlacementError: As for `modules`, and if there is no module to save.

        Example:
            >>> import os, tempfile
            >>> from metafocus.adapters import all_linear
            >>> model, lora = nn.Sequential(nn.Linear(2, 2)), LoRA(all_linear, rank=1)
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     lora.save(model, lora.init(model), directory)
            ...     sorted(os.listdir(directory))
            ['adapter_config.json', 'adapter_model.safetensors']
        """
        placed = self._placed(model)
        number = self._check(placed, fast)
        if number is not None:
            raise ProblemError(
                f"LoRA.save: fast weights of {number} examples are {number} adapters, and a "
                "directory holds one: save one_of(fast, index), or call recipes.export"
            )
        if not placed:
            raise PlacementError("LoRA.save: the placement is empty, there is nothing to save")
        peft_format.write(directory, model, [path for path, _ in placed], fast, self)

    @classmethod
    def from_peft(cls, config: LoraConfig) -> LoRA:
        """Return the adapter that a `peft.LoraConfig` describes.

        It reads `r`, `lora_alpha`, `target_modules` (names, a regular expression or
        `"all-linear"`), `exclude_modules`, `layers_to_transform` and `layers_pattern`.

        Args:
            config: The PEFT configuration.

        Returns:
            The adapter.

        Raises:
            ProblemError: If `target_modules` is missing, or an option that changes the computation
                (`use_dora`, `use_rslora`, `lora_dropout`, `bias`, `rank_pattern`, ...) is set.

        Example:
            >>> from peft import LoraConfig
            >>> LoRA.from_peft(LoraConfig(r=4, lora_alpha=8, target_modules=".*up_proj"))
            LoRA(where=matching(pattern='.*up_proj'), rank=4, alpha=8.0)
        """
        where, rank, alpha = peft_format.read(config)
        return cls(where, rank=rank, alpha=alpha)

    def _placed(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        modules = checks.placed("LoRA", self.where, model)
        for path, module in modules.items():
            if not adaptable(module):
                raise PlacementError(
                    f"LoRA: module {path!r} is a {type(module).__name__}, which cannot be "
                    "adapted; place LoRA on linear layers (nn.Linear, transformers Conv1D)"
                )
        return list(modules.items())

    def examples(self, model: nn.Module, fast: Mapping[str, Tensor]) -> int | None:
        """Return the number of examples that `fast` belongs to; None if a batch shares it.

        Raises:
            ProblemError: As for `bind`.
            PlacementError: As for `modules`.

        Example:
            >>> from metafocus.adapters import all_linear, for_each
            >>> model, lora = nn.Sequential(nn.Linear(2, 2)), LoRA(all_linear, rank=1)
            >>> lora.examples(model, for_each(lora.init(model), 5))
            5
        """
        return self._check(self._placed(model), fast)

    def _check(self, placed: list[tuple[str, nn.Module]], fast: Mapping[str, Tensor]) -> int | None:
        expected: dict[str, tuple[int, ...]] = {}
        for path, module in placed:
            inputs, outputs = low_rank.sizes(module)
            expected[f"{path}.lora_A"] = (self.rank, inputs)
            expected[f"{path}.lora_B"] = (outputs, self.rank)
        checks.check_fast("LoRA", fast, expected)
        return low_rank.examples(fast, expected)
