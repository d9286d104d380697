"""Runs that must be equal are equal, step by step, and are what they were.

Each class of `members.py` is run again. Its members are compared with each other tightly: they do
the same arithmetic in float64 in another order. And each is compared with `stored/CLASS.json`,
more loosely: another machine, BLAS or release of torch may sum in another order as well, and a few
steps of training multiply that.

    cd tests && python -m invariant.regenerate [CLASS ...]

stores them anew.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from invariant.members import CLASSES, STEPS, Trajectory, snapshot, stored

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
    compare(name, found, kept)


def compare(name: str, found: dict[str, Trajectory], kept: dict[str, Any]) -> None:
    """Raise unless the runs agree with each other and with what was stored of them."""
    reference, first = next(iter(found.items()))
    for member, trajectory in found.items():
        apart = difference(trajectory, first)
        assert apart < WITHIN, (
            f"{name}: {member!r} is not the same training as {reference!r}: they are {apart:.1e} "
            f"apart, {where(trajectory, first)}; rounding explains {WITHIN:.0e}."
        )
        old = kept["members"][member]
        off = difference(trajectory, old)
        assert off < STORED, (
            f"{name}: {member!r} is no longer what it was: {off:.1e} off, "
            f"{where(trajectory, old)}; stored with {kept['environment']}, now "
            f"{snapshot()}. If the change is meant, record it anew: "
            f"cd tests && python -m invariant.regenerate {name}"
        )


def where(one: Trajectory, other: Trajectory) -> str:
    """The first step and value that differ by more than rounding."""
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for key in b:
            if abs(a[key] - b[key]) > WITHIN * abs(b[key]):
                return f"first in the {key} of step {step}, {a[key]!r} for {b[key]!r}"
    return "nowhere"


def test_a_changed_trajectory_says_what_changed_and_how_to_record_it_anew():
    kept = json.loads(stored("vmap-loop").read_text())

    def changed(*members: str, by: float) -> dict[str, Trajectory]:
        found = copy.deepcopy(kept["members"])
        for member in members or found:
            found[member][2]["grad_norm"] *= 1 + by
        return found

    compare("vmap-loop", changed(by=1e-10), kept)
    told = r"no longer what it was: 1\.0e-06 off, first in the grad_norm of step 2"
    with pytest.raises(AssertionError, match=told) as caught:
        compare("vmap-loop", changed(by=1e-6), kept)
    assert "cd tests && python -m invariant.regenerate vmap-loop" in str(caught.value)
    assert "transformers" in str(caught.value)
    with pytest.raises(AssertionError, match=r"'loop' is not the same training as 'vmap'"):
        compare("vmap-loop", changed("loop", by=1e-9), kept)


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
