"""Virtual environments for the rivals, under benchmarks/rivals/.envs.

python -m benchmarks.rivals.install [NAME ...] [--source learn2learn=/path/to/clone ...]

A rival comes from PyPI where pip can install it beside the torch of constraints.txt, else from a
clone (`git clone`, or a directory given with `--source`), which its worker finds on PYTHONPATH.
One environment serves all rivals whose pins agree. What cannot be installed is recorded as absent,
with the error, in .envs/rivals.json; the harness reports it so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / ".envs"
MANIFEST = FOLDER / "rivals.json"


class Rival(NamedTuple):
    """Where a rival comes from."""

    environment: str | None
    """None: that of this script."""
    requirement: str | None = None
    """What pip installs; None: `clone` goes on PYTHONPATH."""
    clone: str | None = None


class Environment(NamedTuple):
    """What an environment holds."""

    # transformers: the model of W5 is one of its own. einops: metafocus measures the memory.
    packages: tuple[str, ...] = ("torch", "numpy", "setuptools<81", "transformers", "einops")
    without: tuple[str, ...] = ()
    """Pins of constraints.txt that its rivals cannot live with."""


JAX = ("jax==0.4.35", "jaxlib==0.4.35", "jaxopt==0.8.5", "benchopt==1.7.0", "joblib<1.5")
ENVIRONMENTS = {
    "common": Environment(),
    "boat": Environment(without=("numpy",)),
    # jaxopt has ended: newer versions of jax and joblib do not go with it and with benchopt 1.7.
    "benchopt": Environment((*JAX, "numpy<2.3", "scikit-learn", "einops"), without=("numpy",)),
}
RIVALS: dict[str, Rival] = {
    "higher": Rival("common", "higher==0.2.1"),
    "torchopt": Rival("common", "torchopt==0.7.3"),
    "betty": Rival("common", "betty-ml==0.1.1"),
    # Main is ahead of PyPI and was never released.
    "betty_main": Rival("common", clone="https://github.com/leopard-ai/betty"),
    # boat-torch wants numpy <= 1.26.4.
    "boat": Rival("boat", "boat-torch==1.1.1"),
    # The PyPI name belongs to another project.
    "hypertorch": Rival("common", clone="https://github.com/prolearner/hypertorch"),
    # Its stale C extension does not compile on Python 3.11.
    "learn2learn": Rival("common", clone="https://github.com/learnables/learn2learn"),
    # It wants torch < 1.10.
    "torchmeta": Rival("common", clone="https://github.com/tristandeleu/pytorch-meta"),
    # W8 alone.
    "benchopt": Rival("benchopt", clone="https://github.com/benchopt/benchmark_bilevel"),
    # It needs transformers' trainer, as this project does.
    "focusft": Rival(None, clone="https://github.com/JarvisPei/FocuSFT"),
}


def main() -> None:
    """Install what is asked for (all by default) and print what is there."""
    parser = argparse.ArgumentParser(description="Install the rivals.")
    parser.add_argument("names", nargs="*", help="rivals; default: all")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=PATH")
    args = parser.parse_args()
    sources = dict(word.split("=", 1) for word in args.source)
    unknown = sorted((set(args.names) | set(sources)) - set(RIVALS))
    if unknown:
        parser.error(f"unknown rival {unknown[0]!r}; known: {', '.join(RIVALS)}")
    found = manifest()
    for name in args.names or RIVALS:
        try:
            found[name] = install(name, sources.get(name))
        except (subprocess.CalledProcessError, OSError) as error:
            found[name] = {"error": last_words(error)}
        print(f"{name}: {found[name].get('version') or 'absent: ' + found[name]['error']}")
        FOLDER.mkdir(exist_ok=True)
        MANIFEST.write_text(json.dumps(found, indent=2) + "\n")


def manifest() -> dict[str, dict[str, Any]]:
    """Return what is installed: python, path and version, or error, of each rival."""
    return json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}


def install(name: str, source: str | None) -> dict[str, Any]:
    """Install one rival into its environment."""
    rival = RIVALS[name]
    python = environment(rival.environment)
    if rival.requirement and rival.environment and source is None:
        pip(python, rival.environment, rival.requirement)
        package = rival.requirement.partition("==")[0]
        code = f"from importlib.metadata import version; print(version({package!r}))"
        return {"python": python, "path": None, "version": _run([python, "-c", code]).strip()}
    path = Path(source) if source else FOLDER / "clones" / name
    if source is None and not path.exists():
        assert rival.clone is not None
        _run(["git", "clone", "--quiet", "--depth", "1", rival.clone, str(path)])
    if not path.is_dir():
        raise FileNotFoundError(f"no directory {path}")
    return {"python": python, "path": str(path.resolve()), "version": f"clone {tree_hash(path)}"}


def environment(name: str | None) -> str:
    """Return the interpreter of an environment; make it, with torch and numpy, if it is new."""
    if name is None:
        return sys.executable
    folder = FOLDER / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip(str(python), name, *ENVIRONMENTS[name].packages)
        (folder / ".ready").touch()
    return str(python)


def pip(python: str, name: str, *requirements: str) -> None:
    """Install under the project's constraints, less those that this environment drops."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [x for x in lines if x.partition("==")[0] not in ENVIRONMENTS[name].without]
    constraints = FOLDER / f"constraints_{name}.txt"
    constraints.write_text("\n".join(kept) + "\n")
    _run([python, "-m", "pip", "install", "-q", "-c", str(constraints), *requirements])


def tree_hash(path: Path) -> str:
    """Return a short hash of the Python files of a clone: its version, with or without git."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.py")):
        digest.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return digest.hexdigest()[:10]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def last_words(error: Exception) -> str:
    """Return the line of a failed command that tells why."""
    stderr = getattr(error, "stderr", None) or ""
    lines = [x for x in stderr.splitlines() if x.strip()]
    reasons = [x for x in lines if "error" in x.lower()]
    return (reasons or lines or [str(error)])[-1].strip()


if __name__ == "__main__":
    sys.exit(main())
