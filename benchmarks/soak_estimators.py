"""Does a hypergradient leak? `python benchmarks/soak_estimators.py` ends with 1 if one does.

1,000 outer steps with each estimator and each algorithm, on ridge regression whose penalties are
learned, and 300 steps of FocuSFT in `FocusTrainer`. Every fifth of the steps: the resident memory
of the process, and how many tensors are alive. After the first fifth neither may grow: tensors not
by one, memory not by more than `--slack` MiB, which the allocator takes for fragments. The file of
`--output` is written after each run; the same command, given again, takes the runs that it lacks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import soak
import torch
from torch import Tensor

import metafocus as mf
from metafocus import algorithms, stores
from metafocus.comparison.report import environment
from metafocus.files import write_json

Step = Callable[[int], None]
SIZE, ROWS = 8, 24
SOLVER = mf.SGD(0.1, steps=6)


def loss(fast: mf.Params, outer: mf.Params, data: tuple[Tensor, Tensor]) -> Tensor:
    """Ridge regression with one learned penalty for each weight."""
    x, y = data
    fit = (x @ fast["w"] - y).square().mean()
    return fit + (outer["penalty"].exp() * fast["w"].square()).sum()


def fit(fast: mf.Params, outer: mf.Params, data: tuple[Tensor, Tensor]) -> Tensor:
    """The loss without the penalty."""
    x, y = data
    return (x @ fast["w"] - y).square().mean()


def step(fast: mf.Params, outer: mf.Params, data: tuple[Tensor, Tensor]) -> mf.Params:
    """A step of gradient descent, whose fixed point is the solution."""
    x, y = data
    w = fast["w"]
    gradient = 2 * x.T @ (x @ w - y) / len(y) + 2 * outer["penalty"].exp() * w
    return {"w": w - 0.1 * gradient}


PROBLEM = mf.Problem(loss, fit, init=lambda outer, support: {"w": outer["start"]})


def episode(seed: int) -> mf.Episode:
    """Support and query of one regression."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(SIZE, generator=generator)

    def data() -> tuple[Tensor, Tensor]:
        x = torch.randn(ROWS, SIZE, generator=generator)
        return x, x @ truth + 0.1 * torch.randn(ROWS, generator=generator)

    return mf.Episode(data(), data())


def beginning() -> mf.Params:
    """The outer parameters at first."""
    return {"penalty": torch.full((SIZE,), -3.0), "start": torch.zeros(SIZE)}


def estimators(folder: Path) -> dict[str, mf.Estimator]:
    """Every estimator, with its variants."""
    generator = torch.Generator().manual_seed(0)
    return {
        "FirstOrder": mf.FirstOrder(),
        "Unrolled": mf.Unrolled(),
        "Unrolled(last=2)": mf.Unrolled(last=2),
        "Unrolled(recompute=True)": mf.Unrolled(recompute=True),
        "Unrolled(recompute=2)": mf.Unrolled(recompute=2),
        "Unrolled(hvp_forward)": mf.Unrolled(hvp=mf.hvp_forward),
        "Unrolled(hvp_finite())": mf.Unrolled(hvp=mf.hvp_finite()),
        "Unrolled(stores.cpu())": mf.Unrolled(store=stores.cpu()),
        "Unrolled(stores.disk())": mf.Unrolled(store=stores.disk(folder)),
        "Unrolled(stores.segments(2))": mf.Unrolled(store=stores.segments(2)),
        "Unrolled(stores.schedule(3))": mf.Unrolled(store=stores.schedule(3)),
        "Unrolled(stores.tree(2))": mf.Unrolled(store=stores.tree(2)),
        "Implicit(CG)": mf.Implicit(mf.CG(8)),
        "Implicit(Neumann)": mf.Implicit(mf.Neumann(8, 0.1)),
        "Implicit(GMRES)": mf.Implicit(mf.GMRES(8)),
        "Implicit(Dense)": mf.Implicit(mf.Dense()),
        "Implicit(Nystrom)": mf.Implicit(mf.Nystrom(4, 0.1)),
        "Implicit(Identity)": mf.Implicit(mf.Identity(0.1)),
        "FixedPoint": mf.FixedPoint(step, mf.Neumann(8, 1.0)),
        "OneStep": mf.OneStep(step),
        "Penalty": mf.Penalty(10.0),
        "EvoGrad": mf.EvoGrad(0.1, generator=generator),
    }


def by_estimator(estimator: mf.Estimator) -> Step:
    """One outer step of gradient descent, by `backward` and by `hypergrad` in turn."""
    meta = mf.bilevel(PROBLEM, solver=SOLVER, estimator=estimator)
    outer = {name: value.requires_grad_() for name, value in beginning().items()}

    def take(i: int) -> None:
        if i % 2:
            grads, _ = mf.hypergrad(meta)(outer, episode(i % 50))
        else:
            meta(outer, episode(i % 50))[0].backward()
            grads = {k: v.grad for k, v in outer.items() if v.grad is not None}
        with torch.no_grad():
            for name, gradient in grads.items():
                outer[name] -= 0.01 * gradient
                outer[name].grad = None

    return take


def over_tasks() -> Step:
    """Eight regressions at once, in chunks of three."""
    meta = mf.over_tasks(
        mf.bilevel(PROBLEM, solver=SOLVER, estimator=mf.Unrolled()), chunk_size=3, aux="losses"
    )
    outer = {name: value.requires_grad_() for name, value in beginning().items()}

    def take(i: int) -> None:
        episodes = mf.stack_episodes([episode(8 * (i % 6) + k) for k in range(8)])
        meta(outer, episodes)[0].backward()
        with torch.no_grad():
            for value in outer.values():
                assert value.grad is not None
                value -= 0.01 * value.grad
                value.grad = None

    return take


def single_loop() -> dict[str, Any]:
    """The algorithms that keep a state of their own."""
    return {
        "SOBA": algorithms.SOBA(PROBLEM, 0.05, 0.05),
        "StocBiO": algorithms.StocBiO(PROBLEM, 0.05, 0.05),
        "AmIGO": algorithms.AmIGO(PROBLEM, 0.05, 0.05),
        "BOME": algorithms.BOME(PROBLEM, 0.05, 0.05),
        "F2SA": algorithms.F2SA(PROBLEM, 0.05, 10.0),
    }


def by_algorithm(algorithm: Any) -> Step:
    """One step of a single-loop algorithm."""
    outer = beginning()
    state = algorithm.init(outer, episode(0))

    def take(i: int) -> None:
        nonlocal state
        found = algorithm.step(outer, state, episode(i % 50))
        grads, state = found[0], found[1]
        for name in outer:
            outer[name] = outer[name] - 0.01 * grads[name]

    return take


def readings(take: Step, steps: int) -> list[soak.Reading]:
    """Take steps; read memory five times."""
    found = []
    for i in range(1, steps + 1):
        take(i)
        if i % max(steps // 5, 1) == 0:
            found.append(soak.Reading(i, soak.resident(), soak.alive()))
    return found


def kept(output: Path | None, steps: int, focusft: int) -> dict[str, Any]:
    """Return the runs of a report that have these numbers of steps."""
    if output is None or not output.exists():
        return {}
    runs = json.loads(output.read_text())["runs"]
    return {
        name: run
        for name, run in runs.items()
        if run["steps"] == (focusft if name == "FocuSFT" else steps)
    }


def focusft(steps: int, folder: str) -> list[soak.Reading]:
    """FocuSFT in the Trainer, with evaluations."""
    parser = soak.parser()
    flags = ["--steps", str(steps), "--every", str(max(steps // 5, 1))]
    return soak.soak(parser.parse_args(flags), folder)


def main(argv: list[str] | None = None) -> int:
    """Soak; return 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of each; default %(default)s")
    parser.add_argument("--focusft", type=int, default=300, help="steps; default %(default)s")
    parser.add_argument("--slack", type=float, default=8.0, help="MiB; default %(default)s")
    parser.add_argument("--part", default="1/1", help="2/3: the second third; default: all")
    parser.add_argument("--output", type=Path, help="write the readings as JSON")
    args = parser.parse_args(argv)
    # Six steps of an inner loop are no solution; this measures memory and not accuracy.
    warnings.simplefilter("ignore", mf.errors.NotStationaryWarning)
    report = kept(args.output, args.steps, args.focusft)
    part, parts = map(int, args.part.split("/"))
    number = itertools.count()

    def measured(name: str, steps: int, run: Callable[[], list[soak.Reading]]) -> None:
        if next(number) % parts != part - 1 or name in report:
            return
        begin = time.perf_counter()
        found = run()
        grown = soak.growth(found, steps // 5, args.slack)
        seconds = time.perf_counter() - begin
        report[name] = {
            "steps": steps,
            "date": date.today().isoformat(),
            "seconds": round(seconds, 1),
            "grown": grown,
            "readings": [asdict(reading) for reading in found],
        }
        print(f"{name}: {steps} steps in {seconds:.0f} s, {'; '.join(grown) or 'flat'}", flush=True)
        if args.output:
            settings = {k: v for k, v in vars(args).items() if k != "output"}
            machine = environment(torch.float32)
            write_json(args.output, {"settings": settings, "environment": machine, "runs": report})

    with tempfile.TemporaryDirectory() as folder:
        for name, estimator in estimators(Path(folder)).items():
            take = by_estimator(estimator)
            measured(name, args.steps, lambda take=take: readings(take, args.steps))
        measured("over_tasks", args.steps, lambda: readings(over_tasks(), args.steps))
        for name, algorithm in single_loop().items():
            take = by_algorithm(algorithm)
            measured(name, args.steps, lambda take=take: readings(take, args.steps))
        measured("FocuSFT", args.focusft, lambda: focusft(args.focusft, folder))
    return int(any(run["grown"] for run in report.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
