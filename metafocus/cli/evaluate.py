"""`metafocus eval`: long-context questions made by code, and multiple-choice science."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metafocus.cli import options, trials
from metafocus.comparison.report import environment
from metafocus.errors import DataError
from metafocus.evals import babilong, harness, results, ruler
from metafocus.evals.items import Item
from metafocus.evals.prose import builtin_prose, prose_from_file
from metafocus.evals.report import length_name, plot_depths, table
from metafocus.evals.run import answers, prompt_counter
from metafocus.trainer.names import named

TASKS: dict[str, tuple[str, ...]] = {"babilong": babilong.TASKS, "ruler": ruler.TASKS}
REPORT, ANSWERS, DEPTHS = "eval.json", "answers.jsonl", "depths.png"
_NOISE = {"all": None, "train": "train", "heldout": "heldout"}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "eval",
        help="measure long-context skill (BABILong, RULER) and science with a tool (GPQA)",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    options.add_model(parser, small=False)
    parser.add_argument("--suite", required=True, choices=(*TASKS, *trials.SUITES))
    parser.add_argument(
        "--tasks", help="separated by commas; default: all of the suite (qa only with --questions)"
    )
    parser.add_argument(
        "--lengths",
        default="1k,4k",
        help="tokens, answer included, separated by commas; 1k is 1024; 0k is BABILong's facts "
        "without noise; default %(default)s",
    )
    parser.add_argument(
        "--n",
        type=options.whole(1),
        default=100,
        help="questions of each; default %(default)s, of gpqa all",
    )
    parser.add_argument(
        "--noise",
        default="heldout",
        help="FILE.txt in UTF-8, or documentation of the Python standard library: heldout "
        "(default), train or all",
    )
    parser.add_argument("--questions", help="file for RULER's qa: .jsonl, SQuAD or HotpotQA")
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="write the questions as tasks of lm-evaluation-harness, and ask nothing",
    )
    parser.add_argument(
        "--per_device_eval_batch_size", type=options.whole(1), default=8, help="default %(default)s"
    )
    parser.add_argument(
        "--depth_bins", type=options.whole(1), default=10, help="default %(default)s"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output_dir", help=f"directory for {REPORT}, {ANSWERS} and {DEPTHS}")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace results in output_dir"
    )
    trials.add_options(parser)


def run(args: argparse.Namespace) -> None:
    """Make the questions, ask them, score and report."""
    long = args.suite in TASKS
    if args.output_dir is None and not (long and args.export):
        raise DataError(f"--output_dir is missing: name a directory for {REPORT} and {ANSWERS}")
    output = options.directory(args.output_dir or args.export)
    if (output / REPORT).exists() and not args.overwrite_output_dir:
        raise DataError(
            f"--output_dir {output} holds {REPORT}: name another directory, or pass "
            "--overwrite_output_dir"
        )
    if not long:
        trials.run(args, output, output / REPORT, output / ANSWERS)
        return
    trials.note_unused(args)
    tasks, lengths = _tasks(args), _lengths(args.lengths, args.suite)
    generate = _generator(args, max(lengths))
    # Without a length: the check there names another option.
    model, tokenizer = options.model_on_device(args, lambda: (), 0)
    _check_positions(model, max(lengths))
    model = model.to(getattr(torch, args.dtype))
    count = prompt_counter(tokenizer)
    cells = [(task, length) for task in tasks for length in lengths]
    for task, length in cells:
        generate(count, task, length, 1)  # what cannot be made is refused before hours of answers
    if args.export:
        _export(args.export, [item for cell in cells for item in generate(count, *cell, args.n)])
        return
    start = time.perf_counter()
    items, outputs = _ask(
        lambda items, progress: answers(
            model, tokenizer, items, batch_size=args.per_device_eval_batch_size, progress=progress
        ),
        [
            lambda task=task, length=length: generate(count, task, length, args.n)
            for task, length in cells
        ],
        len(cells) * args.n,
    )
    seconds = time.perf_counter() - start
    found = results.cells(items, outputs, args.depth_bins)
    report = {
        "suite": args.suite,
        "cells": [results.as_record(cell) for cell in found],
        "seconds": seconds,
        "settings": {k: v for k, v in vars(args).items() if k not in ("run", "given")},
        "environment": environment(next(model.parameters()).dtype),
    }
    _write(output, report, items, outputs)
    drawn = plot_depths(found, output / DEPTHS)
    _print(table(found))
    print(f"{len(items)} answers in {seconds:.1f} s; wrote {output / REPORT}, {output / ANSWERS}")
    if drawn:
        print(f"wrote {output / DEPTHS}")
    else:
        print("no heat map: the evidence of these tasks stands everywhere")


def _export(directory: str, items: list[Item]) -> None:
    names = harness.export_tasks(items, options.directory(directory, "--export"))
    print(f"wrote {len(names)} tasks; with the same model and its chat template:")
    flags = f"--include_path {directory} --tasks {','.join(names)} --apply_chat_template"
    print(f"  lm_eval --model hf --model_args pretrained=DIR {flags}")


def _tasks(args: argparse.Namespace) -> list[str]:
    known = TASKS[args.suite]
    if args.suite == "babilong":
        options.note_unused(args, ("questions",), "with --suite babilong")
    if args.tasks is None:
        return [task for task in known if task != "qa" or args.questions]
    tasks = list(dict.fromkeys(word.strip() for word in args.tasks.split(",") if word.strip()))
    for task in tasks:
        named("tasks", task, dict.fromkeys(known))
    if not tasks:
        raise DataError(f"--tasks is empty: use some of {', '.join(known)}.")
    if args.suite == "ruler" and "qa" in tasks and not args.questions:
        raise DataError("--tasks qa needs --questions FILE: .jsonl, SQuAD or HotpotQA.")
    return tasks


def _lengths(text: str, suite: str) -> list[int]:
    found = []
    for word in (word.strip().lower() for word in text.split(",")):
        digits = word.removesuffix("k")
        if not digits.isdecimal():
            raise DataError(f"--lengths {text!r}: {word!r} is not a length such as 4k or 500.")
        found.append(int(digits) * (1024 if word.endswith("k") else 1))
    if suite == "ruler" and 0 in found:
        raise DataError(f"--lengths {text!r}: 0k is for BABILong only, RULER needs a haystack.")
    return sorted(set(found))


def _generator(
    args: argparse.Namespace, longest: int
) -> Callable[[Any, str, int, int], list[Item]]:
    if args.noise in _NOISE:
        prose = builtin_prose(_NOISE[args.noise])
    else:
        prose = prose_from_file(args.noise)
    size = sum(len(sentence.split()) for sentence in prose.sentences)
    if size < longest:
        # A word has a token at least: what is longer may fit, what is shorter surely repeats.
        print(f"note: --noise has {size} words and repeats in longer contexts.", file=sys.stderr)
    make: Any = babilong.generate if args.suite == "babilong" else ruler.generate
    common: dict[str, Any] = {"seed": args.seed, "prose": prose}
    if args.suite == "ruler" and args.questions:
        common["questions"] = ruler.read_questions(args.questions)
    return lambda count, task, length, n: make(count, task=task, length=length, n=n, **common)


def _check_positions(model: Any, longest: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest > most:
        raise DataError(
            f"--lengths {length_name(longest)} is more than the {most} positions of the model: "
            f"use at most {most}."
        )


def _ask(
    ask: Callable[[list[Item], Callable[[int], None]], list[str]],
    cells: list[Callable[[], list[Item]]],
    total: int,
) -> tuple[list[Item], list[str]]:
    """Make and ask one cell after the other; the long prompts are let go of once answered."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    items: list[Item] = []
    outputs: list[str] = []
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        row = bar.add_task("answering", total=total)
        for make in cells:
            asked = make()
            outputs += ask(asked, lambda n: bar.advance(row, n))
            items += [replace(item, prompt="") for item in asked]
    return items, outputs


def _write(output: Path, report: dict[str, Any], items: list[Item], outputs: list[str]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    # A map that the new answers do not support must not stay.
    for name in (REPORT, DEPTHS):
        (output / name).unlink(missing_ok=True)
    with (output / ANSWERS).open("w", encoding="utf-8") as file:
        for item, text in zip(items, outputs, strict=True):
            record = {**item.record(), "output": text, "scores": results.score(item, text)}
            file.write(json.dumps(record) + "\n")
    (output / REPORT).write_text(json.dumps(report, indent=2) + "\n")


def _print(shown: Any) -> None:
    from rich.console import Console

    Console(file=sys.stdout).print(shown)
