"""The call of the Python tool in a reply, in the forms in which models write it."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import textwrap
from dataclasses import dataclass
from typing import Any

_PYTHON = ("python", "python3", "py", "py3", "ipython", "tool_code", "code_interpreter")
_NAMES = (*_PYTHON, "run_python", "execute_python", "python_interpreter")
_KEYS = ("code", "source", "script", "input", "query")
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*(\{?\.?[\w+\-]*\}?)[^\n]*\n?", re.MULTILINE)
_TAG = re.compile(r"<tool_call>\s*|<\|python_tag\|>")
_END = re.compile(r"\s*</tool_call>|<\|eom_id\|>|<\|eot_id\|>")


@dataclass(frozen=True)
class Call:
    """A call in a reply.

    Attributes:
        code: the program, or None if it cannot be run.
        stop: where the call ends in the reply.
        fault: why it cannot be run, as a sentence for the model.
    """

    code: str | None
    stop: int
    fault: str = ""


def tool_call(reply: str) -> Call | None:
    r"""Return the first call of the tool in a reply, or None.

    A call is a fenced block of Python (also indented, with `~~~`, or marked `python3` or
    `tool_code`), a fenced block without a language that is Python and calls something, the JSON of
    `<tool_call>`, or what follows `<|python_tag|>`. A call that has no end, is no JSON or names
    another tool is returned without code, so that it is counted.

    Example:
        >>> from metafocus.evals.agentic.tool_calls import tool_call
        >>> tool_call("Let me see.\n  ```python3\n  print(1)\n  ```\nDone.").code
        'print(1)'
    """
    found = [call for call in (_fenced(reply), _tagged(reply)) if call is not None]
    return min(found)[1] if found else None


def _fenced(reply: str) -> tuple[int, Call] | None:
    at = 0
    while opened := _FENCE.search(reply, at):
        word = opened[3].strip("{}.").lower()
        mark = re.escape(opened[2][0]) + "{" + str(len(opened[2])) + ",}"
        # The closing fence may also stand at the end of the last line of code.
        closing = re.compile(rf"(?:^[ \t]*)?{mark}", re.MULTILINE)
        closed = closing.search(reply, opened.end())
        if closed is None:
            fault = "The block of code has no end (```), so nothing was run."
            return (opened.start(), Call(None, len(reply), fault)) if word in _PYTHON else None
        code = _dedented(reply[opened.end() : closed.start()])
        if word in _PYTHON or (not word and _calls_something(code)):
            return opened.start(), Call(code, closed.end())
        at = closed.end()
    return None


def _tagged(reply: str) -> tuple[int, Call] | None:
    opened = _TAG.search(reply)
    if opened is None:
        return None
    body = reply[opened.end() :]
    if opened[0].startswith("<tool_call>") or body.lstrip().startswith("{"):
        code, used, fault = _from_json(body)
    else:
        end = _END.search(body)
        used = end.start() if end else len(body)
        code, fault = _dedented(body[:used]), ""
    end = _END.match(reply, opened.end() + used)
    stop = end.end() if end else opened.end() + used
    return opened.start(), Call(code, stop, fault)


def _from_json(text: str) -> tuple[str | None, int, str]:
    """Return the code of a call in JSON, the number of characters that were read, and the fault."""
    start = len(text) - len(text.lstrip())
    try:
        value, stop = json.JSONDecoder(strict=False).raw_decode(text, start)
        given = _object(value.get("arguments", value.get("parameters")))
        name = str(value.get("name", "")).lower()
    except (ValueError, AttributeError, RecursionError):
        end = _END.search(text)
        used = end.start() if end else len(text)
        return None, used, "The tool call is not complete JSON, so nothing was run."
    if name not in _NAMES:
        return None, stop, f"There is no tool {name!r:.40}: the only one is 'python'."
    code = given
    if isinstance(given, dict):
        code = next((given[key] for key in _KEYS if key in given), None)
    if not isinstance(code, str):
        return None, stop, "The tool call has no 'code', so nothing was run."
    return _dedented(code), stop, ""


def _object(given: Any) -> Any:
    """Return arguments as an object; servers send them as a string of JSON."""
    with contextlib.suppress(ValueError, TypeError):
        return json.loads(given, strict=False)
    return given


def _dedented(code: str) -> str:
    code = textwrap.dedent(code.replace("\r\n", "\n")).strip("\n")
    return code.rstrip()


def _calls_something(code: str) -> bool:
    """Return whether a text is Python that can have an effect; `Answer: B` is valid Python too."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.Call) for node in ast.walk(tree))
