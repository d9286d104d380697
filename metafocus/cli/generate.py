"""`metafocus generate`: a greedy answer, with the prompt read as deployed or as in training."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from metafocus.cli import options
from metafocus.errors import DataError
from metafocus.lm import prefilled
from metafocus.models import described
from metafocus.trainer.names import MASKS, named


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "generate",
        help="answer a question, with the prompt read causally or as in training",
        description=__doc__,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--prompt", required=True, help="what the user says")
    parser.add_argument("--system", help="what the system message says")
    parser.add_argument(
        "--mask",
        default="causal",
        help=f"which keys a token of the prompt sees: {', '.join(MASKS)}; several, separated by "
        "commas, answer one after the other; a server is causal; default %(default)s",
    )
    options.add_whole(parser, "--max_new_tokens", 64, "largest number of tokens of an answer")
    options.add_model(parser, small=False)


def run(args: argparse.Namespace) -> None:
    """Answer under each mask."""
    masks = {name: named("mask", name, MASKS) for name in options.words(args.mask)}
    if not masks:
        raise DataError(f"--mask is empty: use some of {', '.join(MASKS)}.")
    model, tokenizer = options.model_on_device(args, lambda: (), 0)
    chat = [{"role": "system", "content": args.system}] if args.system else []
    chat.append({"role": "user", "content": args.prompt})
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(args.device)
    print(described(model))
    for name, mask in masks.items():
        read = prefilled(model, dict(prompt), mask)
        with torch.no_grad():
            tokens = model.generate(
                **read,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
        print(f"--- prompt read under the mask {name}:\n{answer}", flush=True)
