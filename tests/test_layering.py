"""The direction of imports, and that importing metafocus is cheap and quiet."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "metafocus"

# From bottom to top: a file knows its own row's folder and the rows before it.
ORDER = """
errors types torch_internals params precision checks files factories digests cells
rng parallel calls closures sharding
episodes streams problem autodiff linear solvers estimators
preflight path engine tasks explaining algorithms traces graph comparison
masks attention adapters lm
data models diagnostics recipes evals doctor
claims trainer cli __main__
""".split()
# Usable without the engine: they know the tools at the bottom and each other.
PARTS = {"masks", "attention", "adapters"}
TOOLS = {
    "errors",
    "checks",
    "files",
    "rng",
    "calls",
    "parallel",
    "params",
    "precision",
    "sharding",
    "torch_internals",
}
# Torch and nothing else.
ENGINE = set(ORDER[: ORDER.index("masks")])
TOP = {"claims", "trainer", "cli", "__main__"}
HEAVY = {
    "accelerate", "jinja2", "matplotlib", "pandas", "peft", "pyarrow", "rich", "safetensors",
    "tokenizers", "transformers", "yaml",
}  # fmt: skip

TRITON = {f"attention.kernels.triton.{x}" for x in ("tile", "gradient", "double_backward")}
"""What runs on a device by Triton, an optional package."""

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


def root(name: str) -> str:
    """The module or package of the first level that a module is, or lies in."""
    return name.partition(".")[0]


ROOTS = {root(name) for name in MODULES} - {""}


def test_the_order_names_every_module():
    assert set(ORDER) == ROOTS
    assert len(ORDER) == len(set(ORDER))


def test_the_code_layout_is_drawn_as_it_stands():
    drawing = (ROOT.parent / "CONTRIBUTING.md").read_text().split("```")[1]
    rows = [line.strip().split("   ")[0] for line in drawing.splitlines()]
    drawn = [name.rstrip("/") for row in rows for name in row.split("  ") if name]
    assert [name for name in drawn if name in ROOTS] == ORDER


def test_direction():
    for path in FILES:
        name = name_of(path)
        known = {root(n) for n in own(path)} - {root(name)}
        if name == "":
            assert not known & TOP - {"trainer"}, "the package itself does not know the top"
            continue
        # The version stands in the package itself.
        whole = name in ("__main__", "trainer.fingerprint")
        assert "" not in known or whole, f"{name}: import the module, not the package"
        late = {n for n in known - {""} if ORDER.index(n) > ORDER.index(root(name))}
        assert not late, f"{name} is below {late}"
        if root(name) in PARTS:
            assert known <= TOOLS | PARTS, f"{name} is a part and knows {known - TOOLS - PARTS}"


def test_what_reaches_into_models_knows_no_loss():
    above = {"lm.loss", "lm.per_example", "lm.shared_prefix"}
    for path in FILES:
        if name_of(path).startswith("lm.hf"):
            assert not own(path) & above, path


def test_packages_at_import():
    for path in FILES:
        name = name_of(path)
        if root(name) in TOP:
            continue
        outside = packages(path) - set(sys.stdlib_module_names) - {"metafocus"}
        if root(name) in ENGINE:
            assert outside <= {"torch"}, (name, outside)
        if root(name) in PARTS:
            optional = {"triton"} if name in TRITON else set()
            assert outside <= {"torch", "einops"} | optional, (name, outside)
        assert not outside & HEAVY, f"{name}: inside functions only: {outside & HEAVY}"


def test_no_file_is_named_like_a_test():
    assert not [p for p in FILES if p.name.startswith("test_") or p.stem.endswith("_test")]


SAME_MEANING = {
    "attention": "attention as an operator, and the attention of a Hugging Face model",
    "build": "builds the questions of a benchmark",
    "cache": "what is made once and kept on disk",
    "checks": "checks of arguments: of the whole package, of adapters, of the Trainer",
    "compare": "the command of mf.compare",
    "contents": "what a checkpoint or a rendered chat holds, checked",
    "cross_entropy": "the cross entropy as an operator, and in chunks of a language model's head",
    "fingerprint": "what a run or a model was made of",
    "journal": "what is noted while a run goes on",
    "profile": "the attention profile, and the command that writes one",
    "report": "a report of results: of a comparison, of claims, of an evaluation",
    "run": "runs a comparison, or an evaluation",
    "tokens": "the tokens of a chat, and which of them a loss scores",
}
"""Names that several files share, and the one thing that each of them means."""


def test_files_that_share_a_name_mean_the_same():
    stems = [p.stem.lstrip("_") for p in FILES if p.name not in ("__init__.py", "__main__.py")]
    assert {x for x in stems if stems.count(x) > 1} <= set(SAME_MEANING)


def test_every_module_can_be_imported_by_its_name():
    """No function has the name of a module beside it: `import metafocus.X as x` gives a module."""
    code = (
        "import importlib, pkgutil, types, metafocus\n"
        "names = [m.name for m in pkgutil.walk_packages(metafocus.__path__, 'metafocus.')]\n"
        "names = [n for n in names if not n.endswith('__main__')]\n"
        "import importlib.util\n"
        "if importlib.util.find_spec('triton') is None:\n"
        f"    names = [n for n in names if n.removeprefix('metafocus.') not in {TRITON}]\n"
        "for name in names: importlib.import_module(name)\n"
        "for name in names:\n"
        "    space = {}\n"
        "    exec(f'import {name} as x', space)\n"
        "    if not isinstance(space['x'], types.ModuleType): print(name)"
    )
    assert python(code) == ""


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
def test_import_time(tmp_path, monkeypatch):
    # Bytecode is compiled once and kept, as in an installation.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    clock = "import time; t = time.process_time(); {}; print(time.process_time() - t)"
    python("import torch, metafocus")
    alone, both = [], []
    for _ in range(5):
        alone.append(float(python(clock.format("import torch"))))
        both.append(float(python(clock.format("import torch, metafocus"))))
    # Minima of alternating runs: the least disturbed of each.
    assert min(both) < 1.3 * min(alone), (alone, both)
