"""`metafocus train`: supervised fine-tuning, plain or with FocuSFT, from chats to a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from metafocus import masks, stdlib_qa
from metafocus.cli import options
from metafocus.cli.models import model_and_tokenizer
from metafocus.compare import environment
from metafocus.data import Collator, encode_chats, read_chats
from metafocus.errors import DataError
from metafocus.recipes.focusft import focusft
from metafocus.training import History, Schedule, evaluate, plain_sft, train

REPORT = "metafocus.json"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a causal language model on chats, plainly or with FocuSFT",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        help="FILE.jsonl or FILE.parquet with chat `messages`, or `stdlib`: questions about the "
        "documentation of the Python standard library on this machine",
    )
    data.add_argument("--heldout", help="file of held-out chats; default: --heldout-fraction")
    data.add_argument("--heldout-fraction", type=float, default=0.1, help="default %(default)s")
    data.add_argument("--max-length", type=int, default=512, help="tokens; default %(default)s")
    data.add_argument("--samples", type=int, default=400, help="of stdlib; default %(default)s")
    data.add_argument("--turns", type=int, default=1, help="of stdlib; default %(default)s")
    data.add_argument(
        "--separate-messages",
        action="store_true",
        help="every message is a context turn of its own (default: neighbours are one turn)",
    )
    options.add_model(parser)
    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=("sft", "focusft"), default="focusft")
    method.add_argument(
        "--mask",
        help=f"{', '.join(options.MASKS)}; default: context-bidirectional for focusft, causal "
        "for sft",
    )
    method.add_argument(
        "--estimator", default="first-order", help=f"{', '.join(options.ESTIMATORS)}"
    )
    options.add_inner(parser, fraction=0.35, rank=32)
    outer = parser.add_argument_group("outer loop")
    outer.add_argument("--steps", type=int, help="outer steps; default: from --epochs")
    outer.add_argument("--epochs", type=float, default=5.0, help="default %(default)s")
    outer.add_argument("--batch-size", type=int, default=4, help="default %(default)s")
    outer.add_argument("--lr", type=float, default=1e-5, help="default %(default)s")
    outer.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--output", required=True, help="directory of the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output")


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, save."""
    output = Path(args.output)
    _refuse_full(output, args.overwrite)
    mask_word = args.mask or ("causal" if args.method == "sft" else "context-bidirectional")
    mask = options.choice(options.MASKS, mask_word, "--mask")
    estimator = options.choice(options.ESTIMATORS, args.estimator, "--estimator")()
    adapter, solver = options.adapter(args), options.solver(args)
    # Read what the user brought before anything slow happens.
    records = None if args.data == "stdlib" else read_chats(args.data)
    heldout = read_chats(args.heldout) if args.heldout else None

    model, tokenizer = model_and_tokenizer(args, lambda: _texts(records), args.max_length)
    if records is None:
        records, heldout = _standard_library(args, tokenizer)
    elif heldout is None:
        records, heldout = _split(records, args.heldout_fraction, args.seed)
    merge = not args.separate_messages
    limit = _limit(model, args.max_length)
    _say(f"data: {len(records)} chats to train on, {len(heldout)} held out")
    encoded = encode_chats(records, tokenizer, max_length=limit, merge_context=merge)
    _say(f"train: {encoded.summary()}")
    held = encode_chats(heldout, tokenizer, max_length=limit, merge_context=merge)
    _say(f"held out: {held.summary()}")

    collator = Collator(pad_token_id=tokenizer.pad_token_id)
    steps = args.steps or max(round(args.epochs * len(encoded.samples) / args.batch_size), 1)
    schedule = Schedule(steps, args.batch_size, args.lr, seed=args.seed)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.method == "sft":
        meta_loss = plain_sft(model, mask)
    else:
        meta_loss = focusft(
            model,
            adapter=adapter,
            mask=mask,
            solver=solver,
            estimator=estimator,
            generator=torch.Generator().manual_seed(args.seed),
        )

    def measure() -> dict[str, float]:
        # A saved checkpoint runs causally, whatever mask it was trained with.
        found = {"deployed": evaluate(model, held.samples, collator, mask=masks.causal)}
        if mask is not masks.causal:
            found["training mask"] = evaluate(model, held.samples, collator, mask=mask)
        return found

    before = measure()
    _say(f"held-out answer loss before: {_shown(before)}")
    start = time.perf_counter()
    history = train(model, meta_loss, encoded.samples, collator, schedule)
    seconds = time.perf_counter() - start
    after = measure()
    _say(f"held-out answer loss after: {_shown(after)}   ({seconds:.1f} s)")
    report = {
        "method": args.method,
        "mask": mask_word,
        "estimator": args.estimator if args.method == "focusft" else None,
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "seconds": seconds,
        "settings": {k: v for k, v in vars(args).items() if k != "run"},
        "schedule": asdict(schedule),
        "environment": environment(next(model.parameters()).dtype),
        "history": asdict(history),
    }
    _save(model, tokenizer, report, output)
    _say(f"saved: {output}")
    _warn_diverged(history)


def _refuse_full(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise DataError(f"--output {output} is a file: name a directory.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise DataError(
            f"--output {output} is not empty: name another directory, or pass --overwrite to "
            "replace its checkpoint."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".metafocus-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"--output {output} cannot be written: {error}.") from error


def _texts(records: list[dict[str, Any]] | None) -> Iterable[str]:
    if records is None:
        yield from stdlib_qa.texts()
        return
    for record in records:
        for message in record["messages"]:
            if isinstance(message.get("content"), str):
                yield message["content"]


def _standard_library(args: argparse.Namespace, tokenizer: Any) -> tuple[list, list]:
    # Room for the question, the answer and the template around them.
    context = max(args.max_length - 96 * args.turns, 64)
    count = max(args.samples // 10, 8)
    common = {"context_tokens": context, "turns": args.turns}
    records = stdlib_qa.generate(tokenizer, split="train", n=args.samples, seed=args.seed, **common)
    heldout = stdlib_qa.generate(tokenizer, split="heldout", n=count, seed=args.seed, **common)
    return records, heldout


def _split(records: list, fraction: float, seed: int) -> tuple[list, list]:
    if not 0 < fraction < 1:
        raise DataError(f"--heldout-fraction must be between 0 and 1, got {fraction}.")
    if len(records) < 2:
        raise DataError(
            f"--data holds {len(records)} chat: at least 2 are needed to hold one out. Or name "
            "--heldout FILE."
        )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(round(fraction * len(records)), 1), len(records) - 1)
    return [records[i] for i in order[count:]], [records[i] for i in order[:count]]


def _limit(model: Any, length: int) -> int:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise DataError(
            f"--max-length {length} is more than the {most} positions of the model: use at most "
            f"--max-length {most}."
        )
    return length


def _save(model: Any, tokenizer: Any, report: dict[str, Any], output: Path) -> None:
    # The report comes last: where it is, the checkpoint beside it is whole.
    (output / REPORT).unlink(missing_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / REPORT).write_text(json.dumps(report, indent=2) + "\n")


def _warn_diverged(history: History) -> None:
    worse = [
        first is not None and last is not None and last > first
        for first, last in zip(history.inner_first, history.inner_last, strict=True)
    ]
    if sum(worse) > len(worse) / 2:
        _say(
            "note: the inner loss rose in most steps. Lower --inner-lr, or use fewer --inner-steps."
        )


def _shown(losses: dict[str, float]) -> str:
    return ", ".join(f"{loss:.4f} ({name})" for name, loss in losses.items())


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
