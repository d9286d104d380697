"""`metafocus eval`: long-context questions made by code, and multiple-choice science."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import rich
import torch

from metafocus.cli import answering, options, suites, trials
from metafocus.cli.answering import ANSWERS, DEPTHS, REPORT
from metafocus.cli.shares import Ranks, ranks, refuse_ranks
from metafocus.cli.suites import SUITES
from metafocus.comparison.report import environment
from metafocus.errors import DataError
from metafocus.evals import harness, results
from metafocus.evals.agentic.long_answers import endpoint_answers
from metafocus.evals.items import Item
from metafocus.evals.journal import Journal, Key
from metafocus.evals.positions import check_positions, positions
from metafocus.evals.report import length_name, plot_depths, table
from metafocus.evals.run import answers, prompt_counter
from metafocus.evals.scorers import EFFECTIVE
from metafocus.files import write_json
from metafocus.trainer.names import MASKS, named

Asker = Callable[[list[Item], Callable[[Mapping[int, str]], None]], None]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "eval",
        help="measure long-context skill (BABILong, RULER, ...) and multiple choice (GPQA, ...)",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    options.add_model(parser, small=False, required=False)
    parser.add_argument("--suite", required=True, choices=(*SUITES, *trials.SUITES))
    parser.add_argument(
        "--tasks",
        help="tasks, separated by commas; default: all of the suite (of babilong "
        "qa1 to qa5; qa of ruler only with --questions)",
    )
    parser.add_argument(
        "--lengths",
        default="1k,4k",
        help="numbers of tokens with the answer, separated by commas; 1k is 1024; 0k is "
        "BABILong's facts without noise; default %(default)s",
    )
    parser.add_argument(
        "--n",
        "--num_questions",
        type=options.whole(1),
        default=100,
        help="number of questions of each task; default %(default)s; of gpqa and longbench all",
    )
    parser.add_argument(
        "--noise",
        default="heldout",
        help="text around the evidence: FILE.txt in UTF-8, or documentation of Python: heldout "
        "(default), train or all",
    )
    parser.add_argument("--questions", help="file for RULER's qa: .jsonl, SQuAD or HotpotQA")
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="write the questions as tasks of lm-evaluation-harness, and ask nothing",
    )
    options.add_whole(parser, "--per_device_eval_batch_size", 8, "number of prompts in a batch")
    options.add_whole(parser, "--depth_bins", 10, "number of depths in the heat map")
    parser.add_argument(
        "--mask",
        default="causal",
        help=f"which keys a token of a question sees: {', '.join(MASKS)}; a server is causal; "
        "default %(default)s",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output_dir", help=f"directory for {REPORT}, {ANSWERS} and {DEPTHS}")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace results in output_dir"
    )
    answering.add_options(parser)
    trials.add_options(parser)


def run(args: argparse.Namespace) -> None:
    """Make the questions, ask them, score and report."""
    long = args.suite in SUITES
    if args.output_dir is None and not (long and args.export):
        raise DataError(f"--output_dir is missing: name a directory for {REPORT} and {ANSWERS}")
    output = options.directory(args.output_dir or args.export)
    answering.check(args)
    if not long:
        trials.run(args, output)
        return
    trials.note_unused(args)
    named("mask", args.mask, MASKS)
    tasks, lengths = suites.tasks(args), suites.lengths(args.lengths, args.suite)
    cells = [(task, length) for task in tasks for length in lengths]
    group = ranks()
    if args.export:
        refuse_ranks("eval --export")
    rank = group.rank
    answered = None
    if not args.export:
        answered = group.after_first(lambda: answering.journal(args, output, rank))
    generate = suites.generator(args, max(lengths))
    asker, tokenizer, most = _asker(args)
    count = prompt_counter(tokenizer)
    thinking = answering.thinking(args)
    check_positions(max(lengths) + thinking, most, f"--lengths {length_name(max(lengths))}")
    for task, length in cells:
        # What cannot be made or asked is refused before hours of answers.
        for item in generate(count, task, length, 1 if length else args.n):
            size = count(item.prompt) + item.new_tokens + thinking
            check_positions(size, most, f"--lengths {length_name(length)}: {task}")
    if answered is None:
        _export(args.export, [item for cell in cells for item in generate(count, *cell, args.n)])
        return
    start = time.perf_counter()
    with answered, answering.progress(len(cells) * args.n, answered, group) as advance:
        group.after_first(lambda: answering.take_over(answered, output, rank))
        items: list[Item] = []
        outputs: list[str] = []
        for task, length in cells:
            asked = generate(count, task, length, args.n)
            outputs += _ask(asked, answered, asker, advance, group)
            # The long prompts are not kept once they are answered.
            items += [replace(item, prompt="") for item in asked]
        if not group.first:
            # The first has all answers.
            answered.discard()
            return
        answered.finish([_key(items[i], i % args.n) for i in range(len(items))])
        seconds = time.perf_counter() - start
        found = results.cells(items, outputs, args.depth_bins)
        means = results.averages(found)
        limit = EFFECTIVE.get(args.suite)
        longest = None if limit is None else results.effective_length(means, limit / 100)
        report = {
            "suite": args.suite,
            "cells": [results.as_record(cell) for cell in found],
            "averages": [asdict(row) for row in means],
            "effective_length": longest,
            "seconds": seconds,
            "settings": options.as_record(args),
            "environment": environment(getattr(torch, args.dtype)),
        }
        drawn = plot_depths(found, output / DEPTHS)
        write_json(output / REPORT, report)
    rich.print(table(found))
    for row in means:
        print(f"mean of {row.tasks} tasks at {length_name(row.length)}: {100 * row.mean:.1f}")
    if limit is not None:
        name = "none of these" if longest is None else length_name(longest)
        print(f"effective length (a mean of at least {limit}): {name}")
    print(f"{len(items)} answers in {seconds:.1f} s; wrote {output / REPORT}, {output / ANSWERS}")
    if drawn:
        print(f"wrote {output / DEPTHS}")
    else:
        print("no heat map: the evidence of these tasks is everywhere in the text")


def _asker(args: argparse.Namespace) -> tuple[Asker, Any, int | None]:
    """Return what answers a list of items, the tokenizer, and the positions of the model."""
    thinking = answering.thinking(args)
    if args.endpoint is not None:
        server = answering.server(args, temperature=0.0)
        return (
            lambda items, each: endpoint_answers(
                server, items, each, concurrency=args.concurrency, thinking=thinking
            ),
            answering.tokenizer(args),
            None,
        )
    model, tokenizer = answering.local(args)

    def ask(items: list[Item], each: Callable[[Mapping[int, str]], None]) -> None:
        answers(
            model,
            tokenizer,
            items,
            batch_size=args.per_device_eval_batch_size,
            thinking=thinking,
            max_positions=args.max_positions,
            mask=None if args.mask == "causal" else MASKS[args.mask],
            each=each,
        )

    return ask, tokenizer, args.max_positions or positions(model.config)


def _ask(
    items: list[Item],
    answered: Journal,
    asker: Asker,
    advance: Callable[[int], None],
    group: Ranks,
) -> list[str]:
    """Ask what has no answer yet, keep each answer as it comes, and return all in order.

    Several processes ask a share each, and each then has all answers.
    """
    missing = [i for i, item in enumerate(items) if not answered.get(_key(item, i), item.prompt)]
    advance(len(items) - len(missing))
    mine = group.mine(missing)

    def keep(texts: Mapping[int, str]) -> None:
        rows = []
        for at, text in texts.items():
            i = mine[at]
            record = {**items[i].record(), "output": text, "scores": results.score(items[i], text)}
            rows.append((_key(items[i], i), items[i].prompt, record))
        answered.add(rows)
        advance(len(rows))

    if mine:
        asker([items[i] for i in mine], keep)
    for found in group.gathered(answered.records(_key(items[i], i) for i in mine)):
        answered.merge(found)
    records = [answered.get(_key(item, i), item.prompt) for i, item in enumerate(items)]
    return [record["output"] for record in records if record is not None]


def _key(item: Item, i: int) -> Key:
    return item.suite, item.task, item.length, i


def _export(directory: str, items: list[Item]) -> None:
    names = harness.export_tasks(items, options.directory(directory, "--export"))
    print(f"wrote {len(names)} tasks; with the same model and its chat template:")
    flags = f"--include_path {directory} --tasks {','.join(names)} --apply_chat_template"
    print(f"  lm_eval --model hf --model_args pretrained=DIR {flags}")
