"""`metafocus compare`: hypergradients of FocuSFT on a language model, side by side."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metafocus.cli import chats, options
from metafocus.comparison import differences
from metafocus.comparison.axes import TASKS
from metafocus.comparison.report import Comparison
from metafocus.comparison.run import compare
from metafocus.data import Collator, encode_chats, stdlib_qa
from metafocus.errors import DataError
from metafocus.lm import Batch
from metafocus.models import described
from metafocus.problem import trainable
from metafocus.recipes._focusft import focusft_problem
from metafocus.trainer.checkpoints import saving
from metafocus.trainer.names import ESTIMATORS, MASKS, named
from metafocus.types import Episode, Params

QUICK = {"max_length": 192, "per_device_train_batch_size": 1, "repeats": 1}
QUICK_MODEL = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 512}
DIFFERENCES = differences.DIFFERENCES.replace(" ", "-")
DEFAULT = "first-order,unrolled-last-1,unrolled,unrolled-recompute,implicit-cg"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="compare estimators of one hypergradient: error, time, memory",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--train_file", default=chats.STDLIB, help="FILE.jsonl, FILE.parquet or stdlib (default)"
    )
    options.add_whole(parser, "--max_length", 256, "largest number of tokens of a chat", least=2)
    options.add_whole(parser, "--per_device_train_batch_size", 2, "number of chats in a batch")
    parser.add_argument(
        "--mask",
        default="context-bidirectional",
        help=f"which keys a token sees: {', '.join(MASKS)}; default %(default)s",
    )
    parser.add_argument(
        "--estimators",
        default=DEFAULT,
        help=f"some of {', '.join(ESTIMATORS)}, separated by commas; default %(default)s",
    )
    parser.add_argument(
        "--reference",
        default="unrolled",
        help="the hypergradient that counts as exact: one of the same names, or "
        f"{DIFFERENCES} (six inner loops for each outer parameter: choose some by "
        "--outer_parameters); default %(default)s",
    )
    parser.add_argument(
        "--outer_parameters",
        metavar="PATTERN",
        help="regular expression for names of the model's parameters whose hypergradient is "
        "compared, such as norm.weight; default all",
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="FIELD=VALUES",
        help="an axis: solver.steps=1,2,4,8, solver.lr=0.1,1, estimator.solve.steps=5,10 (of "
        "all estimators that have it), unrolled.last=1,2 (of one), tasks=1,4 (batches of chats, "
        "each adapted to by itself); again for a grid",
    )
    options.add_whole(
        parser,
        "--seeds",
        1,
        "number of batches of other chats; more than one gives 95 %% intervals",
    )
    parser.add_argument(
        "--cells",
        metavar="DIR",
        help="directory that keeps what is finished, so that the comparison can be stopped, and "
        "extended by estimators, values and seeds",
    )
    options.add_whole(parser, "--repeats", 3, "how often each estimator is timed")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="type of the model's weights; default %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="smaller defaults, for a first look")
    parser.add_argument("--output_dir", help="directory for the figure and the numbers")
    options.add_model(parser)
    options.add_inner(parser, fraction=0.75, rank=8, rates=True)


def run(args: argparse.Namespace) -> None:
    """Compare and report."""
    if args.quick:
        smaller = QUICK if args.model_name_or_path else QUICK | QUICK_MODEL
        vars(args).update({k: v for k, v in smaller.items() if k not in args.given})
    directory = options.directory(args.output_dir) if args.output_dir else None
    estimators = {
        name: named("estimators", name, ESTIMATORS)() for name in options.words(args.estimators)
    }
    if not estimators:
        raise DataError(f"--estimators is empty: use some of {', '.join(ESTIMATORS)}.")
    references = {DIFFERENCES: lambda: differences.DIFFERENCES, **ESTIMATORS}
    reference = (
        args.reference
        if args.reference in estimators
        else named("reference", args.reference, references)()
    )
    mask, over = named("mask", args.mask, MASKS), axes(args.over, args.inner_lr)
    if args.cells:
        options.directory(args.cells, "--cells")
    records = chats.read(args.train_file)
    model, tokenizer = options.model_on_device(args, stdlib_qa.texts, args.max_length)
    model = model.to(getattr(torch, args.dtype))
    outer = _outer(model, args.outer_parameters)
    # mf.compare refuses a number of tasks that is none.
    tasks = max((x for x in over.get(TASKS, ()) if isinstance(x, int)), default=None)
    batches = _batches(args, records, tokenizer, tasks)

    # The same start for every estimator: the fast weights are drawn once.
    adapter = options.adapter(args)
    start = adapter.init(model, torch.Generator().manual_seed(args.seed))
    problem = dataclasses.replace(
        focusft_problem(model, adapter=adapter, mask=mask), init=Given(start)
    )
    print(
        f"{described(model)}; {sum(p.numel() for p in start.values()):,} fast weights, "
        f"{args.inner_steps} inner steps, batch {list(batches[0]['input_ids'].shape)}, "
        f"{args.dtype}",
        flush=True,
    )
    found = compare(
        problem,
        outer,
        Chats(batches) if args.seeds > 1 else Chats(batches)(0),
        solver=options.solver(args, args.inner_lr[0]),
        estimators=estimators,
        reference=reference,
        over=over or None,
        seeds=args.seeds,
        repeats=args.repeats,
        folder=args.cells,
    )
    print(found.table(), flush=True)
    if directory:
        with saving(directory, "the comparison"):
            directory.mkdir(parents=True, exist_ok=True)
            written = list(_write(found, directory))
        print("wrote " + " and ".join(str(path) for path in written))


def _outer(model: torch.nn.Module, pattern: str | None) -> Params:
    """Return the parameters whose names match; the others are frozen."""
    if pattern is not None:
        try:
            known = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
        except re.error as error:
            raise DataError(
                f"--outer_parameters {pattern!r} is not a regular expression: {error}"
            ) from error
        if not known:
            raise DataError(
                f"--outer_parameters {pattern!r} matches none of the model's parameters, such as "
                f"{next(name for name, _ in model.named_parameters())}"
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in known)
    return trainable(model)


def _batches(
    args: argparse.Namespace, records: Any, tokenizer: Any, tasks: int | None
) -> list[Batch]:
    """Return the chats of each seed as a batch; with tasks, as batches stacked on a first axis."""
    rows, count = args.per_device_train_batch_size, tasks or 1
    each = rows * count
    if records is None:
        records = chats.documentation(
            tokenizer,
            split="train",
            n=each * args.seeds,
            max_length=args.max_length,
            seed=args.seed,
        )
    samples = encode_chats(records, tokenizer, max_length=args.max_length).samples
    if len(samples) < each * args.seeds:
        times = f" times {count} tasks" if count > 1 else ""
        times += f" times --seeds {args.seeds}" if args.seeds > 1 else ""
        raise DataError(
            f"--per_device_train_batch_size {rows}{times} is more than the {len(samples)} chats "
            "with an answer in --train_file."
        )
    pad = Collator(pad_token_id=tokenizer.pad_token_id)
    first = (rows,) if tasks is None else (count, rows)
    return [
        {
            k: v.to(args.device).unflatten(0, first)
            for k, v in pad(samples[i * each : (i + 1) * each]).items()
        }
        for i in range(args.seeds)
    ]


@dataclass(frozen=True)
class Given:
    """A start that is always the same."""

    fast: Params

    def __call__(self, slow: Params, support: Any) -> Params:
        """Return it."""
        return self.fast


@dataclass(frozen=True)
class Chats:
    """An episode for each seed: other chats."""

    batches: list[Batch]

    def __call__(self, seed: int) -> Episode:
        """Return the chats of a seed, as support and query."""
        return Episode(self.batches[seed], self.batches[seed])


def axes(texts: list[str], rates: list[float]) -> dict[str, list[Any]]:
    """Return the axes that the options name, several inner rates among them.

    Raises:
        DataError: for an axis that is not written FIELD=VALUE,VALUE.

    Example:
        >>> axes(["solver.steps=1,2", "unrolled.last=1,None"], [0.1])
        {'solver.steps': [1, 2], 'unrolled.last': [1, None]}
    """
    found: dict[str, list[Any]] = {"solver.lr": list(rates)} if len(rates) > 1 else {}
    for text in texts:
        field, _, values = text.partition("=")
        words = options.words(values)
        if not field or not words:
            raise DataError(f"--over {text!r}: write FIELD=VALUE,VALUE, as in solver.steps=1,2,4")
        if field.removeprefix("solver.") == "lr" and len(rates) > 1:
            raise DataError("--over solver.lr and several values of --inner_lr: use one of both.")
        found[field] = [_value(text, word) for word in words]
    return found


def _value(text: str, word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError) as error:
        raise DataError(
            f"--over {text!r}: {word!r} is not a number, None, True or False. In Python, "
            "mf.compare takes any value."
        ) from error


def _write(found: Comparison, directory: Path) -> Iterator[Path]:
    found.plot(directory / "compare.png")
    yield directory / "compare.png"
    if found.over:
        found.pareto(directory / "pareto.png")
        yield directory / "pareto.png"
    found.to_json(directory / "compare.json")
    yield directory / "compare.json"
