"""The side of benchopt's benchmark, in its own environment: its data set, its solvers.

    python -m benchmarks.rivals.w8.theirs CLONE DATA.npz ROWS.json LIMIT ONLY

Writes its problem as arrays and runs its solvers on it, each in JAX on one thread in float64, until
the goal or LIMIT seconds of CPU time. Compilation comes before, as in its own runs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.rivals.w8.problem import GOAL, PARTS, SIZES, Trace, Value, row

# Solver, its settings, full-batch oracle calls of one step: gradients, products with second
# derivatives. A line search's function values are not counted.
RUNS: list[tuple[str, dict[str, Any], float]] = [
    ("jaxopt_itd", {"step_size_outer": 1.0, "n_inner_steps": 10, "warm_start": True}, 21),
    ("jaxopt_itd", {"step_size_outer": 1.0, "n_inner_steps": 100, "warm_start": True}, 201),
    ("amigo", {"step_size": 1.0, "outer_ratio": 1.0, "batch_size": "full", "eval_freq": 1}, 22),
    ("amigo", {"step_size": 0.1, "outer_ratio": 0.1, "batch_size": "full", "eval_freq": 1}, 22),
    ("soba", {"step_size": 1.0, "outer_ratio": 1.0, "batch_size": "full", "eval_freq": 10}, 3),
    ("soba", {"step_size": 0.1, "outer_ratio": 0.1, "batch_size": "full", "eval_freq": 10}, 3),
    ("amigo", {"step_size": 0.1, "outer_ratio": 0.1, "batch_size": 64, "eval_freq": 16}, 22),
    ("soba", {"step_size": 0.1, "outer_ratio": 0.1, "batch_size": 64, "eval_freq": 64}, 3),
]


def module(path: Path) -> Any:
    """Return a file of the clone as a module."""
    spec = importlib.util.spec_from_file_location(f"clone_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def configured(kind: Any, **settings: Any) -> Any:
    """Return a benchopt object with its first parameters but for those given."""
    made = kind()
    for name, values in kind.parameters.items():
        setattr(made, name, settings.get(name, values[0]))
    return made


def generated(clone: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return its data set, and the arrays in it."""
    simulated = module(clone / "datasets" / "simulated.py")
    make, kept = simulated.gen_matrices, []

    def recording(*args: Any) -> Any:
        kept.append(make(*args))
        return kept[-1]

    simulated.gen_matrices = recording
    data = configured(simulated.Dataset, **{k: v for k, v in SIZES.items()}).get_data()
    arrays = {
        f"{level} {part}": np.asarray(x)
        for level, matrices in zip(("inner", "outer"), kept[-2:], strict=True)
        for part, x in zip(PARTS, matrices, strict=True)
    }
    return data, arrays


def main() -> None:
    """Write the problem and the rows."""
    clone, data_path, rows_path, limit, only = sys.argv[1:]
    jax.config.update("jax_enable_x64", True)
    data, arrays = generated(Path(clone))
    np.savez(data_path, **arrays)  # pyright: ignore[reportArgumentType]
    objective = module(Path(clone) / "objective.py").Objective()
    objective.set_data(**data)
    value, rows = Value(arrays), []
    for name, settings, calls in (r for r in RUNS if only in r[0]):
        setting = ", ".join(f"{k} {v}" for k, v in settings.items() if k != "eval_freq")
        try:
            solver = configured(module(Path(clone) / "solvers" / f"{name}.py").Solver, **settings)
            # The first calls compile, as in its own runs.
            solver.set_objective(**objective.get_objective())
            trace = Trace(float(limit), lambda x: not value.suboptimality(x) > GOAL)
            solver.run(lambda s=solver, t=trace: t(jax.block_until_ready(s.outer_var)))
        except Exception as error:
            rows.append(
                {"name": name, "setting": setting, "error": f"{type(error).__name__}: {error}"}
            )
            continue
        batch = settings.get("batch_size", "full")
        share = 1.0 if batch == "full" else batch / SIZES["n_samples_inner"]
        calls = calls * share * settings.get("eval_freq", 1)
        rows.append(row(name, setting, calls, trace, value))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "points"}), flush=True)
    Path(rows_path).write_text(json.dumps({"jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
