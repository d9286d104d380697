"""Every supported Python with the oldest and the newest torch: `nox -l` lists the sessions.

`nox -s tests-3.11(torch='pinned')` runs one. An interpreter that is not there is skipped, and nox
says so. The pins of `constraints.txt` are those of `torch="pinned"`.
"""

from __future__ import annotations

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TORCHES = {"oldest": "torch==2.11.*", "newest": "torch", "pinned": ""}
EPOCH = {"SOURCE_DATE_EPOCH": "1700000000"}

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = False


def install(session: nox.Session, torch: str, extra: str) -> None:
    """Install the package as it is here, with one torch."""
    if torch == "pinned":
        session.install("-c", "constraints.txt", "-e", f".[{extra}]")
    else:
        session.install(TORCHES[torch], "-e", f".[{extra}]")


@nox.session(python=PYTHONS)
@nox.parametrize("torch", list(TORCHES))
def tests(session: nox.Session, torch: str) -> None:
    """Run the tests; words after `--` go to pytest."""
    install(session, torch, "dev")
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
    """Build twice, compare, check, install into a clean environment and run a command."""
    session.install("build", "twine", "hatchling")
    first, second = (f"{session.create_tmp()}/{name}" for name in ("first", "second"))
    for place in (first, second):
        session.run("python", "-m", "build", "--no-isolation", "-o", place, env=EPOCH)
    session.run("diff", "-r", first, second, external=True)
    session.run("python", "-m", "twine", "check", "--strict", f"{first}/*")
    session.run("bash", "-c", f"pip install -c constraints.txt {first}/*.whl", external=True)
    session.chdir(first)
    session.run("metafocus", "compare", "--quick", env={"OMP_NUM_THREADS": "1"})
