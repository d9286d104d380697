"""Whether an answer is right, by the rules of BABILong, of lm-evaluation-harness and of RULER.

The first two judge the same answers differently, so their numbers must never stand in one column:
`babilong_official` wants the target to be the only label that is named, `lm_eval_substring` is
content if it occurs anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from metafocus.errors import DataError

# Where a model begins to write examples of its own. A cut at "Question" is meant officially too,
# but looks for a capital letter in lower-cased text and so never happens: nor does it here.
_MARKERS = ("<context>", "<example>")

# Above this a model's RULER length counts as effective: Llama2-7B at 4K tokens.
EFFECTIVE_THRESHOLD = 85.6


def babilong_official(output: str, target: str, question: str, labels: Sequence[str]) -> bool:
    """Return whether the first sentence names the target and no other label.

    Everything is lower-cased; labels that occur in the question do not count, the target
    included. Labels are found as substrings.

    Raises:
        DataError: no labels, or a target that is not one of them.

    Example:
        >>> from metafocus.evals.scorers import babilong_official
        >>> rooms = ("kitchen", "office")
        >>> babilong_official("In the Kitchen. Not the office.", "kitchen", "Where is Mary?", rooms)
        True
        >>> babilong_official("kitchen or office", "kitchen", "Where is Mary?", rooms)
        False
    """
    known = {label.lower() for label in labels}
    if target.lower() not in known:
        raise DataError(f"target={target!r} is not among labels={tuple(labels)!r}: add it")
    said = output.lower().partition(".")[0]
    for marker in _MARKERS:
        said = said.partition(marker)[0]
    asked = question.lower()
    return {label for label in known if label in said and label not in asked} == {target.lower()}


def lm_eval_substring(output: str, target: str) -> bool:
    """Return whether the target occurs anywhere in the output, whatever the case.

    Raises:
        DataError: an empty target, which would occur in everything.

    Example:
        >>> from metafocus.evals.scorers import lm_eval_substring
        >>> lm_eval_substring("kitchen or office", "kitchen")
        True
    """
    return _hit(output, target.strip())


def string_match_all(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean over outputs of the share of references that occur, from 0 to 100.

    RULER's score of niah, vt, cwe and fwe: substrings, whatever the case; wrong extra words cost
    nothing.

    Raises:
        DataError: lists of different lengths, no outputs, or an output without references.

    Example:
        >>> from metafocus.evals.scorers import string_match_all
        >>> string_match_all(["7, 9"], [["7", "8"]])
        50.0
    """
    return _mean([sum(row) / len(row) for row in _hits(outputs, references)])


def string_match_part(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the share of outputs in which at least one reference occurs, from 0 to 100.

    RULER's score of qa.

    Raises:
        DataError: lists of different lengths, no outputs, or an output without references.

    Example:
        >>> from metafocus.evals.scorers import string_match_part
        >>> string_match_part(["It is Paris."], [["paris", "the capital"]])
        100.0
    """
    return _mean([max(row) for row in _hits(outputs, references)])


def reference_hits(output: str, references: Sequence[str]) -> list[bool]:
    """Return which of the references occur in an output."""
    return [_hit(output, reference) for reference in references]


def _hits(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[bool]]:
    if isinstance(outputs, str) or len(outputs) != len(references) or not outputs:
        raise DataError(
            f"{len(outputs)} outputs and {len(references)} lists of references: pass equally "
            "many, at least one, as lists"
        )
    for i, row in enumerate(references):
        if isinstance(row, str) or not row:
            raise DataError(f"references[{i}]={row!r}: pass a list of at least one string")
    return [reference_hits(o, row) for o, row in zip(outputs, references, strict=True)]


def _hit(output: str, reference: str) -> bool:
    if not reference:
        raise DataError("an empty reference occurs in every output: give the expected text")
    return reference.lower() in output.lower()


def _mean(shares: Sequence[float]) -> float:
    return 100.0 * sum(shares) / len(shares)
