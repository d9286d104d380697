"""The time to encode many chats, against plain passes of the tokenizer's chat template.

    python benchmarks/chat_encoding.py --chats 10000 --template TEMPLATE.jinja

It prints the seconds of one pass of `apply_chat_template`, of `encode_chats` in one process, and of
a second pass of the template, because a machine that others use changes its speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metafocus.data import encode_chats, train_tokenizer

WORDS = (
    "a chat of some length about words that the tokenizer has merges for and the number of each"
).split()


def chats(count: int, pairs: int) -> list[dict[str, Any]]:
    """Return chats of `pairs` questions and answers, no two alike."""
    return [
        {
            "messages": [
                {"role": role, "content": f"{i} {k} " + " ".join(WORDS[(i + k) % 5 :] * 2)}
                for k in range(pairs)
                for role in ("user", "assistant")
            ]
        }
        for i in range(count)
    ]


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a function takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=4, help="questions and answers of a chat")
    parser.add_argument("--template", type=Path, help="file; default: ChatML, the shortest one")
    args = parser.parse_args(argv)
    records = chats(args.chats, args.pairs)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 9, 400)
    if args.template:
        tokenizer.chat_template = args.template.read_text(encoding="utf-8")

    def plain() -> None:
        for record in records:
            tokenizer.apply_chat_template(record["messages"], tokenize=True)

    samples = encode_chats(records[:100], tokenizer).samples
    before = seconds(plain)
    ours = seconds(lambda: encode_chats(records, tokenizer))
    after = seconds(plain)
    size = sum(len(sample["input_ids"]) for sample in samples) / len(samples)
    print(
        f"{args.chats} chats of {args.pairs} questions and answers, {size:.0f} tokens each: "
        f"apply_chat_template {before:.1f} s, encode_chats {ours:.1f} s, apply_chat_template "
        f"{after:.1f} s: {ours / before:.2f} and {ours / after:.2f} times"
    )


if __name__ == "__main__":
    main()
