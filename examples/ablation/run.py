"""FocuSFT's missing ablation: masks and inner loop apart, with seeds, controls and intervals.

    python examples/ablation/run.py --quick --output ablation     # a minute: shows that it runs
    python examples/ablation/run.py --scale smollm2 --output examples/ablation/smollm2
    python examples/ablation/run.py --scale full --output ablation-full    # wants a GPU

The cells are those of an `mf.sweep` in the folder `results`: each is one file, written whole when
the cell is finished. A run that is stopped goes on with the first cell that has none; several
processes share one output directory. The report can be written at any time, from whatever is there:

    python examples/ablation/run.py --scale smollm2 --output examples/ablation/smollm2 --report \
        --page docs/ablation.md
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cells import Bench, measure, train
from model import checksum, load
from protocol import FOCUSFT, SCALES, Cell, Scale
from report import write_report

import metafocus as mf
from metafocus.comparison import environment
from metafocus.errors import NonFiniteError
from metafocus.files import write_json

UNTRAINED = {"cell": None}
"""The part that only measures the model as it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="smollm2")
    parser.add_argument("--quick", action="store_true", help="the same as --scale quick")
    parser.add_argument("--output", type=Path, default=Path("ablation"))
    parser.add_argument("--model", default="", help="a directory or hub id in place of the scale's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument("--page", type=Path, help="where; default: report.md in --output")
    args = parser.parse_args()
    scale = SCALES["quick" if args.quick else args.scale]
    args.output.mkdir(parents=True, exist_ok=True)
    check_same(scale, args.output)
    failed = 0 if args.report else run_all(scale, args.output, args.model, args.device)
    print(write_report(scale, args.output, args.page))
    if failed:
        sys.exit(f"{failed} parts failed; the same command runs them again")


def check_same(scale: Scale, output: Path) -> None:
    """Refuse to mix two experiments in one directory."""
    path = output / "scale.json"
    mine = json.loads(json.dumps(asdict(scale)))
    if path.exists() and json.loads(path.read_text()) != mine:
        sys.exit(f"--output {output} holds a run of other settings: name another directory")
    write_json(path, mine)


def run_all(scale: Scale, output: Path, source: str, device: str) -> int:
    """Run what is not finished, failed parts again; return how many failed."""
    experiment = Experiment(scale, source, device)
    write_json(
        output / "environment.json",
        {"device": device, "weights": experiment.weights, **environment(torch.float32)},
    )
    trained = [{"cell": asdict(cell), "seed": seed} for cell, seed in scale.cells()]
    found = mf.sweep(experiment, [UNTRAINED, *trained], folder=output / "results", retry=True)
    return sum(outcome.error is not None for outcome in found)


@dataclass(frozen=True)
class Experiment:
    """The function of the sweep: trains and measures a cell, as plain numbers.

    Attributes:
        scale: its sizes.
        source: a directory or hub id of the model; "" for that of the scale.
        device: where it runs.
    """

    scale: Scale
    source: str
    device: str

    @cached_property
    def loaded(self) -> tuple[Any, Any, Bench]:
        """The model, its tokenizer, and what it is asked."""
        model, tokenizer = load(self.scale, self.source, self.device)
        return model, tokenizer, Bench(self.scale, tokenizer, self.device)

    @cached_property
    def start(self) -> dict[str, torch.Tensor]:
        """The weights that every cell starts from."""
        return {k: v.detach().clone() for k, v in self.loaded[0].named_parameters()}

    @cached_property
    def weights(self) -> str:
        """Their checksum."""
        return checksum(self.loaded[0])

    def __call__(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Return what came of a part."""
        weights, start = self.weights, self.start
        model, tokenizer, bench = self.loaded
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(start[name])
        if part == UNTRAINED:
            return {"weights": weights, **measure(model, bench, self.scale, FOCUSFT)}
        cell, seed = Cell(**part["cell"]), part["seed"]

        def progress(line: str) -> None:
            print(f"{time.strftime('%H:%M:%S')} {cell.name}, seed {seed}: {line}", flush=True)

        found: dict[str, Any] = {"weights": weights, **part}
        try:
            found["training"] = train(model, tokenizer, self.scale, cell, seed, progress)
        except NonFiniteError as error:
            return {**found, "diverged": str(error)}  # a result too
        progress("measuring")
        return {**found, **measure(model, bench, self.scale, cell, seed)}


if __name__ == "__main__":
    main()
