"""Converts to PEFT's adapter directories, and from its `LoraConfig`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from metafocus.adapters.placement import Placement, adaptable, all_linear, is_conv1d, matching
from metafocus.errors import PlacementError, ProblemError
from metafocus.files import write_tensors

if TYPE_CHECKING:
    from peft import LoraConfig

_FOLLOWED = {
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}
# These options do not change what is computed, only how an adapter is stored and loaded.
_HARMLESS = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "runtime_config",
}


class LowRank(Protocol):
    """The two numbers of a LoRA that PEFT needs."""

    @property
    def rank(self) -> int:
        """Rank of the update."""
        ...

    @property
    def alpha(self) -> float | None:
        """Numerator of its scale; None: twice the rank."""
        ...


@dataclass(frozen=True)
class PeftTargets:
    """Places modules by PEFT's rule: the path is a name or ends in it, in the given layers.

    Args:
        names: Ends of paths, or a regular expression for the whole path.
        excluded: The same for paths to leave out.
        layers: The numbers of the layers to keep; empty for all. Paths that `names` gives in full
            are kept in all layers.
        patterns: The names of the list of layers; empty for the first number in the path.

    Raises:
        PlacementError: At the call, if nothing matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> PeftTargets(("0", "1"), excluded=("1",))(model)
        ('0',)
    """

    names: str | tuple[str, ...]
    excluded: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()

    def __call__(self, model: nn.Module) -> tuple[str, ...]:
        """Return the module paths in `model`."""
        if self.names == "all-linear":
            candidates = all_linear(model)
        else:
            candidates = tuple(
                path
                for path, module in model.named_modules()
                if _named(path, self.names)
                and self._in_layers(path)
                # PEFT restricts an expression to what it can adapt, but it accepts any name.
                and (adaptable(module) or not isinstance(self.names, str))
            )
        chosen = tuple(path for path in candidates if not _named(path, self.excluded))
        if not chosen:
            raise PlacementError(f"{self} matches no module of {type(model).__name__}")
        return chosen

    def _in_layers(self, path: str) -> bool:
        if not self.layers or path in self.names:
            return True
        rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.patterns]
        for rule in rules or [r".*?\.[^.]*\.(\d+)\."]:
            match = re.match(rule, path)
            if match is not None:
                return int(match.group(1)) in self.layers
        return False


def _named(path: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in names)


def read(config: LoraConfig) -> tuple[Placement, int, float]:
    """Return placement, rank and alpha of a `LoraConfig`.

    Returns:
        The three arguments of `LoRA`.

    Raises:
        ProblemError: If `target_modules` is missing, or if an option is set that LoRA lacks.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise ProblemError(
            f"LoRA.from_peft takes a peft.LoraConfig, got {type(config).__name__}; from a dict: "
            "LoraConfig(**options)"
        )
    default = type(config)()
    # Options that are not known are refused, because PEFT adds options with every release.
    changed = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in _FOLLOWED | _HARMLESS
        and getattr(config, field.name) != getattr(default, field.name)
    }
    if changed:
        raise ProblemError(
            f"LoRA.from_peft: {changed} changes what is trained or computed, and LoRA here has no "
            "such option; reset it to PEFT's default"
        )
    targets, excluded = config.target_modules, config.exclude_modules or ()
    if targets is None:
        raise ProblemError(
            "LoRA.from_peft: target_modules=None leaves the choice to PEFT's table of models; "
            "name the modules, or pass 'all-linear'"
        )
    layers, patterns = config.layers_to_transform, config.layers_pattern or ()
    where: Placement
    if targets == "all-linear" and not excluded:
        where = all_linear
    elif isinstance(targets, str) and not excluded:
        where = matching(targets)
    else:
        where = PeftTargets(
            targets if isinstance(targets, str) else tuple(sorted(targets)),
            excluded if isinstance(excluded, str) else tuple(sorted(excluded)),
            (layers,) if isinstance(layers, int) else tuple(layers or ()),
            (patterns,) if isinstance(patterns, str) else tuple(patterns),
        )
    return where, config.r, float(config.lora_alpha)


def write(
    directory: str | Path,
    model: nn.Module,
    paths: Sequence[str],
    fast: Mapping[str, Tensor],
    lora: LowRank,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        directory: It is created if it does not exist.
        model: The model that the fast weights belong to.
        paths: The adapted modules.
        fast: `"<path>.lora_A"` and `"<path>.lora_B"` for each of them.
        lora: The rank and alpha.
    """
    from peft import LoraConfig

    # Use an expression, because PEFT would match paths in a list as ends of other paths too.
    targets = "|".join(re.escape(path) for path in paths)
    generates = getattr(model, "can_generate", None)
    alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
    alpha = int(alpha) if alpha == int(alpha) else alpha
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (PEFT computes with any number)
        target_modules=f"({targets})",
        fan_in_fan_out=any(is_conv1d(model.get_submodule(path)) for path in paths),
        task_type="CAUSAL_LM" if callable(generates) and generates() else None,
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        inference_mode=True,
    )
    directory = Path(directory)
    tensors = {
        f"base_model.model.{key}.weight": tensor.detach().cpu().contiguous()
        for key, tensor in fast.items()
    }
    write_tensors(directory / "adapter_model.safetensors", tensors)
    config.save_pretrained(str(directory))
