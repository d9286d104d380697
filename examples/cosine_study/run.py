"""First-order against exact hypergradients of FocuSFT on a real model, with a referee.

    python examples/cosine_study/run.py --output examples/cosine_study/results

Each point is one file, written whole: a run that is stopped goes on where it was. The page can be
written at any time from whatever is there:

    python examples/cosine_study/run.py --output examples/cosine_study/results --report \
        --page docs/cosine.md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from points import Point, chat, grid, measure
from report import write_report

from metafocus import models
from metafocus.files import write_json
from metafocus.masks import Batch


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a directory, hub id or known name")
    parser.add_argument("--output", type=Path, default=Path("out/cosine_study"))
    parser.add_argument("--limit", type=int, help="stop after so many new points")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two points")
    parser.add_argument("--report", action="store_true", help="only write the page again")
    parser.add_argument("--page", type=Path, help="where; default: report.md in --output")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.report:
        run(args.model, args.output, args.quick, args.limit)
    print(write_report(args.output, args.page or args.output / "report.md"))


def run(source: str, output: Path, quick: bool, limit: int | None = None) -> None:
    """Measure every point that has no file yet, or the first `limit` of them."""
    if quick:
        torch.manual_seed(0)
        from metafocus.data import stdlib_qa

        model, tokenizer = models.small(stdlib_qa.texts(), num_hidden_layers=3)
        points = [Point(rate, tokens=300) for rate in (0.1, 1.0)]
    else:
        model, tokenizer = models.load(source, attn_implementation="sdpa")
        points = grid()
    model.train()
    batches: dict[tuple[int, int], Batch] = {}
    missing = [
        (i, point, path)
        for i, point in enumerate(points)
        if not (path := output / f"{point.name}.json").exists()
    ]
    for i, point, path in missing[:limit]:
        size = (point.tokens, point.sample)
        if size not in batches:
            batches[size] = chat(tokenizer, *size)
        found = measure(model, batches[size], point)
        write_json(path, found, indent=1)
        now, cosine = time.strftime("%H:%M:%S"), found["cosine"]
        print(f"{now} [{i + 1}/{len(points)}] {point.name}: cosine {cosine:.3f}", flush=True)


if __name__ == "__main__":
    main()
