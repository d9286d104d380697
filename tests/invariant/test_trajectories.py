"""Runs that must be equal are equal, step by step, and are what they were.

Each class of `members.py` is run again. Its members are compared with each other tightly: they do
the same arithmetic in float64 in another order. And each is compared with `stored/CLASS.json`,
more loosely: another machine, BLAS or release of torch may sum in another order as well, and a few
steps of training multiply that.

    cd tests && python -m invariant.regenerate [CLASS ...]

stores them anew.
"""

from __future__ import annotations

import json

import pytest

from invariant.members import CLASSES, STEPS, Trajectory, stored

# Relative. Rounding of 1e-16 through four steps; at most 7e-13 was seen, where the inner loop is
# differentiated through four steps of a language model.
WITHIN = 1e-11
STORED = 1e-8

# The processes of a class start at once; one worker is enough for all of them.
pytestmark = pytest.mark.xdist_group("invariant")


def difference(one: Trajectory, other: Trajectory) -> float:
    """The largest relative difference of any loss or gradient norm."""
    assert len(one) == len(other)
    return max(
        abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(one, other, strict=True) for key in b
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * ("processes" in n)) for n in CLASSES]
)
def test_members_of_a_class_have_one_trajectory(name):
    kept = json.loads(stored(name).read_text())
    assert kept["class"] == name and list(kept["members"]) == list(CLASSES[name])
    found = {member: run() for member, run in CLASSES[name].items()}
    first = next(iter(found.values()))
    assert len(first) == STEPS
    # A run that does not move would be equal to anything.
    assert len({step["loss"] for step in first}) == STEPS
    for member, trajectory in found.items():
        assert difference(trajectory, first) < WITHIN, member
        off = difference(trajectory, kept["members"][member])
        assert off < STORED, (
            f"{member} is no longer what it was ({off:.1e}); stored with {kept['environment']}. "
            "If it should not be: python -m invariant.regenerate, in tests/."
        )


def test_classes_differ_from_each_other():
    """The stored files could not be exchanged: what should matter does."""
    runs = {
        name: next(iter(json.loads(stored(name).read_text())["members"].values()))
        for name in CLASSES
    }
    same = {("vmap-loop", "recompute-maml"), ("accumulation-sft", "processes-sft")}
    names = list(runs)
    for i, one in enumerate(names):
        for other in names[:i]:
            equal = difference(runs[one], runs[other]) < 1e-6
            assert equal == ((other, one) in same), (other, one)
