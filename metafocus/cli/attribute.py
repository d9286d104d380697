"""`metafocus attribute`: which training chats helped the answers to some questions.

A short LoRA fine-tuning run is differentiated as a whole by the weight of each of its chats
(MAGIC, arXiv 2504.16430): exactly, not by an influence function.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from metafocus.autodiff import stores
from metafocus.cli import chats, options
from metafocus.comparison.report import environment
from metafocus.data import Collator, encode_chats, stdlib_qa
from metafocus.errors import DataError
from metafocus.estimators import Unrolled
from metafocus.files import write_json, write_whole
from metafocus.lm.loss import lm_loss
from metafocus.masks import causal
from metafocus.recipes._attribution import Attribution, attribution
from metafocus.recipes._datamodeling import spearman
from metafocus.solvers import SGD, Adam
from metafocus.streams import Batches
from metafocus.trainer.checkpoints import saving
from metafocus.types import Params

REPORT, PAGE = "attribution.json", "attribution.md"
SHOWN = 5


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "attribute",
        help="say which training chats helped the answers to some questions",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    positive = options.positive
    parser.add_argument("--train_file", required=True, help="FILE.jsonl or FILE.parquet of chats")
    parser.add_argument(
        "--query_file", required=True, help="file of the chats whose answers are explained"
    )
    options.add_whole(parser, "--max_train_samples", 64, "number of training chats")
    options.add_whole(parser, "--max_length", 256, "largest number of tokens of a chat", least=2)
    options.add_whole(parser, "--max_steps", 16, "number of training steps")
    options.add_whole(parser, "--per_device_train_batch_size", 4, "number of chats in a batch")
    parser.add_argument(
        "--optim",
        default="sgd",
        choices=("sgd", "adam"),
        help="sgd (default) has momentum 0.9; adam needs a small learning_rate, such as 0.001: "
        "at a larger one its scores do not predict what leaving a chat out does",
    )
    parser.add_argument(
        "--learning_rate", type=positive, default=0.1, help="learning rate; default %(default)s"
    )
    parser.add_argument(
        "--layer_fraction",
        type=float,
        default=1.0,
        help="share of the layers, from the top, that are trained; default %(default)s",
    )
    parser.add_argument(
        "--lora_modules",
        default="q_proj,v_proj",
        help="modules that are trained, separated by commas; default %(default)s",
    )
    options.add_whole(parser, "--lora_rank", 8, "rank of the trained weights")
    parser.add_argument(
        "--lora_alpha",
        type=positive,
        help="the weights are scaled by lora_alpha / lora_rank; default twice lora_rank",
    )
    parser.add_argument(
        "--store",
        default="device",
        help="where the states of the run live: device (default), cpu, disk=DIR or schedule=SLOTS",
    )
    options.add_whole(
        parser,
        "--leave_one_out",
        0,
        "number of chats to leave out, one at a time, in runs that check the scores",
        least=0,
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--output_dir", required=True, help=f"directory of {REPORT} and {PAGE}")
    options.add_model(parser, small=False)


def run(args: argparse.Namespace) -> None:
    """Train, differentiate, write."""
    directory, store = options.directory(args.output_dir), _store(args.store)
    if args.leave_one_out == 1:
        raise DataError(
            "--leave_one_out 1: the scores are compared by their ranks, for which one run says "
            "nothing. Give at least 2, or 0 for none."
        )
    train, query = (chats.read(name) for name in (args.train_file, args.query_file))
    if train is None or query is None:
        raise DataError(f"--train_file and --query_file are files of chats; {chats.STDLIB} is none")
    model, tokenizer = options.model_on_device(args, stdlib_qa.texts, args.max_length)
    model = model.to(getattr(torch, args.dtype)).requires_grad_(False).eval()
    adapter = options.adapter(args)
    loss = lm_loss(model, adapter=adapter, mask=causal)
    collator = Collator(tokenizer.pad_token_id)

    def prepared(records: Sequence[dict[str, Any]]) -> list[Any]:
        samples = encode_chats(records, tokenizer, max_length=args.max_length, strict=True).samples
        if len(samples) != len(records):
            raise DataError(
                f"{len(records) - len(samples)} chats have no answer within --max_length "
                f"{args.max_length}: rows would no longer be those of the file. Remove them, or "
                "raise --max_length."
            )
        return [
            loss.prepare({k: v.to(args.device) for k, v in collator([s]).items()}) for s in samples
        ]

    train = train[: args.max_train_samples]
    rows, queries = prepared(train), prepared(query)

    def losses(fast: Params, batch: list[Any]) -> Tensor:
        return torch.stack([loss(fast, {}, one) for one in batch])

    start = adapter.init(model, torch.Generator().manual_seed(args.seed))
    # A trial, the run, and the backward pass, which rebuilds its steps.
    total = 2 * args.max_steps + 1
    with tqdm(total=total, desc="steps", disable=not sys.stderr.isatty()) as bar:

        def collate(chosen: list[Any]) -> list[Any]:
            bar.update()
            return [one for _, (one,) in chosen]

        stream = Batches.from_dataset(
            _Rows(rows),
            batch_size=args.per_device_train_batch_size,
            steps=args.max_steps,
            generator=torch.Generator().manual_seed(args.seed),
            collate=collate,
        )
        found = attribution(
            losses,
            lambda: {k: v.to(getattr(torch, args.dtype)) for k, v in start.items()},
            stream,
            queries,
            solver=SGD(args.learning_rate, args.max_steps, momentum=0.9)
            if args.optim == "sgd"
            else Adam(args.learning_rate, args.max_steps),
            estimator=Unrolled(store=store),
            runs_at_once=1,
        )
    scores = found.scores.double()
    checked = _left_out(args, found, scores)
    report = {
        "scores": scores.tolist(),
        "losses": found.losses.tolist(),
        "leave_one_out": checked,
        "settings": options.as_record(args),
        "environment": environment(next(model.parameters()).dtype),
    }
    page = _page(scores, found.losses.tolist(), train, query, checked)
    with saving(directory, "the scores"):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / REPORT, report)
        write_whole(directory / PAGE, page)
    print(page)
    print(f"wrote {directory / REPORT}, {directory / PAGE}")


class _Rows:
    """Prepared chats as a data set whose rows are kept as they are."""

    def __init__(self, rows: list[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Any]:
        # A tuple, as rows that are dicts gain an index.
        return (self.rows[i],)


def _store(word: str) -> stores.Store:
    name, _, value = word.partition("=")
    if name == "disk" and value:
        return stores.disk(value)
    if name == "schedule" and value.isdecimal() and int(value):
        return stores.schedule(int(value))
    if word in ("device", "cpu"):
        return stores.device() if word == "device" else stores.cpu()
    raise DataError(f"--store {word!r} is unknown: device, cpu, disk=DIR or schedule=SLOTS")


def _left_out(args: argparse.Namespace, found: Attribution, scores: Tensor) -> Any:
    """Return how well scores rank the losses of runs without one chat; None where not asked."""
    size = found.scores.shape[1]
    number = min(args.leave_one_out, size)
    if number < 2:
        return None
    chosen = torch.linspace(0, size - 1, number).round().long()
    weights = found.scores.new_ones(number, size)
    weights[torch.arange(number), chosen] = 0
    losses = found.retrained(weights)
    each = [
        spearman(-score[chosen], loss).item() for score, loss in zip(scores, losses.T, strict=True)
    ]
    return {"chats": chosen.tolist(), "losses": losses.tolist(), "spearman": each}


def _page(
    scores: Tensor,
    losses: list[float],
    train: Sequence[Any],
    query: Sequence[Any],
    checked: Any,
) -> str:
    """Return the scores as Markdown: for each query the chats that helped and harmed most."""
    shown = min(SHOWN, scores.shape[1])
    lines = ["# Which training chats helped", ""]
    lines += [
        "A score is the derivative of the query's loss by the weight of a chat: negative helped, "
        "positive harmed.",
        "",
    ]
    for i, (score, loss) in enumerate(zip(scores, losses, strict=True)):
        lines += [f"## Query {i}: {_text(query[i])}", "", f"Loss after training: {loss:.4f}"]
        if checked:
            lines += [f"Spearman with leaving one out: {checked['spearman'][i]:.3f}"]
        order = score.argsort()
        for title, part in (("Helped", order[:shown]), ("Harmed", order.flip(0)[:shown])):
            lines += ["", f"| {title} | score | chat |", "|---|---|---|"]
            lines += [f"| {j} | {score[j]:+.2e} | {_text(train[j])} |" for j in part.tolist()]
        lines += [""]
    return "\n".join(lines)


def _text(chat: Any, size: int = 70) -> str:
    """Return the end of the last question: what comes before is often the same in many chats."""
    asked = [m["content"] for m in chat.get("messages", ()) if m["role"] == "user"]
    last = asked[-1] if asked else chat.get("text", "")
    text = " ".join(str(last).split()).replace("|", "/")
    return text if len(text) <= size else "..." + text[3 - size :]
