"""Write docs/first-hour.md: the commands of a newcomer, run in a fresh clone, with their output.

What was found by hand follows, from `first_hour_by_hand.txt`.

python docs/first_hour.py [--source REPOSITORY]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
HEAD, TAIL = 12, 25  # lines kept at the start and at the end of a long output

OWN = '''\
"""An estimator of my own: half of the exact hypergradient, half of the first-order one."""

from dataclasses import dataclass

import torch

import metafocus as mf


@dataclass(frozen=True)
class Half(mf.Estimator):
    def __call__(self, inner_loss, solver, start, outer, support):
        exact = mf.Unrolled()(inner_loss, solver, start, outer, support)
        first = mf.FirstOrder()(inner_loss, solver, start, outer, support)
        fast = {k: (v + first.params[k]) / 2 for k, v in exact.params.items()}
        return mf.Solution(fast, exact.losses)


def loss(fast, slow, data):
    x, y = data
    return ((torch.tanh(x @ fast["w"]) - y) ** 2).mean()


def weights(seed):
    return {"w": torch.randn(4, generator=torch.Generator().manual_seed(seed))}


def data(seed):
    g = torch.Generator().manual_seed(100 + seed)
    both = ((torch.randn(16, 4, generator=g), torch.randn(16, generator=g)) for _ in range(2))
    return mf.Episode(*both)


found = mf.compare(
    mf.Problem(loss, loss),
    weights,
    data,
    solver=mf.SGD(0.5, steps=8),
    estimators={"exact": mf.Unrolled(), "first order": mf.FirstOrder(), "mine": Half()},
    reference="exact",
    over={"solver.steps": [1, 2, 4, 8]},
    seeds=5,
)
found.plot("half.png")
print(found.table())
'''

STEPS: list[tuple[str, str]] = [
    (
        "Run the demonstration. It first installs into a `.venv` of its own.",
        "make demo",
    ),
    (
        "Compare the estimators and their costs on a small language model:",
        ".venv/bin/metafocus compare --quick --output_dir out/compare",
    ),
    (
        "Run MAML: it learns a network that fits a sinusoid after one step.",
        ".venv/bin/python examples/maml_sinusoid.py --quick",
    ),
    ("Write an estimator of your own. This is the file:", "cat my_estimator.py"),
    (
        "Compare it with the built-in ones over the number of inner steps, with 95 % intervals "
        "over five draws of data and weights. It has half of the bias of first order, as expected:",
        ".venv/bin/python my_estimator.py",
    ),
    (
        "Run an unbiased estimator, and a check that it is unbiased:",
        ".venv/bin/python examples/own_estimator.py --quick",
    ),
    (
        "Run FocuSFT on chats of your own, to a checkpoint that plain transformers loads:",
        ".venv/bin/python examples/focusft_chats.py --quick",
    ),
]


def main() -> None:
    """Run every command and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default=str(HERE.parent), help="the repository to clone")
    args = parser.parse_args()
    lines = [
        "# The first hour",
        "",
        "This page goes from a clone to an estimator of your own that is compared with the "
        "built-in ones. `docs/first_hour.py` ran every command in a fresh clone and wrote this "
        "page with their output. The middle of long outputs is left out. The times are from a "
        "machine with 2 busy cores and no GPU, and the numbers in the outputs are from that run.",
        "",
        "```",
        "git clone URL metafocus && cd metafocus",
        "```",
    ]
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "metafocus")
        subprocess.run(["git", "clone", "-q", args.source, str(clone)], check=True)
        (clone / "my_estimator.py").write_text(OWN)
        for text, command in STEPS:
            started = time.time()
            run = subprocess.run(command, shell=True, cwd=clone, text=True, capture_output=True)
            if run.returncode:
                raise SystemExit(f"{command} failed:\n{run.stdout}\n{run.stderr}")
            minutes = (time.time() - started) / 60
            taken = "" if command.startswith("cat") else f" ({minutes:.1f} minutes)"
            language = "python" if command.startswith("cat") else "text"
            output = run.stdout.rstrip() if command.startswith("cat") else shortened(run.stdout)
            lines += ["", f"{text}{taken}", "", "```", f"$ {command}", "```", ""]
            lines += [f"```{language}", output, "```"]
    by_hand = (HERE / "first_hour_by_hand.txt").read_text()
    (HERE / "first-hour.md").write_text("\n".join(lines) + "\n\n" + by_hand)


def shortened(output: str) -> str:
    """Return an output without control codes, and without the middle of many lines."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output).replace("\r", "\n")
    lines = [line.rstrip() for line in plain.splitlines() if line.strip()]
    if len(lines) > HEAD + TAIL:
        left = len(lines) - HEAD - TAIL
        lines = [*lines[:HEAD], f"... ({left} more lines)", *lines[-TAIL:]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
