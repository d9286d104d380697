"""Write docs/first-hour.md: a newcomer's commands, run in a fresh clone, with what they printed.

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
HEAD, TAIL = 12, 25  # lines that are kept of a long output

OWN = '''\
"""An estimator of my own: half of the exact hypergradient, half of the first-order one."""

from dataclasses import dataclass

import torch

import metafocus as mf


@dataclass(frozen=True)
class Half:
    def __call__(self, problem, solver, outer, support):
        exact = mf.Unrolled()(inner_loss, solver, start, outer, support)
        first = mf.FirstOrder()(inner_loss, solver, start, outer, support)
        fast = {k: (v + first.params[k]) / 2 for k, v in exact.params.items()}
        return mf.Solution(fast, exact.losses)


def loss(fast, slow, data):
    x, y = data
    return ((torch.tanh(x @ fast["w"]) - y) ** 2).mean()


torch.manual_seed(0)
problem = mf.Problem(loss, loss)
episode = mf.Episode(*((torch.randn(16, 4), torch.randn(16)) for _ in range(2)))
found = mf.compare(
    problem,
    {"w": torch.randn(4)},
    episode,
    solver=mf.SGD(0.5, steps=8),
    estimators={"exact": mf.Unrolled(), "first order": mf.FirstOrder(), "mine": Half()},
    reference="exact",
)
print(found.table())
'''

STEPS: list[tuple[str, str]] = [
    (
        "Clone, and run the demonstration. It installs into its own `.venv` first.",
        "make demo",
    ),
    (
        "Which estimators are there, and what do they cost? On a small language model:",
        ".venv/bin/metafocus compare --quick --output out/compare",
    ),
    (
        "Learning to learn, the classic way: a network that fits a sinusoid after one step.",
        ".venv/bin/python examples/maml_sinusoid.py --quick",
    ),
    ("Now an estimator of one's own. The file:", "cat my_estimator.py"),
    (
        "Beside the built-in ones. It shares a half of first order's bias, as it should:",
        ".venv/bin/python my_estimator.py",
    ),
    (
        "A better one, unbiased, and a check that it is:",
        ".venv/bin/python examples/own_estimator.py --quick",
    ),
    (
        "FocuSFT on chats of one's own, to a checkpoint that plain transformers loads:",
        ".venv/bin/python examples/focusft_chats.py --quick",
    ),
]


def main() -> None:
    """Run every command and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default=str(HERE.parent), help="what to clone")
    args = parser.parse_args()
    lines = [
        "# The first hour",
        "",
        "From a clone to an estimator of one's own, compared with the built-in ones: every "
        "command and what it printed, written by `docs/first_hour.py` in a fresh clone. Of long "
        "outputs the middle is left out. Times are those of a machine with 2 busy cores and no "
        "GPU; figures in outputs are of that run.",
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
            told = "" if command.startswith("cat") else f" ({minutes:.1f} minutes)"
            language = "python" if command.startswith("cat") else "text"
            output = run.stdout.rstrip() if command.startswith("cat") else shortened(run.stdout)
            lines += ["", f"{text}{told}", "", "```", f"$ {command}", "```", ""]
            lines += [f"```{language}", output, "```"]
    (HERE / "first-hour.md").write_text("\n".join(lines) + "\n")


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
