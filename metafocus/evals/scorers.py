"""Whether an answer is right, by the rules of BABILong, of lm-evaluation-harness and of RULER.

The first two score the same answers differently, so their numbers must not be mixed in one table.
`babilong_official` requires that the target is the only label in the answer. For
`lm_eval_substring` it is enough that the target occurs anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from metafocus.errors import DataError

# A model begins to write examples of its own there. The official code also cuts at "Question", but
# with a capital letter in lower-case text. That cut never happens, so it does not happen here.
_MARKERS = ("<context>", "<example>")

# RULER calls a length effective if the score is above this, the score of Llama2-7B at 4K tokens.
EFFECTIVE_THRESHOLD = 85.6
# BABILong's paper calls an accuracy of 85 % satisfactory.
EFFECTIVE = {"ruler": EFFECTIVE_THRESHOLD, "babilong": 85.0}


def babilong_official(output: str, target: str, question: str, labels: Sequence[str]) -> bool:
    """Return whether the first sentence contains the target and no other label.

    A target such as "apple,milk" stands for several labels, in any order. Everything is converted
    to lower case. Labels that occur in the question do not count, and this includes the target.
    Labels are found as substrings, so the label "one" of qa7 occurs in "none", and no answer to a
    question whose target is "none" is right.

    Raises:
        DataError: if there are no labels, or if the target is not one of them.

    Example:
        >>> from metafocus.evals.scorers import babilong_official
        >>> rooms = ("kitchen", "office")
        >>> babilong_official("In the Kitchen. Not the office.", "kitchen", "Where is Mary?", rooms)
        True
        >>> babilong_official("kitchen or office", "kitchen", "Where is Mary?", rooms)
        False
    """
    known = {label.lower() for label in labels}
    # The target of qa8 may name several objects; "n,w" of qa19 is one label.
    wanted = set(target.lower().split(",")) if len(target) > 3 else {target.lower()}
    if not wanted <= known:
        raise DataError(f"target={target!r} is not among labels={tuple(labels)!r}: add it")
    said = output.lower().partition(".")[0]
    for marker in _MARKERS:
        said = said.partition(marker)[0]
    asked = question.lower()
    return {label for label in known if label in said and label not in asked} == wanted


def lm_eval_substring(output: str, target: str) -> bool:
    """Return whether the target occurs anywhere in the output; the case does not matter.

    Raises:
        DataError: if the target is empty, because it would occur in every output.

    Example:
        >>> from metafocus.evals.scorers import lm_eval_substring
        >>> lm_eval_substring("kitchen or office", "kitchen")
        True
    """
    return _hit(output, target.strip())


def string_match_all(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean over outputs of the share of references that occur, from 0 to 100.

    This is RULER's score of niah, vt, cwe and fwe. It looks for substrings and ignores the case.
    Additional wrong words do not lower it.

    Raises:
        DataError: if the lists differ in length, if there are no outputs, or if an output has no
            references.

    Example:
        >>> from metafocus.evals.scorers import string_match_all
        >>> string_match_all(["7, 9"], [["7", "8"]])
        50.0
    """
    return _mean([sum(row) / len(row) for row in _hits(outputs, references)])


def string_match_part(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the share of outputs in which at least one reference occurs, from 0 to 100.

    This is RULER's score of qa.

    Raises:
        DataError: if the lists differ in length, if there are no outputs, or if an output has no
            references.

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
    if not reference.strip():
        raise DataError("an empty reference occurs in every output: give the expected text")
    return reference.lower() in output.lower()


def _mean(shares: Sequence[float]) -> float:
    return 100.0 * sum(shares) / len(shares)
