"""One question of an evaluation: its prompt, its references, and the places of the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metafocus.checks import whole
from metafocus.data import encode_chat
from metafocus.errors import DataError
from metafocus.files import write_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Count = Callable[[str], int]


@dataclass(frozen=True)
class Item:
    """A question with its long context, as a prompt for evaluation and as a chat for training.

    `prompt` is the whole user message. `answer_prefix` holds the words that the answer must begin
    with (it is empty for BABILong). `answer` is the assistant message for training, including the
    prefix. `evidence` has character spans [start, stop) of the prompt, and `depths` says for each
    of them where it begins in the context, from 0 to 1. If `aligned`, evidence i supports reference
    i. `labels` has the words that the official BABILong scorer looks for.
    """

    suite: str
    task: str
    length: int
    prompt: str
    question: str
    answer: str
    references: tuple[str, ...]
    new_tokens: int
    answer_prefix: str = ""
    evidence: tuple[tuple[int, int], ...] = ()
    depths: tuple[float, ...] = ()
    aligned: bool = False
    labels: tuple[str, ...] = ()

    def chat(self) -> dict[str, Any]:
        """Return the record that `metafocus train` and `encode_chats` read."""
        user: dict[str, Any] = {"role": "user", "content": self.prompt}
        if self.evidence:
            user["evidence"] = [list(span) for span in self.evidence]
        return {
            "messages": [user, {"role": "assistant", "content": self.answer}],
            "suite": self.suite,
            "task": self.task,
            "length": self.length,
            "depth": list(self.depths),
        }

    def record(self) -> dict[str, Any]:
        """Return everything except the long prompt, as needed for scoring."""
        found = asdict(self)
        del found["prompt"]
        return found


def token_windows(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Return the runs [start, stop) of evidence tokens in the encoded chat: its `needle_mask`."""
    if not item.evidence:
        return []
    mask = encode_chat(item.chat()["messages"], tokenizer)["needle_mask"].tolist()
    edges = [
        i for i, (a, b) in enumerate(zip([False, *mask], [*mask, False], strict=True)) if a - b
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def write_chats(items: Iterable[Item], path: str | Path) -> None:
    """Write the items as training chats, one JSON object per line."""
    write_json_lines(path, (item.chat() for item in items))


def counter(tokenizer: PreTrainedTokenizerBase | Count) -> Count:
    """Return a function that counts tokens, from a tokenizer or from such a function."""
    if not hasattr(tokenizer, "encode"):
        return tokenizer  # pyright: ignore[reportReturnType]
    encode: Any = tokenizer
    return lambda text: len(encode.encode(text, add_special_tokens=False, verbose=False))


def check_request(tasks: tuple[str, ...], task: str, length: int, n: int) -> None:
    """Raise for a request that no generator can serve.

    Raises:
        DataError: if the task is unknown, the length is negative, or `n` is below 1.
    """
    if task not in tasks:
        raise DataError(f"task={task!r} is unknown: use one of {', '.join(tasks)}")
    whole("length", length, error=DataError)
    whole("n", n, 1, error=DataError)
