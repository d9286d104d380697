"""What the suites of `metafocus eval` share: the model or server that answers, and the answers."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from metafocus import models
from metafocus.cli import options
from metafocus.cli.shares import ALONE, Ranks, ranks
from metafocus.errors import DataError
from metafocus.evals.agentic import HTTPEndpoint
from metafocus.evals.fingerprint import fingerprint
from metafocus.evals.journal import Journal, records_in

REPORT, ANSWERS, DEPTHS = "eval.json", "answers.jsonl", "depths.png"
# They decide where and how fast, but not what is asked and what an answer is.
_FREE = (
    "run", "given", "suite", "tasks", "lengths", "n", "samples", "k", "output_dir",
    "overwrite_output_dir", "per_device_eval_batch_size", "depth_bins", "export", "endpoint",
    "endpoint_key_env", "concurrency", "retries", "device", "unsafe_tools",
)  # fmt: skip
_LOCAL = (
    "device", "dtype", "attn_implementation", "mask", "max_positions", "per_device_eval_batch_size",
)  # fmt: skip
_SERVER = ("endpoint_model", "endpoint_key_env", "concurrency", "retries")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of thinking and of a server."""
    parser.add_argument(
        "--enable_thinking", action="store_true", help="let the model reason before it answers"
    )
    options.add_whole(
        parser,
        "--thinking_tokens",
        2048,
        "largest number of tokens of reasoning, with --enable_thinking",
    )
    parser.add_argument(
        "--max_positions",
        type=options.whole(1),
        help="number of positions of the model, if its configuration has a smaller one (YaRN)",
    )
    group = parser.add_argument_group(
        "server",
        "a server with OpenAI's chat completions API answers; --model_name_or_path then gives the "
        "tokenizer only",
    )
    group.add_argument(
        "--endpoint", metavar="URL", help="address, such as http://localhost:8000/v1"
    )
    group.add_argument(
        "--endpoint_model", help="name of the model on the server; default: --model_name_or_path"
    )
    group.add_argument(
        "--endpoint_key_env", metavar="NAME", help="environment variable that holds the key"
    )
    options.add_whole(group, "--concurrency", 1, "number of requests at the same time")
    options.add_whole(group, "--retries", 5, "number of retries of each request", least=0)


def check(args: argparse.Namespace) -> None:
    """Refuse what does not fit together, and say which options have no effect.

    Raises:
        DataError: if there is nothing that answers.
    """
    if args.endpoint is None and args.model_name_or_path is None:
        raise DataError(
            "--model_name_or_path is missing: name a directory or hub id, or a server with "
            "--endpoint URL"
        )
    if args.endpoint is None:
        options.note_unused(args, _SERVER, "without --endpoint")
    else:
        options.note_unused(args, _LOCAL, "with --endpoint")
        if not args.endpoint.startswith(("http://", "https://")):
            raise DataError(f"--endpoint {args.endpoint!r} must begin with http:// or https://")
        if args.endpoint_model is None and args.model_name_or_path is None:
            raise DataError("--endpoint_model is missing: name the model on the server")
    if not args.enable_thinking:
        options.note_unused(args, ("thinking_tokens",), "without --enable_thinking")


def thinking(args: argparse.Namespace) -> int:
    """Return the number of tokens for reasoning, 0 for none."""
    return args.thinking_tokens if args.enable_thinking else 0


def server(args: argparse.Namespace, **sampling: Any) -> HTTPEndpoint:
    """Return the server that the options describe.

    Raises:
        DataError: if the variable with the key is not set.
    """
    key = None
    if args.endpoint_key_env is not None:
        key = os.environ.get(args.endpoint_key_env)
        if not key:
            raise DataError(f"--endpoint_key_env {args.endpoint_key_env} is not set")
    return HTTPEndpoint(
        args.endpoint,
        args.endpoint_model or args.model_name_or_path,
        key=key,
        retries=args.retries,
        extra={"chat_template_kwargs": {"enable_thinking": True}} if args.enable_thinking else {},
        **sampling,
    )


def tokenizer(args: argparse.Namespace) -> Any:
    """Return the tokenizer that counts the tokens of prompts for a server.

    Raises:
        DataError: if none is named, or if it cannot be loaded.
    """
    if args.model_name_or_path is None:
        raise DataError(
            "--model_name_or_path is missing: with --endpoint it names the directory or hub id of "
            "the tokenizer, which counts the tokens of prompts"
        )
    return models.load_tokenizer(args.model_name_or_path)


def local(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model in `--dtype` on `--device`, and its tokenizer."""
    # Without a length: the check there names another option.
    args.device = ranks().device(args.device)
    model, words = options.model_on_device(args, lambda: (), 0, base=True)
    if words.chat_template is None:
        print("note: no chat template; chats are written in a plain form.", file=sys.stderr)
    return model.to(getattr(torch, args.dtype)), words


def journal(args: argparse.Namespace, output: Path, rank: int = 0) -> Journal:
    """Return the file of answers, for everything that determines an answer of this run.

    Args:
        args: the options.
        output: the directory.
        rank: of this process; each has a file of its own until their answers are merged.

    Raises:
        DataError: if the results of a finished run are there and must not be replaced.
    """
    if args.overwrite_output_dir and rank == 0:
        # A map that the new answers do not support must not stay.
        for path in (output / REPORT, output / ANSWERS, output / DEPTHS, *_others(output)):
            path.unlink(missing_ok=True)
    if (output / REPORT).exists():
        raise DataError(
            f"--output_dir {output} holds {REPORT}, so this evaluation is finished: name another "
            "directory, or pass --overwrite_output_dir"
        )
    settings = {k: v for k, v in vars(args).items() if k not in _FREE}
    settings["metafocus"] = version("metafocus")
    settings["server"] = args.endpoint is not None
    if args.endpoint is None:
        settings["files"] = fingerprint(args.model_name_or_path)
    path = output / ANSWERS
    return Journal(path.with_stem(f"{path.stem}.rank{rank}") if rank else path, settings)


def take_over(answered: Journal, output: Path, rank: int) -> None:
    """Let this process know all answers that are there.

    Those that processes of an earlier run have left go into the file of the first.
    """
    others = _others(output) if rank == 0 else [output / ANSWERS]
    for path in others:
        answered.merge(records_in(path))
    if rank == 0:
        for path in others:
            path.unlink()


def _others(output: Path) -> list[Path]:
    path = output / ANSWERS
    return sorted(output.glob(f"{path.stem}.rank*{path.suffix}"))


@contextlib.contextmanager
def progress(
    total: int, answered: Journal, group: Ranks = ALONE
) -> Iterator[Callable[[int], None]]:
    """Show a bar, and say how many answers of an earlier run are kept; on the first process."""
    if not group.first:
        yield lambda n: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    if len(answered):
        print(f"note: {len(answered)} answers of an earlier run are kept.", file=sys.stderr)
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        row = bar.add_task("answering", total=total)
        yield lambda n: bar.advance(row, n)
