"""Saves fast weights so that a file on disk is always complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from metafocus.errors import DataError


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, first under another name, so that it is complete or unchanged.

    Raises:
        DataError: If it cannot be written, for example on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), part, metadata={"format": "pt"})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True) if path.parent.is_dir() else None
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(
            f"{path} could not be written ({reason}); what was there before is untouched"
        ) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        DataError: If the file is missing or incomplete.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = "is missing" if not path.is_file() else f"is cut off or no safetensors ({error})"
        raise DataError(f"{path} {reason}; save the fast weights again") from error
