"""Encodes records: finds their format, splits chats, and spreads the work over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any

import torch

from metafocus.data.chat import Encoder, Made
from metafocus.data.formats import as_chat
from metafocus.data.messages import (
    Message,
    check_messages,
    from_arrow,
    is_trained,
    up_to,
    without_nulls,
)
from metafocus.data.plain import encode_plain
from metafocus.errors import DataError

_AT_ONCE = 256


class Encoders:
    """Encodes records of all formats, with an encoder for each set of variables of the template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        merge_context: whether consecutive non-assistant messages form one turn.
        variables: more variables of the template.
        arrow: whether the records are rows of Arrow, with null for keys that others have.
        turns: which answers are trained, and in which chats.

    Raises:
        DataError: if the tokenizer cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        merge_context: bool,
        variables: Mapping[str, Any] | None,
        arrow: bool,
        turns: str,
    ):
        self._tokenizer, self._merge_context = tokenizer, merge_context
        self._variables, self._arrow, self._turns = variables, arrow, turns
        self._made: dict[str, Encoder] = {}
        if not hasattr(tokenizer, "apply_chat_template") or tokenizer.chat_template:
            # This raises for what cannot be used. Texts need no template.
            self._of({})

    def _of(self, record: Mapping[str, Any]) -> Encoder:
        own = record.get("chat_template_kwargs")
        key = repr(own) if own else ""
        if key not in self._made:
            variables = {**(self._variables or {}), **own} if own else self._variables
            self._made[key] = Encoder(self._tokenizer, self._merge_context, variables)
        return self._made[key]

    def encode(
        self, records: Iterable[tuple[int, Any]]
    ) -> Iterator[tuple[int, list[Made] | DataError]]:
        """Yield the index of each record and what was made of it."""
        rest = iter(records)
        while batch := list(islice(rest, _AT_ONCE)):
            made: dict[int, list[Made] | DataError] = {i: [] for i, _ in batch}
            parts: dict[int, tuple[Encoder, list[tuple[int, Any, Any]]]] = {}
            for i, record in batch:
                try:
                    self._begin(i, record, made, parts)
                except DataError as error:
                    made[i] = error
            for encoder, chats in parts.values():
                found = encoder.encode_all([(messages, tools) for _, messages, tools in chats])
                for (i, *_), one in zip(chats, found, strict=True):
                    others = made[i]
                    if isinstance(others, list):
                        made[i] = one if isinstance(one, DataError) else [*others, one]
            yield from made.items()

    def _begin(
        self,
        i: int,
        record: Any,
        made: dict[int, list[Made] | DataError],
        parts: dict[int, tuple[Encoder, list[tuple[int, Any, Any]]]],
    ) -> None:
        """Encode a record that is not a chat, or note the chats of a record for its encoder."""
        if not isinstance(record, Mapping):
            raise DataError(f"{record!r:.80} is not a dict with messages")
        record = as_chat(without_nulls(record) if self._arrow else record)
        if "messages" not in record:
            made[i] = [Made(encode_plain(record, self._tokenizer), 0, 0)]
            return
        messages = record["messages"]
        if isinstance(messages, list) and from_arrow(messages):
            record = without_nulls(record)
            messages = record["messages"]
        check_messages(messages)
        encoder = self._of(record)
        _, chats = parts.setdefault(id(encoder), (encoder, []))
        chats += [(i, chat, record.get("tools")) for chat in _split(messages, self._turns)]


def _split(messages: Sequence[Message], turns: str) -> list[Sequence[Message]]:
    """Return the chats to encode for one chat."""
    trained = [i for i, message in enumerate(messages) if is_trained(message)]
    if turns == "as_rendered" or not trained:
        return [messages]
    return [up_to(messages, i) for i in (trained if turns == "each" else trained[-1:])]


# Several processes -------------------------------------------------------------------------------

_worker: Encoders | None = None


def in_processes(
    encoders: Encoders, records: Iterable[Any], count: int
) -> Iterator[tuple[int, list[Made] | DataError]]:
    """Yield what `encoders.encode` yields, from several processes."""
    numbered = iter(enumerate(records))
    chunks = iter(lambda: list(islice(numbered, _AT_ONCE)), [])
    # A fork would copy the locks of threads that work here, those of torch and of the tokenizer.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _start, (encoders,)) as pool:
        for found in pool.map(_work, chunks):
            for i, made in found:
                yield i, made if isinstance(made, DataError) else [_tensors(one) for one in made]


def _start(encoders: Encoders) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = encoders


def _work(chunk: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    assert _worker is not None, "_start ran first"
    # Arrays are sent, because each tensor would need a file descriptor, and there are few of these.
    return [
        (i, made if isinstance(made, DataError) else [_arrays(one) for one in made])
        for i, made in _worker.encode(chunk)
    ]


def _arrays(made: Made) -> Any:
    return made._replace(sample={k: v.numpy() for k, v in made.sample.items()})


def _tensors(made: Any) -> Made:
    return made._replace(sample={k: torch.from_numpy(v) for k, v in made.sample.items()})
