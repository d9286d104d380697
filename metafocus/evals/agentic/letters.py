r"""The letter that a reply answers with.

A reply is read in the order in which it binds the model: a line of the prescribed form
`Answer: C`, then a mark (`\boxed{C}`, `<answer>C</answer>`), then a sentence ("the answer is C"),
then a letter that stands alone. Within each kind the last one counts. If it is a negation
("not C"), a choice ("C or D") or a question ("C?"), there is no answer.
"""

from __future__ import annotations

import re

LETTERS = "ABCDEFGHIJ"

# Emphasis, quotes and the LaTeX around a letter say nothing about it.
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathbb|bm)\s*\{([^{}]*)\}")
_DECORATION = re.compile(
    r"[*_`$\"'\u2018\u2019\u201c\u201d\u00ab\u00bb\u200b\ufeff]|</?(?:b|strong|i|em|p|br|span)\s*/?>"
)
_PLAIN = str.maketrans("\uff1a\uff08\uff09\uff1d\u3010\u3011", ":()=[]")
# Full-width letters, as Chinese input methods type them.
_PLAIN |= {0xFF21 + i: letter for i, letter in enumerate(LETTERS)}

_LEAD = (
    r"(?:(?:so|thus|hence|therefore)\b[\s,:]*)?(?:(?:the|my|our)\s+)?"
    r"(?:(?:final|correct|best|right)\s+)*(?:answer|\u7b54\u6848)"
    r"(?:\s+(?:letter|choice|option))?"
)
_LINE = re.compile(rf"[\s>#\-\u2022{{(\[]*{_LEAD}[\s)]*[:=](.*)", re.IGNORECASE)
_HEADING = re.compile(rf"[\s>#\-\u2022(\[]*{_LEAD}[\s)\]]*[:=]?[\s)\]]*", re.IGNORECASE)
_MARK = re.compile(
    r"\\(?:fbox|boxed)\s*\{((?:[^{}]|\{[^{}]*\})*)\}|<answer>(.*?)(?:</answer>|$)", re.S
)
_PROSE = re.compile(
    r"(?:\b(?:answer|option|choice)\s*(?:is|must be|should be|would be|has to be|:|=)[\s:]*"
    r"|\b(?:i|we)(?:\s+(?:will|would|must)|d|ll)?\s+(?:choose|chose|pick|select|go with)\s+"
    r"|\b(?:so|thus|hence|therefore)\b[\s,:]*(?:it\s+(?:is|must be)\s+)?(?=\W*[A-J]\W*$)"
    r"|\u7b54\u6848\s*(?:\u662f|\u4e3a|:)[\s:]*)(.{0,300})",
    re.IGNORECASE | re.MULTILINE,
)
_JUDGED = re.compile(
    r"(?<![A-Za-z0-9])((?:(?:option|choice|answer)\s+)?[\[(]{0,3}[A-J])[\])]{0,3}\s+is\s+(?:the\s+)?"
    r"(?:correct|right|best)\b(?!\s*(?:only|if|unless|when|\?))",
)
_DOUBT = re.compile(
    r"\b(?:if|whether|unless|suppose|supposing|assume|assuming|when)\b[^.;\n]*$", re.I
)
_ALONE = re.compile(r"(?:\(([A-Ja-j])\)|\[([A-Ja-j])\]|([A-Ja-j])[).:])\s+\S.*")

_VALUE = re.compile(
    r"[\s>:\-]*(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:(?:answer|option|choice|letter)\b[\s:]*)?"
    r"(?:is\b[\s:]*)?)(?:\\(?:fbox|boxed)\s*)?[(\[{<\s\\]*([A-Ja-j])(?![A-Za-z0-9_^{\\])(.*)",
    re.IGNORECASE | re.DOTALL,
)
_REFUSED = re.compile(
    r"[\s(\[{<:]*(?:not|none|neither|either|no|cannot|can|cant|unknown|unclear|n/a|both|any|"
    r"all)\b",
    re.IGNORECASE,
)
# "C or D", "C, D", "C/D", "C-D", "C D", "C or none": more than one letter is named, or none.
_OTHER = re.compile(
    r"\s+[A-J](?=\W*$)|[)\]}>\s]*(?:(?:[/&|+]|\band\b)\s*(?:(?:option|choice)\s+)?[(\[{]*[A-J](?![A-Za-z0-9])"
    r"|\bor\s+(?:none|neither)\b"
    r"|[,;]\s*(?:(?:option|choice)\s+)?[(\[{]*[A-J][)\]}]*(?=\W*$|\s*,|\s+(?:and|or)\b)"
    r"|(?:(?!\b(?:because|since|as|while|but|not)\b)(?:[^.\n]|\.(?=\d)))*?\bor\b"
    r"[^.\n]*?(?<![A-Za-z0-9])[A-J](?![A-Za-z0-9])"
    r"|[\-\u2013\u2014][(\[{]*[A-J](?![A-Za-z0-9]))",
)
_NOTHING = ""  # an answer that names no letter of its own, unlike None: nothing was found


def answer_letter(text: str, n: int) -> str | None:
    r"""Return the letter that a text answers with, one of the first n letters, or None.

    A line `Answer: C` counts before all others, then `\\boxed{C}` and `<answer>C</answer>`, then
    "the answer is C" in a sentence, then a letter alone such as `**(C)** 3.2 m/s`. The last one of
    its kind counts. The tests have a table of forms with the reason for each.

    Example:
        >>> from metafocus.evals.agentic.letters import answer_letter
        >>> answer_letter("Answer: A\nNote that the answer is B for large n.", 4)
        'A'
        >>> answer_letter("Answer: C or D", 4) is None, answer_letter("A or B?", 4) is None
        (True, True)
    """
    text = text.translate(_PLAIN).replace("\r\n", "\n")
    while (found := _WRAPPED.sub(r"\1", text)) != text:
        text = found
    text = _DECORATION.sub("", re.sub(r"\\[()\[\]]", " ", text))
    for read in (_prescribed, _marked, _said, _alone):
        letter = read(text)
        if letter is not None:
            return letter if letter and letter in LETTERS[:n] else None
    return None


def _prescribed(text: str) -> str | None:
    lines = [line for line in text.split("\n") if line.strip()]
    last = None
    for i, line in enumerate(lines):
        match = _LINE.fullmatch(line)
        value = match[1] if match else ""
        if not value.strip() and _HEADING.fullmatch(line) and i + 1 < len(lines):
            value = lines[i + 1]
        letter = _letter(value)
        last = last if letter is None else letter
    return last


def _marked(text: str) -> str | None:
    found = [_letter(match[1] or match[2] or "") for match in _MARK.finditer(text)]
    return next((letter for letter in reversed(found) if letter is not None), None)


def _said(text: str) -> str | None:
    """Return the letter of the last sentence that names an answer."""
    found: list[tuple[int, str]] = []
    at = 0
    # A sentence may follow in the same line, so the search goes on after the letter.
    while match := _PROSE.search(text, at):
        at = match.start(1)
        letter = _letter(match[1])
        if letter is not None and not _doubted(text, match.start()):
            found.append((match.start(), letter))
    for match in _JUDGED.finditer(text):
        if not _doubted(text, match.start()):
            found.append((match.start(), _letter(match[1]) or _NOTHING))
    return max(found)[1] if found else None


def _doubted(text: str, stop: int) -> bool:
    """Return whether the sentence up to here is a condition or a question."""
    return _DOUBT.search(text, max(0, stop - 300), stop) is not None


def _alone(text: str) -> str | None:
    """Return the letter of a line without other words, or the only line that names a choice."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    bare = re.fullmatch(r"[(\[{<\s]*([A-Ja-j])[)\]}>.:\s]*", lines[-1])
    if bare and (bare[1].isupper() or len(lines) == 1 or len(lines[-1]) > 1):
        return bare[1].upper()
    # Several such lines are the choices again, not an answer.
    named = [match for match in map(_ALONE.fullmatch, lines) if match]
    if len(named) == 1 and named[0].string == lines[-1]:
        return (named[0][1] or named[0][2] or named[0][3]).upper()
    return None


def _letter(value: str) -> str | None:
    """Return the letter that a value begins with, "" if it takes none, None if it is no value."""
    value = value[:300]  # what follows a letter by more than this says nothing about it
    if _REFUSED.match(value):
        return _NOTHING
    match = _VALUE.match(value)
    if match is None:
        return None
    letter, rest = match[1], match[2]
    line = rest.partition("\n")[0]
    closed = re.match(r"\s*[)\]}>.:,;]|\s*$", line)
    # "A resistor" and "I think" begin with a word; a small letter is a word unless it is set off.
    if not closed and (letter.islower() or (letter in "AI" and re.match(r"\s+[a-z]", line))):
        return None
    if "boxed" in line:
        return None  # the mark says it
    if re.match(r"[\-\u2013][0-9A-Za-z]", line) and not _OTHER.match(line):
        return None  # "C-14"
    if re.match(r"[)\]}>\s]*\?", line) or _OTHER.match(line):
        return _NOTHING
    return letter.upper()
