"""`metafocus eval --suite science | gpqa | longbench`: multiple choice, a Python tool, pass@k."""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import rich
import torch

from metafocus.cli import answering, options
from metafocus.cli.answering import ANSWERS, REPORT
from metafocus.cli.shares import refuse_ranks
from metafocus.comparison.report import environment
from metafocus.errors import DataError
from metafocus.evals import agentic
from metafocus.evals.journal import Journal, Key
from metafocus.files import write_json

SUITES = ("science", "gpqa", "longbench")
_LONG = (
    "tasks",
    "lengths",
    "noise",
    "questions",
    "per_device_eval_batch_size",
    "depth_bins",
    "export",
    "mask",
)
_OWN = (
    "gpqa_file", "longbench_file", "samples", "k", "no_tool", "unsafe_tools", "calls",
    "tool_seconds", "temperature", "top_p", "max_new_tokens",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what these suites alone use."""
    group = parser.add_argument_group("science, gpqa and longbench")
    group.add_argument("--gpqa_file", help="GPQA's CSV file, for --suite gpqa")
    group.add_argument("--longbench_file", help="data.json of LongBench v2, for --suite longbench")
    options.add_whole(group, "--samples", 4, "number of trials at each question")
    group.add_argument(
        "--k", default="1", help="values of k for pass@k, separated by commas; default %(default)s"
    )
    group.add_argument(
        "--no_tool",
        action="store_false",
        dest="tool",
        help="do not let the model run Python (behind walls of the kernel; Linux only)",
    )
    group.add_argument(
        "--unsafe_tools",
        action="store_true",
        help="run programs even if this machine has no wall around them",
    )
    options.add_whole(group, "--calls", 5, "largest number of programs in a trial", least=0)
    group.add_argument(
        "--tool_seconds",
        type=options.positive,
        default=10.0,
        help="longest time of a program in seconds; default %(default)s",
    )
    group.add_argument(
        "--temperature",
        type=_temperature,
        default=0.7,
        help="temperature of sampling; default %(default)s",
    )
    group.add_argument(
        "--top_p", type=options.positive, default=1.0, help="top-p of sampling; default %(default)s"
    )
    options.add_whole(group, "--max_new_tokens", 1024, "largest number of tokens of a reply")


def note_unused(args: argparse.Namespace) -> None:
    """Say which options have no effect on the other suites."""
    options.note_unused(args, _OWN, f"with --suite {args.suite}")


def run(args: argparse.Namespace, output: Path) -> None:
    """Ask, score and report."""
    refuse_ranks(
        f"eval --suite {args.suite}",
        "start it without torchrun, or serve the model and pass --endpoint with --concurrency",
    )
    options.note_unused(args, _LONG, f"with --suite {args.suite}")
    ks = _ks(args.k, args.samples)
    if args.temperature == 0 and args.samples > 1:
        raise DataError(
            f"--temperature 0 makes all --samples {args.samples} alike: pass --samples 1, or a "
            "temperature above 0"
        )
    questions = _questions(args)
    limits = agentic.Limits(
        seconds=args.tool_seconds, cpu_seconds=max(1, -int(-args.tool_seconds // 1))
    )
    if args.tool:
        agentic.check_walls(args.unsafe_tools)
    else:
        options.note_unused(args, ("unsafe_tools",), "with --no_tool")
    answered = answering.journal(args, output)
    endpoint = _endpoint(args)
    start = time.perf_counter()
    with answered:
        trial = _ask(args, endpoint, questions, ks, limits, answered)
        pairs = [(i, j) for i in range(len(questions)) for j in range(args.samples)]
        answered.finish([_key(args, *pair) for pair in pairs])
        seconds = time.perf_counter() - start
        found = {
            "suite": args.suite,
            "questions": len(questions),
            **trial.summary(),
            "by_topic": by_topic(questions, trial),
            "seconds": seconds,
            "settings": options.as_record(args),
            "tool_limits": asdict(limits) if args.tool else None,
            "tool_walls": asdict(agentic.walls()) if args.tool else None,
            "environment": environment(getattr(torch, args.dtype)),
        }
        write_json(output / REPORT, found)
    _print(trial, args.samples)
    print(
        f"{len(questions)} questions in {seconds:.1f} s; wrote {output / REPORT}, "
        f"{output / ANSWERS}"
    )


def by_topic(questions: list[agentic.Choice], trial: agentic.Trial) -> dict[str, dict[str, Any]]:
    """Return pass@1 and the number of questions for each topic."""
    groups: dict[str, list[float]] = {}
    for question, tries in zip(questions, trial.attempts, strict=True):
        share = sum(attempt.correct for attempt in tries) / len(tries)
        groups.setdefault(question.topic, []).append(share)
    return {
        topic: {"pass_at_1": sum(row) / len(row), "questions": len(row)}
        for topic, row in sorted(groups.items())
    }


def _endpoint(args: argparse.Namespace) -> agentic.Endpoint:
    thinking = answering.thinking(args)
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    if args.endpoint is not None:
        return answering.server(args, new_tokens=args.max_new_tokens + thinking, **sampling)
    model, tokenizer = answering.local(args)
    return agentic.LocalEndpoint(
        model.eval(),
        tokenizer,
        new_tokens=args.max_new_tokens,
        thinking=thinking,
        max_positions=args.max_positions,
        **sampling,
    )


def _temperature(word: str) -> float:
    return 0.0 if word in ("0", "0.0") else options.positive(word)


def _ks(text: str, samples: int) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= samples for word in words):
        raise DataError(f"--k {text!r}: give whole numbers from 1 to --samples {samples}")
    return [int(word) for word in words]


def _questions(args: argparse.Namespace) -> list[agentic.Choice]:
    files = {"gpqa": "gpqa_file", "longbench": "longbench_file"}
    others = [name for suite, name in files.items() if suite != args.suite]
    options.note_unused(args, others, f"with --suite {args.suite}")
    if args.suite == "science":
        return agentic.science(args.n, args.seed)
    if getattr(args, files[args.suite]) is None:
        raise DataError(
            "--suite gpqa needs --gpqa_file FILE.csv: GPQA is gated, and is not shipped."
            if args.suite == "gpqa"
            else "--suite longbench needs --longbench_file FILE.json: LongBench v2 is not shipped."
        )
    if args.suite == "gpqa":
        every = agentic.read_gpqa(args.gpqa_file, args.seed)
    else:
        every = agentic.read_longbench(args.longbench_file)
    if not args.given & {"n", "num_questions"} or args.n >= len(every):
        return every
    return random.Random(f"{args.suite} order {args.seed}").sample(every, args.n)


def _ask(
    args: argparse.Namespace,
    endpoint: agentic.Endpoint,
    questions: list[agentic.Choice],
    ks: list[int],
    limits: agentic.Limits,
    answered: Journal,
) -> agentic.Trial:
    """Ask what has no answer yet, and keep each trial as soon as it ends."""
    done = {}
    for i, question in enumerate(questions):
        for j in range(args.samples):
            record = answered.get(_key(args, i, j), question.prompt)
            if record is not None:
                done[i, j] = agentic.Attempt.from_record(record)
    with answering.progress(len(questions) * args.samples, answered) as advance:
        advance(len(done))

        def keep(i: int, j: int, attempt: agentic.Attempt) -> None:
            question = questions[i]
            known = {"question": i, "sample": j, "topic": question.topic}
            record = {**known, "reference": question.letter, **asdict(attempt)}
            answered.add([(_key(args, i, j), question.prompt, record)])
            advance(1)

        return agentic.evaluate(
            endpoint,
            questions,
            samples=args.samples,
            ks=ks,
            tool=partial(agentic.run_python, limits=limits, unsafe=args.unsafe_tools)
            if args.tool
            else None,
            calls=args.calls,
            seed=args.seed,
            concurrency=args.concurrency,
            done=done,
            each=keep,
        )


def _key(args: argparse.Namespace, i: int, j: int) -> Key:
    return args.suite, "", j, i


def _print(trial: agentic.Trial, samples: int) -> None:
    from rich.table import Table

    shown = Table(title="pass@k in per cent, with 95 % Wilson intervals over questions")
    for name in ("k", "pass@k", "interval", "questions", "samples"):
        shown.add_column(name, justify="right", no_wrap=True)
    for rate in trial.rates:
        interval = f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"
        row: tuple[Any, ...] = (rate.k, f"{100 * rate.mean:.1f}", interval, rate.questions, samples)
        shown.add_row(*map(str, row))
    rich.print(shown)
