"""One trial at a question: replies and calls of the tool, until an answer or a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from metafocus.checks import whole
from metafocus.errors import DataError, MetafocusError
from metafocus.evals.agentic.endpoints import Endpoint, Message, TooLong
from metafocus.evals.agentic.letters import LETTERS, answer_letter
from metafocus.evals.agentic.questions import Choice
from metafocus.evals.agentic.sandbox import Ran
from metafocus.evals.agentic.tool_calls import tool_call
from metafocus.evals.thinking import split_thoughts

Tool = Callable[[str], Ran]

_FORM = "End with a line of the form: Answer: LETTER"
_TOOL = (
    "You may run Python, at most {calls} times. To do so, write one block that begins with "
    "```python and ends with ```, and stop: the next message shows what it printed. Every run "
    "starts anew. There is no network."
)
_SPENT = "No runs are left: answer now."
_REMIND = f"I found no answer. {_FORM}"


@dataclass(frozen=True)
class Attempt:
    """The result of one trial.

    Attributes:
        answer: the letter of the answer; None without an answer.
        correct: whether the answer is right.
        calls: how often the tool was called, including calls that could not be run.
        ended: "answered", "no answer", or "too long" if the chat became too long for the model.
        messages: the whole chat. A reply is cut where its first call ends, because the text after
            it was written without the output. Reasoning is not part of it.
        runs: the result of each call: exit status, the limit that stopped it, seconds. None if
            it could not be run.
        thoughts: the reasoning of each reply, or "".
    """

    answer: str | None
    correct: bool
    calls: int
    ended: str
    messages: tuple[Message, ...]
    runs: tuple[dict[str, Any] | None, ...]
    thoughts: tuple[str, ...] = ()

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Attempt:
        """Return an attempt from its record in JSON, which has lists for tuples."""
        found: dict[str, Any] = {field.name: record[field.name] for field in fields(cls)}
        for name in ("messages", "runs", "thoughts"):
            found[name] = tuple(found[name])
        return cls(**found)


def play(
    endpoint: Endpoint, question: Choice, *, tool: Tool | None = None, calls: int = 5, seed: int = 0
) -> Attempt:
    """Ask a question and run the code of each reply, until a reply without code has an answer.

    Reasoning is removed from each reply first: it is neither scored nor executed. If a reply has
    neither code nor an answer, the model is asked once more. After the last call the next reply
    counts in any case, so there are at most `calls + 2` replies.

    Args:
        endpoint: the endpoint that replies.
        question: the question.
        tool: such as `run_python`; None for a chat without a tool.
        calls: the largest number of calls of the tool.
        seed: the seed of this trial; each reply gets a seed of its own.

    Raises:
        DataError: if `calls` is negative, or if the tool raises it because it can run nothing here.

    Example:
        >>> from metafocus.evals.agentic import Choice, play
        >>> question = Choice("What is 2 + 2?", ("3", "4"), answer=1)
        >>> play(lambda messages, seed: "It is four. Answer: B", question).correct
        True
    """
    whole("calls", calls, error=DataError)
    left = calls if tool is not None else 0
    messages: list[Message] = [{"role": "user", "content": _first(question, left)}]
    runs: list[dict[str, Any] | None] = []
    thoughts: list[str] = []
    letter, reminded, ended = None, False, "no answer"
    for turn in range(left + 2):
        try:
            reply = endpoint(tuple(messages), seed=seed * 1_000_003 + turn)
        except TooLong:
            ended = "too long"
            break
        thought, reply = split_thoughts(reply)
        thoughts.append(thought)
        call = tool_call(reply) if left else None
        if call is not None and tool is not None:
            left -= 1
            messages.append({"role": "assistant", "content": reply[: call.stop]})
            ran, shown = (None, call.fault) if call.code is None else _run(tool, call.code)
            runs.append(_how(ran))
            messages.append({"role": "user", "content": shown if left else f"{shown}\n\n{_SPENT}"})
            continue
        messages.append({"role": "assistant", "content": reply})
        letter = answer_letter(reply, len(question.choices))
        if letter or reminded:
            break
        reminded = True
        messages.append({"role": "user", "content": _REMIND})
    return Attempt(
        answer=letter,
        correct=letter == question.letter,
        calls=len(runs),
        ended="answered" if letter else ended,
        messages=tuple(messages),
        runs=tuple(runs),
        thoughts=tuple(thoughts),
    )


def _first(question: Choice, calls: int) -> str:
    letters = LETTERS[: len(question.choices)]
    parts = [
        f"Answer the following question with one of the letters {letters[0]} to {letters[-1]}."
    ]
    if calls:
        parts.append(_TOOL.format(calls=calls))
    return "\n\n".join([*parts, question.prompt, _FORM])


def _run(tool: Tool, code: str) -> tuple[Ran | None, str]:
    """Run a program; a tool that breaks costs one call and not the evaluation."""
    try:
        ran = tool(code)
    except MetafocusError:
        raise  # it can run no program at all, such as without a wall
    except Exception as error:
        return None, f"The tool failed ({type(error).__name__}: {error!s:.200})."
    return ran, f"Output:\n{ran.text}"


def _how(ran: Ran | None) -> dict[str, Any] | None:
    if ran is None:
        return None
    return {"code": ran.code, "stopped": ran.stopped, "seconds": round(ran.seconds, 3)}
