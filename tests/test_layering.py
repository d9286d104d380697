"""The direction of imports, and that importing metafocus is cheap and quiet."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "metafocus"

# A module knows earlier groups, and the files of its own package; the whole methods of the last
# group know each other.
ENGINE = [
    {"errors", "types", "measure"},
    {"tree", "levels"},
    {"autodiff"},
    {"problem", "linear"},
    {"solvers"},
    {"probe", "estimators"},
    {"bilevel"},
    {
        "tasks",
        "compiled",
        "captured",
        "compare",
        "comparison",
        "examine",
        "evolution",
        "windows",
        "pes",
        "single_loop",
    },
]
LAST = len(ENGINE) - 1
# What every part may know of the engine: its errors, and which transforms are active.
SHARED = {"errors", "levels"}
PARTS = {"adapters", "masks", "spans", "attention"}
TOP = {"__main__", "cli", "integrations", "words"}
HEAVY = {"transformers", "peft", "accelerate", "safetensors", "rich", "matplotlib"}

FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


MODULES = {name_of(path) for path in FILES}


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run at import: not those under `if TYPE_CHECKING`."""
    found: list[ast.stmt] = []
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif isinstance(node, ast.If | ast.Try | ast.With):
            pending += [x for x in ast.walk(node) if isinstance(x, ast.Import | ast.ImportFrom)]
        elif isinstance(node, ast.ClassDef):
            pending += node.body
        else:
            found.append(node)
    return found


def imports(path: Path, everywhere: bool = False) -> set[str]:
    """Absolute names that a file imports; `from a import b` is `a.b` if that is a module."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else top_level(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full.removeprefix("metafocus.") in MODULES else node.module)
    return found


def own(path: Path, everywhere: bool = True) -> set[str]:
    """The modules of metafocus that a file imports, anywhere in it."""
    names = imports(path, everywhere)
    mine = {"" if n == "metafocus" else n.removeprefix("metafocus.") for n in names}
    return (mine & MODULES) - {name_of(path)}


def packages(path: Path, everywhere: bool = False) -> set[str]:
    return {n.partition(".")[0] for n in imports(path, everywhere)}


def house(name: str) -> str:
    """The module or package of the first level that a module is, or lies in."""
    return name.partition(".")[0]


def rank(name: str) -> int | None:
    """The group of a module of the engine."""
    return next((i for i, group in enumerate(ENGINE) if house(name) in group), None)


def in_engine(name: str) -> bool:
    return rank(name) is not None


def in_parts(name: str) -> bool:
    return house(name) in PARTS


def on_top(name: str) -> bool:
    return house(name) in TOP


def test_every_module_that_is_named_exists():
    assert set().union(*ENGINE, PARTS, TOP) <= {house(name) for name in MODULES}


def test_the_house_is_drawn_as_it_stands():
    drawing = (ROOT.parent / "CONTRIBUTING.md").read_text().split("```")[1]
    rows = [line.strip().split("   ")[0] for line in drawing.splitlines()]
    drawn = {name.rstrip("/") for row in rows for name in row.split("  ")}
    assert {house(name) for name in MODULES} - {""} <= drawn


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_direction(path):
    name = name_of(path)
    mine = own(path)
    if name == "":
        assert not {n for n in mine if on_top(n)}
        return
    assert not {n for n in mine if on_top(n)} or on_top(name), "only the top knows the top"
    if in_engine(name):
        foreign = {n for n in mine if n and not in_engine(n)}
        assert not foreign, f"the engine knows nothing above it: {foreign}"
        assert "" not in mine, "import the module, not the package"
        here = rank(name)
        late = {
            n
            for n in mine
            if rank(n) > here or (rank(n) == here != LAST and house(n) != house(name))
        }
        assert not late, f"{name} (group {here}) may not know {late}"
    if in_parts(name):
        foreign = {n for n in mine if n not in SHARED and not in_parts(n)}
        assert not foreign, f"the parts know errors and each other only: {foreign}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_at_import(path):
    name = name_of(path)
    if on_top(name):
        return
    outside = packages(path) - set(sys.stdlib_module_names) - {"metafocus"}
    if in_engine(name):
        assert outside <= {"torch"}, outside
    if in_parts(name):
        assert outside <= {"torch", "einops"}, outside
    assert not outside & HEAVY, f"inside functions only: {outside & HEAVY}"


def test_there_are_no_cycles():
    graph = {name_of(p): {n for n in own(p, everywhere=False) if n} for p in FILES}
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name in done:
            return
        for other in graph.get(name, ()):
            visit(other, [*trail, name])
        done.add(name)

    for name in graph:
        visit(name, [])


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_metafocus_is_quiet_and_imports_no_heavy_package():
    code = (
        "import sys, torch\n"
        "state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), "
        "torch.get_default_dtype()\n"
        "import metafocus\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())\n"
        f"print(sorted({sorted(HEAVY)!r} and set(sys.modules) & set({sorted(HEAVY)!r})))"
    )
    assert python(code).strip() == "[]"


def test_every_public_name_exists():
    python("import metafocus\nfor n in metafocus.__all__: getattr(metafocus, n)")


@pytest.mark.slow
def test_import_time():
    clock = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    alone, both = [], []
    for _ in range(5):
        alone.append(float(python(clock.format("import torch"))))
        both.append(float(python(clock.format("import torch, metafocus"))))
    # Minima of alternating runs: the least disturbed of each.
    assert min(both) < 1.5 * min(alone), (alone, both)
