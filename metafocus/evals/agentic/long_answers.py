"""Long-context questions that a server answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from metafocus.evals.agentic.endpoints import TooLong
from metafocus.evals.agentic.http_endpoint import HTTPEndpoint
from metafocus.evals.asking import ask_all
from metafocus.evals.items import Item
from metafocus.evals.thinking import split_thoughts


def endpoint_answers(
    endpoint: HTTPEndpoint,
    items: Sequence[Item],
    each: Callable[[Mapping[int, str]], None],
    *,
    concurrency: int = 1,
    thinking: int = 0,
) -> None:
    """Ask a server long-context questions; `each` gets the answers by the number of their item.

    A chat cannot begin the answer of a server, so the first words of an answer follow the question,
    as in RULER's own client. A prompt that the server finds too long has the answer "". The seed of
    every request is 0.

    Args:
        endpoint: the server.
        items: the questions.
        each: called after each answer.
        concurrency: the largest number of requests at the same time.
        thinking: the number of tokens that a reply may have in addition, for its reasoning.
    """

    def ask(i: int) -> str:
        item = items[i]
        text = f"{item.prompt}\n{item.answer_prefix}" if item.answer_prefix else item.prompt
        chat = [{"role": "user", "content": text}]
        try:
            reply = endpoint(chat, seed=0, new_tokens=item.new_tokens + thinking)
        except TooLong:
            return ""
        return split_thoughts(reply)[1]

    ask_all(range(len(items)), ask, lambda i, text: each({i: text}), concurrency=concurrency)
