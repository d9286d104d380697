"""What a checkpoint holds, compared with the model that is to resume it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from metafocus.lm.hf.saved import is_saved
from metafocus.sharding import plain_names
from metafocus.trainer.checkpoints import SEAL
from metafocus.trainer.peft import is_peft

_CONFIGURATIONS = ("config.json", "generation_config.json", "adapter_config.json")


def misfit(place: Path, model: nn.Module, optimizer: Any = None) -> str | None:
    """Say why a checkpoint that is complete cannot be resumed with a model; None if it can.

    Weights are read and must be finite; names and shapes must be those of the model. Of optimiser,
    schedule and random states only the directory is read, without running what a pickle asks for.
    What FSDP has sharded is left to its own checks.

    Args:
        place: the checkpoint.
        model: that is to be trained.
        optimizer: where there is one already; None: of all trained parameters.
    """
    groups = optimizer.param_groups if optimizer else []
    trained = sum(len(group["params"]) for group in groups) or sum(
        parameter.requires_grad for parameter in model.parameters()
    )
    return (
        _configuration(place) or _state(place) or _weights(place, model) or _pickles(place, trained)
    )


def _configuration(place: Path) -> str | None:
    for name in _CONFIGURATIONS:
        if (place / name).exists():
            found = _json(place / name)
            if not isinstance(found, dict):
                return f"{name} is damaged: {found or 'no object of JSON'}"
    return None


def _state(place: Path) -> str | None:
    found = _json(place / SEAL)
    known = {field.name for field in dataclasses.fields(TrainerState)}
    needed = ("epoch", "global_step", "max_steps", "log_history", "train_batch_size")
    if not isinstance(found, dict):
        return f"{SEAL} is damaged"
    missing = [name for name in needed if found.get(name) is None]
    if missing:
        return f"{SEAL} lacks {', '.join(missing)}"
    strange = sorted(found.keys() - known)
    return f"{SEAL} has unknown entries: {', '.join(strange)}" if strange else None


def _weights(place: Path, model: nn.Module) -> str | None:
    plain, entries = plain_names(model), model.state_dict().items()
    expected = {plain.get(name, name): tuple(value.shape) for name, value in entries}
    seen = set()
    for file in weight_files(place):
        if file.name.startswith("pytorch_model_fsdp"):
            return None
        try:
            for name, value in tensors_of(file):
                seen.add(name)
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    return f"{file.name} holds NaN or infinity in {name}"
                shape = tuple(value.shape)
                if not is_peft(model) and expected.get(name) != shape:
                    return f"{file.name} holds {name} of shape {shape}, and the model " + (
                        f"has {expected[name]}" if name in expected else "has no such weight"
                    )
        except Exception as error:  # safetensors and torch raise what they like for a foreign file
            return f"{file.name} cannot be read: {_line(error)}"
    absent = expected.keys() - seen - tied(model, seen)
    missing = {name for name in absent if is_saved(model, name)}
    if seen and missing and not is_peft(model):
        return f"its weights lack {min(missing)}, which the model has"
    return None


def tied(model: nn.Module, names: set[str]) -> set[str]:
    """Return the names of weights that the named ones are, too."""
    plain, state = plain_names(model), model.state_dict(keep_vars=True)
    entries = {plain.get(k, k): v for k, v in state.items()}
    given = {id(value) for name, value in entries.items() if name in names}
    return {name for name, value in entries.items() if id(value) in given}


def weight_files(place: Path) -> list[Path]:
    """Return the files of a checkpoint that hold weights of the model."""
    return sorted([*place.glob("*model*.safetensors"), *place.glob("pytorch_model*.bin")])


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of each tensor in a file of weights."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)
    else:
        yield from _loaded(file).items()


def _pickles(place: Path, trained: int) -> str | None:
    for name in ("scheduler.pt", "scaler.pt", *(p.name for p in place.glob("rng_state*.pth"))):
        if (place / name).exists():
            try:
                _loaded(place / name)
            except Exception as error:  # whatever a foreign file makes torch raise
                return f"{name} cannot be read: {_line(error)}"
    if not (place / "optimizer.pt").exists():
        return None
    try:
        groups = _loaded(place / "optimizer.pt")["param_groups"]
        count = sum(len(group["params"]) for group in groups)
    except Exception as error:  # as above
        return f"optimizer.pt cannot be read: {_line(error)}"
    if count != trained:
        return f"optimizer.pt is of {count} parameters, and the model trains {trained}"
    return None


def _loaded(file: Path) -> Any:
    with safe_globals():
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return _line(error)


def _line(error: Exception) -> str:
    """The first sentence of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0][:160]
