"""The questions that lead to an estimator, drawn for a page and for a phone."""

from __future__ import annotations

from svg import Drawing

QUESTIONS = (
    (("No derivatives at hand?", "accuracy, a simulator"), ("`evolution, PES, ESSingle",)),
    (
        ("No inner loop: both levels", "take steps together?"),
        ("`SOBA, SABA, AmIGO,", "`StocBiO, F2SA, BOME"),
    ),
    (
        ("Too long for one outer step:", "updates on the way?"),
        ("`windows", "biased; unbiased: PES"),
    ),
    (
        ("Does the inner loop converge?", "second derivatives are fine"),
        ("`Implicit(CG(n))", "memory free of the steps"),
    ),
    (
        ("It converges, but first", "derivatives only?"),
        ("`Penalty(strength)", "bias falls as 1 / strength"),
    ),
    (
        ("Must it cost no more than", "first derivatives?"),
        ("`FirstOrder()", "for a learned start"),
    ),
    (("Does the graph of all steps", "fit into memory?"), ("`Unrolled()", "exact")),
)
EXACT = ("`Unrolled(recompute=True)", "exact, memory flat in the steps")
THEN = "then measure on your problem: mf.compare(...)"


def choosing() -> Drawing:
    """A ladder of questions: yes goes to the right, no goes down."""
    d = Drawing(560, 86 * len(QUESTIONS) + 128, "Which estimator: a ladder of questions")
    for i, (question, answer) in enumerate(QUESTIONS):
        y = i * 86 + 2
        d.box(2, y, 250, 58, question, "plain", size=15)
        d.line([(254, y + 29), (328, y + 29)])
        d.text(288, y + 18, "yes", size=14)
        d.box(332, y, 226, 58, answer, "good", size=15)
        d.line([(127, y + 60), (127, y + 84)])
        d.text(146, y + 71, "no", size=14)
    y = len(QUESTIONS) * 86 + 2
    d.box(2, y, 556, 58, EXACT, "good")
    d.box(2, y + 78, 556, 44, THEN, "pink", size=16)
    return d


def choosing_narrow() -> Drawing:
    """The same ladder for a phone: the answer stands below its question."""
    rung = 152
    d = Drawing(340, rung * len(QUESTIONS) + 128, "Which estimator: a ladder of questions")
    for i, (question, answer) in enumerate(QUESTIONS):
        y = i * rung + 2
        d.box(2, y, 336, 54, question, "plain", size=15)
        d.line([(200, y + 56), (200, y + 76)])
        d.text(222, y + 66, "yes", size=14)
        d.box(72, y + 78, 266, 52, answer, "good", size=15)
        d.line([(36, y + 56), (36, y + rung - 2)])
        d.text(54, y + 104, "no", size=14)
    y = len(QUESTIONS) * rung + 2
    d.box(2, y, 336, 58, EXACT, "good", size=15)
    d.box(2, y + 78, 336, 44, THEN, "pink", size=13)
    return d
