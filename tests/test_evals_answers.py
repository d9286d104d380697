"""How replies are read: letters, calls of the tool, and reasoning."""

from __future__ import annotations

import pytest
from answer_forms import FORMS

from metafocus.evals.agentic import answer_letter
from metafocus.evals.agentic.tool_calls import Call, tool_call
from metafocus.evals.thinking import split_thoughts


@pytest.mark.parametrize(("text", "letter", "reason"), FORMS)
def test_the_letter_of_an_answer(text, letter, reason):
    assert answer_letter(text, 4) == letter, reason


def test_the_table_is_long_and_says_each_form_once():
    texts = [text for text, _, _ in FORMS]
    assert len(texts) == len(set(texts)) and len(texts) >= 80
    assert all(reason for _, _, reason in FORMS)


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
def test_every_letter_in_every_form_of_the_table(letter):
    """A form that is read as one letter is read as any other, except where letters are words."""
    for text, right, reason in FORMS:
        if right is None or text.count(right) + text.count(right.lower()) > 1:
            continue
        if any(other in text for other in set("ABCDEFGHIJ") - {right}):
            continue
        text = text.replace(right, letter).replace(f"({right.lower()})", f"({letter.lower()})")
        if letter in text:
            assert answer_letter(text, 10) == letter, (text, reason)


def test_long_replies_are_read_too():
    """A regular expression that backtracks would not come back from these."""
    for piece in ("or ", "A or ", "answer is ", "Answer: ", "(", "\\text{", "so ", "```", "**"):
        answer_letter(piece * 4_000, 4)
        tool_call(piece * 4_000)
        split_thoughts(piece * 4_000)


RUN = "print(6 * 7)"
JSON = '{"name": "python", "arguments": {"code": "print(6 * 7)"}}'


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (f"```python\n{RUN}\n```", RUN),
        (f"```py\n{RUN}\n```", RUN),
        (f"```python3\n{RUN}\n```", RUN),
        (f"```Python\n{RUN}\n```", RUN),
        (f"```tool_code\n{RUN}\n```", RUN),
        (f"```{{python}}\n{RUN}\n```", RUN),
        (f"```{{.python}}\n{RUN}\n```", RUN),
        (f"```python title=x\n{RUN}\n```", RUN),
        (f"``` python \n{RUN}```", RUN),
        (f"````python\n{RUN}\n````", RUN),
        (f"~~~python\n{RUN}\n~~~", RUN),
        (f"~~~\n{RUN}\n~~~", RUN),
        (f"```\n{RUN}\n```", RUN),
        (f"```python\r\n{RUN}\r\n```\r\n", RUN),
        (f"1. Run it:\n   ```python\n   {RUN}\n   ```", RUN),
        ("   ```python\n   if True:\n       print(1)\n   ```", "if True:\n    print(1)"),
        ("```python\n\n\n  print(1)\n  print(2)\n```", "print(1)\nprint(2)"),
        (f"\t```python\n\t{RUN}\n\t```", RUN),
        (f"```text\nno code\n```\n```python\n{RUN}\n```", RUN),
        (f"```python\n{RUN}\n```\n```python\nprint(2)\n```", RUN),
        ("```python\nx = '~~~'\nprint(x)\n```", "x = '~~~'\nprint(x)"),
        (f"<tool_call>\n{JSON}\n</tool_call>", RUN),
        (f"<tool_call>{JSON}", RUN),
        (f"<tool_call>{JSON.replace('arguments', 'parameters')}</tool_call>", RUN),
        ('<tool_call>{"name": "python", "arguments": "{\\"code\\": \\"1\\"}"}</tool_call>', "1"),
        (
            '<tool_call>{"name": "code_interpreter", "arguments": "print(1)"}</tool_call>',
            "print(1)",
        ),
        ('<tool_call>{"name": "python", "arguments": {"code": "a\nb"}}</tool_call>', "a\nb"),
        (f"<|python_tag|>{RUN}<|eom_id|>", RUN),
        (f"<|python_tag|>{RUN}", RUN),
        (f"<|python_tag|>{JSON}<|eot_id|>", RUN),
    ],
)
def test_calls_that_are_run(reply, code):
    for text in (reply, f"Let me calculate.\n{reply}\nAnswer: C"):
        # Only a tag without an end takes the text after it.
        if text == reply or "<|python_tag|>print(6 * 7)" not in text or "<|eom_id|>" in text:
            call = tool_call(text)
            assert call is not None and call.code == code and not call.fault
            assert "Answer: C" not in text[: call.stop]


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (f"```python\n{RUN}", "has no end"),
        (f"~~~python\n{RUN}\n```", "has no end"),
        ("<tool_call>{'name': 1", "not complete JSON"),
        ("<tool_call>[1]</tool_call>", "not complete JSON"),
        ('<tool_call>{"name": "search", "arguments": {}}</tool_call>', "no tool 'search'"),
        ('<tool_call>{"name": "python", "arguments": {}}</tool_call>', "has no 'code'"),
        ('<tool_call>{"name": "python"}</tool_call>', "has no 'code'"),
        ('<tool_call>{"name": "python", "arguments": {"code": 3}}</tool_call>', "has no 'code'"),
    ],
)
def test_calls_that_cannot_be_run_are_returned_without_code(reply, fault):
    call = tool_call(reply)
    assert isinstance(call, Call) and call.code is None and fault in call.fault


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Answer: B",
        "```text\n42\n```",
        "```bash\npython -c 'print(1)'\n```",
        "```\nAnswer: B\n```",
        "```\nv = 3.2 m/s\n```",
        "```\nE = m * c**2\n```",
        "```\n42\n```",
        "```\nprint(1)",
        "Use `print(1)` here.",
        "the ``` fence",
    ],
)
def test_text_that_is_no_call(reply):
    assert tool_call(reply) is None


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("Answer: B", "", "Answer: B"),
        (" plain ", "", " plain "),
        ("<think>a</think>b", "a", "b"),
        ("<think>\na\n</think>\n\nb", "a", "b"),
        ("a</think>b", "a", "b"),
        ("<think>a", "a", ""),
        ("x<think>a", "a", "x"),
        ("<think>a</think>b<think>c</think>d", "ac", "bd"),
        ("<think>a<think>b</think>c</think>d", "abc", "d"),
        ("a</think>b</think>c", "ab", "c"),
        ("<thinking>a</thinking>b", "a", "b"),
        ("<reasoning>a</reasoning>b", "a", "b"),
        ("[THINK]a[/THINK]b", "a", "b"),
        ("<think></think>b", "", "b"),
        ("I <thinks> so", "", "I <thinks> so"),
    ],
)
def test_reasoning_is_separated(text, thought, said):
    assert split_thoughts(text) == (thought, said)
