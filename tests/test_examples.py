"""Scripts that are shown or promised: they run, and the tests that the pages name exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def load(path: str) -> ModuleType:
    """The module of a script."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


# --- killed, resumed, handed over --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_finetune_and_resume(tmp_path, capsys):
    """The checks raise by themselves; here, that they were made."""
    found = load("examples/finetune_and_resume.py").main(["--quick", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for method in ("sft", "focusft"):
        ((dead, resumed),) = found[method]["deaths"]
        assert 1 <= dead <= 11 and resumed in (0, 3, 6, 9)
        assert found[method]["compared"] == dead - resumed
        assert len(found[method]["losses"]) == 12
        assert (tmp_path / method / "adapter" / "adapter_config.json").exists()
    assert printed.count("logits equal to the trainer's, bit for bit") == 2
    assert printed.count("PEFT: adapter loads") == 2
    absent = importlib.util.find_spec("lm_eval") is None
    assert printed.count("lm_eval: absent" if absent else "each as transformers computes it") == 2


def test_a_step_that_comes_out_differently_is_found():
    example = load("examples/finetune_and_resume.py")
    told = {1: {"loss": "2.5"}, 2: {"loss": "2.25"}}
    assert example._same(told, {2: {"loss": "2.25"}, 3: {"loss": "2"}}) == 1
    assert sorted(told) == [1, 2, 3]
    with pytest.raises(AssertionError, match="step 3 differs"):
        example._same(told, {3: {"loss": "2.1"}})


# --- the soak ----------------------------------------------------------------------------------


def soak(*flags: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "benchmarks" / "soak.py")
    command = [sys.executable, script, "--steps", "60", "--every", "10", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [(), ("--per-example",), ("--estimator", "unrolled-recompute")],
    ids=["shared", "per-example", "second-order"],
)
def test_nothing_grows(flags):
    # In so few steps the allocator has not yet seen all lengths of batches.
    done = soak(*flags, "--warm-up", "20", "--slack", "16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flat after 20 steps" in done.stdout


@pytest.mark.slow
def test_a_leak_is_found(tmp_path):
    done = soak("--leak", "--output", str(tmp_path / "soak.json"))
    assert done.returncode == 1
    assert re.search(r"live tensors grew from \d+ at step 20 to \d+ at step 60", done.stdout)
    assert (tmp_path / "soak.json").exists()


def test_what_counts_as_growth():
    module = load("benchmarks/soak.py")

    def growth(*readings):
        return module.growth([module.Reading(*r) for r in readings], 100, 8.0)

    flat = [(50, 90.0, 9), (100, 100.0, 10), (200, 107.0, 10)]
    assert growth(*flat) == []
    (words,) = growth(*flat, (300, 107.0, 11))
    assert words == "live tensors grew from 10 at step 100 to 11 at step 300"
    (words,) = growth(*flat, (300, 109.0, 10))
    assert words == (
        "memory grew from 100.0 MiB at step 100 to 109.0 MiB at step 300, more than 8 MiB"
    )
    with pytest.raises(SystemExit, match="run longer"):
        growth(*flat[:2])


# --- the cost model ---------------------------------------------------------------------------


def test_the_cost_model_counts_what_the_models_have():
    model = load("examples/cost_model.py")
    # Qwen2.5-7B has 7.62 billion, Llama-3-70B 70.6 billion; norms and biases are not counted.
    assert model.SEVEN.parameters == pytest.approx(7.62e9, rel=1e-3)
    assert model.SEVENTY.parameters == pytest.approx(70.6e9, rel=1e-3)
    run = model.RUNS[0]
    assert run.fast_layers == 10
    # 20 million numbers of fast weights at rank 32, in three copies of float32.
    assert run.memory()["fast weights"] == 12 * 21_626_880
    assert run.units(shared=False) == pytest.approx(4 + 2 * (18 / 28 + 2 * 10 / 28))
    # 10,000 tasks: 64 GPUs have at most 157 each, with 0.0806 GiB of adapted weights for each.
    row = "| 10,000 | 64 | 1 | 157 | 132.8 | 14.8 | 12.6 |"
    assert row in model.tasks_table() and 157 * 4 * 21_626_880 / 2**30 == pytest.approx(12.6, 0.01)


def test_the_cost_model_is_near_what_was_measured():
    """It adds terms that are not held at the same moment, so it may be above; not below."""
    model = load("examples/cost_model.py")
    for tokens, measured in model.CHECKED.items():
        assert 0.97 < model.as_measured(tokens) / measured < 1.2
    rows = json.loads((ROOT / "benchmarks" / "results" / "focusft_gpu.json").read_text())["rows"]
    peaks = {row["length"]: row["peak_bytes"] for row in rows if row["name"] == "metafocus"}
    assert model.CHECKED == peaks


def test_the_page_shows_the_tables_that_the_script_prints():
    model, page = load("examples/cost_model.py"), (ROOT / "docs" / "training_scale.md").read_text()
    for table in (model.table, model.memory_table, model.tasks_table):
        assert table() in page
    words = " ".join(page.split())
    for letter, name in model.short_names().items():
        assert f"{letter}: {name}" in words


# --- what the pages name -----------------------------------------------------------------------


def table() -> dict[int, str]:
    """The rows of the table of faults, by number; the last cell names the tests."""
    page = (ROOT / "docs" / "training_faults.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\| (.*?) \|$", page, re.MULTILINE)
    return {int(number): cell for number, cell in rows}


def named(text: str) -> list[str]:
    """`file.py::test`, or `::test` of the file before it."""
    found, file = [], None
    for word in re.findall(r"`([^`]+)`", text):
        if match := re.fullmatch(r"(test_\w+\.py)?(?:::(test_\w+))?", word):
            file = match[1] or file
            assert file is not None, word
            found.append(f"{file}::{match[2]}" if match[2] else file)
    return found


def defined_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_fault_has_a_test_that_exists():
    rows = table()
    assert sorted(rows) == list(range(1, 32))
    for number, cell in rows.items():
        assert named(cell) or cell == "the same", f"row {number} names no test: {cell}"
        for name in named(cell):
            file, _, test = name.partition("::")
            assert (ROOT / "tests" / file).exists(), f"row {number}: {file}"
            assert not test or test in defined_in(file), f"row {number}: {name}"


def test_every_test_that_a_page_names_exists():
    missing = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        # first-hour.md shows a run of a user's own tests, claims/test_mine.py.
        text = page.read_text().replace("claims/test_mine.py", "claims/mine.py")
        for file, test in re.findall(r"(test_\w+\.py)::(test_\w+)", text):
            # The suite of claims has a folder of its own.
            found = (path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob(file))
            if not any(test in defined_in(str(path)) for path in found):
                missing.append(f"{page.name}: {file}::{test}")
    assert not missing


@pytest.mark.parametrize("page", ["training.md", "training_scale.md"])
def test_scripts_that_a_page_names_exist(page):
    text = (ROOT / "docs" / page).read_text()
    for path in re.findall(r"(?:examples|benchmarks|tests)/[\w./-]+\.(?:py|yaml)", text):
        assert (ROOT / path).exists(), path
