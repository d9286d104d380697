"""Separates the reasoning of a reply from what it says: only the second is scored or executed."""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"
_TAG = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>|\[(/?)THINK\]")


def split_thoughts(text: str) -> tuple[str, str]:
    """Return the reasoning of a reply and the rest.

    Reasoning stands between `<think>` and `</think>` (also `<thinking>`, `<thought>`, `<reasoning>`
    and `[THINK]`). Some templates write the first tag themselves, so everything before a closing
    tag without an opening one is reasoning. A tag that is never closed makes the rest of the text
    reasoning: the tokens were spent before there was an answer.

    Example:
        >>> from metafocus.evals.thinking import split_thoughts
        >>> split_thoughts("<think>Is it B?</think>Answer: C")
        ('Is it B?', 'Answer: C')
        >>> split_thoughts("Is it B?</think>Answer: C"), split_thoughts("<think>Answer: B")
        (('Is it B?', 'Answer: C'), ('Answer: B', ''))
    """
    thoughts: list[str] = []
    said: list[str] = []
    depth = at = 0
    for tag in _TAG.finditer(text):
        piece, at = text[at : tag.start()], tag.end()
        if not (tag[1] or tag[2]):
            (thoughts if depth else said).append(piece)
            depth += 1
        elif depth:
            thoughts.append(piece)
            depth -= 1
        else:
            thoughts += [*said, piece]
            said = []
    (thoughts if depth else said).append(text[at:])
    if not thoughts:
        return "", text
    return "".join(thoughts).strip(), "".join(said).strip()
