"""Betty's main branch, never released: the same user code as for its last release."""

from __future__ import annotations

from benchmarks.rivals.contenders import betty

PACKAGE = "betty_main"
LABEL = "Betty main"


def renamed(found):
    return dict(zip([LABEL] * len(found), found.values(), strict=True))


def w1(data, case):
    return renamed(betty.w1(data, case))


def w2(data, case):
    return renamed(betty.w2(data, case))


def w3(data, case):
    return renamed(betty.w3(data, case))


def w4(data, case):
    return renamed(betty.w4(data, case))
