"""Truth tables made by hand, and the interval by its published values."""

from __future__ import annotations

import math

import pytest

from metafocus.errors import DataError
from metafocus.evals.intervals import wilson
from metafocus.evals.items import Item
from metafocus.evals.results import cells, depth_points, score
from metafocus.evals.scorers import (
    babilong_official,
    lm_eval_substring,
    reference_hits,
    string_match_all,
    string_match_part,
)

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
GIFTS = ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk")
WHERE = "Where is Mary?"

# output, target, question, labels, official, lm-eval
BABILONG = [
    ("kitchen", "kitchen", WHERE, ROOMS, True, True),
    ("The KITCHEN.", "kitchen", WHERE, ROOMS, True, True),
    ("office", "kitchen", WHERE, ROOMS, False, False),
    ("", "kitchen", WHERE, ROOMS, False, False),
    # More than one label: only the substring scorer is content.
    ("kitchen or office", "kitchen", WHERE, ROOMS, False, True),
    ("bathroom bedroom garden hallway kitchen office", "kitchen", WHERE, ROOMS, False, True),
    ("Not the kitchen", "kitchen", WHERE, ROOMS, True, True),
    # Only the first sentence counts officially, for better and for worse.
    ("The kitchen. Before that the office.", "kitchen", WHERE, ROOMS, True, True),
    ("Let me think. The kitchen.", "kitchen", WHERE, ROOMS, False, True),
    ("...kitchen", "kitchen", WHERE, ROOMS, False, True),
    ("The kitchen! Before that the office", "kitchen", WHERE, ROOMS, False, True),
    # Examples that the model goes on to write are cut.
    ("kitchen\n<example>\noffice", "kitchen", WHERE, ROOMS, True, True),
    ("kitchen <CONTEXT> office", "kitchen", WHERE, ROOMS, True, True),
    ("<example> kitchen", "kitchen", WHERE, ROOMS, False, True),
    # The cut at "Question" never happens, because the text is lower-cased before.
    ("kitchen\nQuestion: is the office empty?", "kitchen", WHERE, ROOMS, False, True),
    ("kitchen\nQuestion: where is John?", "kitchen", WHERE, ROOMS, True, True),
    # Labels in the question do not count, neither for nor against.
    (
        "Before the office it was in the kitchen",
        "kitchen",
        "Where was the milk before the Office?",
        ROOMS,
        True,
        True,
    ),
    ("office", "office", "Where was the milk before the office?", ROOMS, False, True),
    ("Fred gave the milk to Jeff", "Fred", "Who gave the milk to Jeff?", GIFTS, True, True),
    ("Fred gave the milk to Mary", "Fred", "Who gave the milk to Jeff?", GIFTS, False, True),
    # Substrings: a label inside another word counts for both.
    ("the kitchenette", "kitchen", WHERE, ROOMS, True, True),
    ("a summary: Fred", "Fred", "Who gave the milk?", GIFTS, False, True),
    ("possibly Fred", "Fred", "Who gave the milk?", GIFTS, True, True),
    ("billions to Fred", "Fred", "Who gave the milk?", GIFTS, False, True),
]


@pytest.mark.parametrize(
    ("output", "target", "question", "labels", "official", "substring"), BABILONG
)
def test_babilong(output, target, question, labels, official, substring):
    assert babilong_official(output, target, question, labels) is official
    assert lm_eval_substring(output, target) is substring


# output, references, share, any
RULER = [
    ("7123456", ["7123456"], 1.0, 1.0),
    ("none", ["7123456"], 0.0, 0.0),
    ("ABC, DEF", ["abc", "def", "ghi", "jkl"], 0.5, 1.0),
    ("abcdef", ["ABC", "DEF"], 1.0, 1.0),  # case, and no borders of words
    ("27123456 and more", ["7123456"], 1.0, 1.0),  # inside a longer number
    ("everything: abc def ghi xyz", ["abc"], 1.0, 1.0),  # too much costs nothing
    ("abc abc", ["abc", "xyz"], 0.5, 1.0),  # once is enough, twice no better
    ("the answer\nis Paris", ["Paris", "City of Paris"], 0.5, 1.0),
    ("7 123 456", ["7123456"], 0.0, 0.0),
    ("", ["a"], 0.0, 0.0),
]


@pytest.mark.parametrize(("output", "references", "share", "some"), RULER)
def test_ruler(output, references, share, some):
    assert string_match_all([output], [references]) == 100 * share
    assert string_match_part([output], [references]) == 100 * some


def test_ruler_means_are_over_samples_not_references():
    outputs, references = ["a", ""], [["a"], ["b", "c", "d"]]
    assert string_match_all(outputs, references) == 50.0
    outputs = [row[0] for row in RULER]
    rows = [row[1] for row in RULER]
    assert string_match_all(outputs, rows) == pytest.approx(100 * sum(r[2] for r in RULER) / 10)
    assert string_match_part(outputs, rows) == pytest.approx(100 * sum(r[3] for r in RULER) / 10)
    assert reference_hits("ab", ["a", "c"]) == [True, False]


def test_errors():
    with pytest.raises(DataError, match="target='attic' is not among labels"):
        babilong_official("x", "attic", WHERE, ROOMS)
    for target in ("", " "):
        with pytest.raises(DataError, match="empty reference"):
            lm_eval_substring("x", target)
    for scorer in (string_match_all, string_match_part):
        with pytest.raises(DataError, match="1 outputs and 2 lists"):
            scorer(["a"], [["a"], ["b"]])
        with pytest.raises(DataError, match="0 outputs"):
            scorer([], [])
        with pytest.raises(DataError, match="as lists"):
            scorer("a", [["a"]])
        with pytest.raises(DataError, match=r"references\[0\]='abc'"):
            scorer(["a"], ["abc"])
        with pytest.raises(DataError, match=r"references\[0\]=\[\]"):
            scorer(["a"], [[]])


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(hits, n, low, high):
    assert wilson(hits / n, n) == pytest.approx((low, high), abs=5.1e-5)
    assert wilson(1 - hits / n, n) == pytest.approx((1 - high, 1 - low), abs=5.1e-5)


def test_wilson_edges():
    assert wilson(0.0, 1)[0] == 0.0 and wilson(1.0, 10**6)[1] == 1.0
    low, high = wilson(0.3, 50, confidence=0.5)
    assert wilson(0.3, 50)[0] < low < 0.3 < high < wilson(0.3, 50)[1]
    # The edges are where the score test just rejects.
    for edge in wilson(0.3, 50):
        z = (0.3 - edge) / math.sqrt(edge * (1 - edge) / 50)
        assert abs(z) == pytest.approx(1.959964, abs=1e-5)
    for bad in ((1.1, 10), (0.5, 0), (0.5, 10, 1.0)):
        with pytest.raises(DataError, match="0 <= share <= 1"):
            wilson(*bad)


def item(**changes):
    found = {
        "suite": "ruler",
        "task": "niah_multivalue",
        "length": 100,
        "prompt": "p",
        "question": "q",
        "answer": "1 2",
        "references": ("1", "2"),
        "new_tokens": 8,
        "evidence": ((0, 1), (0, 1)),
        "depths": (0.05, 0.95),
        "aligned": True,
    }
    return Item(**{**found, **changes})


def test_scores_and_depths():
    assert score(item(), "2") == {"string_match_all": 0.5}
    assert depth_points(item(), "2") == [(0.05, 0.0), (0.95, 1.0)]
    assert score(item(task="qa", aligned=False), "2") == {"string_match_part": 1.0}
    assert depth_points(item(task="qa", aligned=False), "2") == [(0.5, 1.0)]
    question = item(
        suite="babilong",
        task="qa1",
        references=("office",),
        labels=ROOMS,
        aligned=False,
        question=WHERE,
    )
    assert score(question, "office, kitchen") == {
        "babilong_official": 0.0,
        "lm_eval_substring": 1.0,
    }
    assert depth_points(question, "office") == [(0.5, 1.0)]


def test_cells():
    items = [item(), item(), item(length=200), item(length=200, depths=(0.5, 1.0))]
    found = cells(items, ["1 2", "", "2", "1"], bins=2)
    assert [(c.task, c.length) for c in found] == [
        ("niah_multivalue", 100),
        ("niah_multivalue", 200),
    ]
    first = found[0].scores[0]
    assert (first.scorer, first.mean, first.n) == ("string_match_all", 0.5, 2)
    assert (first.low, first.high) == wilson(0.5, 2)
    assert found[0].by_depth == ((0.5, 2), (0.5, 2))
    assert found[1].by_depth == ((0.0, 1), (2 / 3, 3))
    assert cells([item(depths=(), evidence=(), aligned=False)], [""])[0].by_depth == (None,) * 10
    with pytest.raises(DataError, match="1 items, 0 outputs"):
        cells([item()], [])
