"""A fingerprint of a model's files, to notice that a directory holds another model than before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

_NAMES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")
_BLOCK, _BLOCKS = 1 << 16, 32
_START = 1 << 12  # bytes of each tensor


def fingerprint(name_or_path: str | Path) -> str | None:
    """Return a digest of the model's files, or None if it is not a directory on this machine.

    Of each file it reads up to 33 blocks of 64 KiB at equal distances, and of safetensors also the
    first 4 KiB of each tensor, because training may change a few small tensors only. So it does not
    read all of a large model.

    Example:
        >>> import tempfile
        >>> from metafocus.evals.fingerprint import fingerprint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text("{}")
        ...     len(fingerprint(folder))
        16
        >>> fingerprint("owner/name") is None
        True
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted(path for name in _NAMES for path in folder.glob(name)):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for at in range(0, size, max(_BLOCK, size // _BLOCKS)):
                file.seek(at)
                found.update(file.read(_BLOCK))
            for at in _tensors(file, size) if path.suffix == ".safetensors" else ():
                file.seek(at)
                found.update(file.read(_START))
    return found.hexdigest()[:16]


def _tensors(file: BinaryIO, size: int) -> list[int]:
    """Return where the tensors of a safetensors file begin; none if it is no such file."""
    file.seek(0)
    header = int.from_bytes(file.read(8), "little")
    try:
        table = json.loads(file.read(header)) if header < size else {}
        return [8 + header + row["data_offsets"][0] for row in table.values() if "dtype" in row]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
