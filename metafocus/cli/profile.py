"""`metafocus profile`: numbers and figures of where a model looks: sinks, context, evidence."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from metafocus.cli import chats, options
from metafocus.cli.shares import Ranks, ranks
from metafocus.comparison.inner_curve import shown
from metafocus.comparison.report import environment
from metafocus.data import Collator, encode_chats, stdlib_qa
from metafocus.diagnostics import AttentionProfile, attention_profile, plot_comparison
from metafocus.diagnostics.plots import MOST
from metafocus.engine import adapt
from metafocus.errors import DataError
from metafocus.files import write_whole
from metafocus.lm import Batch
from metafocus.lm.per_example import PerExampleSolver, mean_loss
from metafocus.masks import MaskPolicy
from metafocus.models import described
from metafocus.problem import trainable
from metafocus.recipes._focusft import focusft_problem
from metafocus.trainer.checkpoints import saving
from metafocus.trainer.names import MASKS, TOKENS, named

REPORT = "profile.json"
SUFFIXES = (".png", ".svg")
INNER_TOKENS = {name: TOKENS[name] for name in ("answer", "context")}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "profile",
        help="measure and draw where a model looks: sinks, context, evidence",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--train_file", default=chats.STDLIB, help="FILE.jsonl, FILE.parquet or stdlib (default)"
    )
    options.add_whole(parser, "--max_train_samples", 4, "number of chats")
    options.add_whole(parser, "--max_length", 512, "largest number of tokens of a chat", least=2)
    options.add_whole(parser, "--stdlib_turns", 1, "number of questions in a chat of stdlib")
    parser.add_argument(
        "--mask",
        default="causal,context-bidirectional",
        help=f"masks to profile, separated by commas: {', '.join(MASKS)}; default "
        "%(default)s: as deployed and as trained",
    )
    parser.add_argument(
        "--adapt",
        action="store_true",
        help="profile each mask a second time, with fast weights adapted to each chat",
    )
    parser.add_argument(
        "--inner_tokens",
        default="answer",
        help=f"what --adapt learns: {', '.join(INNER_TOKENS)}; default %(default)s",
    )
    parser.add_argument(
        "--layer", type=options.whole(0), help="layer of the heat maps; default the middle one"
    )
    parser.add_argument(
        "--output_dir", required=True, help="directory of profile.json and of the figures"
    )
    options.add_model(parser)
    options.add_inner(parser, fraction=0.35, rank=32)


def run(args: argparse.Namespace) -> None:
    """Profile, print, write."""
    if not args.adapt:
        names = ("inner_tokens", *options.INNER)
        options.note_unused(args, names, "without --adapt")
    directory = options.directory(args.output_dir)
    chosen = {name: named("mask", name, MASKS) for name in options.words(args.mask)}
    cells = len(chosen) * (1 + args.adapt)
    if not 1 <= cells <= MOST:
        raise DataError(
            f"--mask {args.mask!r} makes {cells} profiles{' with --adapt' * args.adapt}; figures "
            f"show 1 to {MOST}: name fewer masks."
        )
    named("inner_tokens", args.inner_tokens, INNER_TOKENS)
    group = ranks()
    args.device = group.device(args.device)
    records = chats.read(args.train_file)
    asked = args.model_name_or_path is None or "max_length" in args.given
    longest = args.max_length if asked else 1
    model, tokenizer = options.model_on_device(args, stdlib_qa.texts, longest)
    if not asked:
        positions = model.config.get_text_config().max_position_embeddings
        args.max_length = min(args.max_length, positions)
    batch = _batch(args, records, tokenizer)
    _check_layer(args, model)
    real = batch["attention_mask"].sum(-1).tolist()
    if group.first:
        print(f"{described(model)}\n{len(real)} chats of {min(real)} to {max(real)} tokens")

    profiles: dict[str, AttentionProfile] = {}
    losses: dict[str, list[float]] = {}
    for name, profile, inner in _shared(args, model, batch, chosen, group):
        profiles[name] = profile
        note = ""
        if inner is not None:
            losses[name] = inner
            note = f" (inner {shown(inner)})"
        print(f"\n{name}, answer queries{note}\n{profile.table()}", flush=True)
    if not group.first:
        return
    if len(profiles) > 1:
        print(f"\nmeans over layers, answer queries\n{_means(profiles)}")
    report = {
        "profiles": {name: profile.to_dict() for name, profile in profiles.items()},
        "inner_losses": losses,
        "settings": options.as_record(args),
        "environment": environment(next(model.parameters()).dtype),
    }
    with saving(directory, "the profiles"):
        directory.mkdir(parents=True, exist_ok=True)
        written = [*_figures(profiles, directory, args.layer), directory / REPORT]
        write_whole(directory / REPORT, json.dumps(report, indent=1) + "\n")
    print("\nwrote " + ", ".join(str(path) for path in written))


def _batch(args: argparse.Namespace, records: chats.Chats | None, tokenizer: Any) -> Batch:
    if records is None:
        records = chats.documentation(
            tokenizer,
            split="heldout",
            n=args.max_train_samples,
            max_length=args.max_length,
            seed=args.seed,
            turns=args.stdlib_turns,
        )
    else:
        options.note_unused(args, ("stdlib_turns",), "without --train_file stdlib")
    samples = encode_chats(records, tokenizer, max_length=args.max_length).samples
    if len(samples) < args.max_train_samples and "max_train_samples" in args.given:
        raise DataError(
            f"--max_train_samples {args.max_train_samples} is more than the {len(samples)} chats "
            "with an answer in --train_file."
        )
    batch = Collator(pad_token_id=tokenizer.pad_token_id)(samples[: args.max_train_samples])
    return {name: value.to(args.device) for name, value in batch.items()}


def _check_layer(args: argparse.Namespace, model: Any) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    if args.layer is not None and args.layer >= layers:
        raise DataError(
            f"--layer {args.layer}: the model has {layers} layers, counted from 0; use at most "
            f"--layer {layers - 1}."
        )


def _shared(
    args: argparse.Namespace,
    model: Any,
    batch: Batch,
    chosen: dict[str, MaskPolicy],
    group: Ranks,
) -> Iterator[tuple[str, AttentionProfile, list[float] | None]]:
    """Yield what `_profiles` does, on the first process; each process profiles some masks."""
    if group.count == 1:
        yield from _profiles(args, model, batch, chosen)
        return
    names = list(chosen)
    own = list(_profiles(args, model, batch, {name: chosen[name] for name in group.mine(names)}))
    found = [one for part in group.gathered(own) for one in part]
    if group.first:
        yield from sorted(found, key=lambda one: names.index(one[0].removesuffix(", adapted")))


def _profiles(
    args: argparse.Namespace, model: Any, batch: Batch, chosen: dict[str, MaskPolicy]
) -> Iterator[tuple[str, AttentionProfile, list[float] | None]]:
    """Yield name, profile and, where weights were adapted, the mean inner losses.

    They are those before each step, and the one after the last step.
    """
    tokens = INNER_TOKENS[args.inner_tokens]
    for word, mask in chosen.items():
        yield word, attention_profile(model, batch, mask=mask), None
        if not args.adapt:
            continue
        adapter = options.adapter(args)
        problem = focusft_problem(
            model,
            adapter=adapter,
            mask=mask,
            inner_tokens=tokens,
            examples=len(batch["input_ids"]),
        )
        # Fast weights of each chat's own, as if it were alone.
        solver = PerExampleSolver(options.solver(args))
        solution = adapt(problem, trainable(model), batch, solver=solver)
        fast = solution.params
        profile = attention_profile(model, batch, mask=mask, adapter=adapter, fast=fast)
        with torch.no_grad():
            after = problem.inner_loss(fast, {}, batch)
        curve = torch.cat((solution.losses, after[None]))
        yield f"{word}, adapted", profile, mean_loss(curve, tokens, batch).tolist()


def _means(profiles: dict[str, AttentionProfile]) -> str:
    rows = {name: profile.summary() for name, profile in profiles.items()}
    heads = list(next(iter(rows.values())))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {head.replace('_', ' '):>18}" for head in heads)]
    for name, means in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"  {means[head]:>18.4f}" for head in heads))
    return "\n".join(lines)


def _figures(
    profiles: dict[str, AttentionProfile], directory: Path, layer: int | None
) -> Iterator[Path]:
    for suffix in SUFFIXES:
        for name, profile in profiles.items():
            path = directory / f"{name.replace(', ', '-')}{suffix}"
            profile.plot(path, layer=layer)
            yield path
        if len(profiles) > 1:
            path = directory / f"comparison{suffix}"
            plot_comparison(profiles, path, layer=layer)
            yield path
