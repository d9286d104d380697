"""W7: how the cost of W1's meta-gradient grows with the tasks and with the inner steps."""

from __future__ import annotations

from typing import Any

from benchmarks.rivals.workloads import w1

TITLE = "W7: growth with tasks and steps"
TEXT = """
The second-order meta-gradient of W1's network: 1 to 256 tasks at K = 5, and 1 to 256 steps with 4
tasks.
"""
REFERENCE = w1.REFERENCE
TOLERANCE = 1e-9
REPEATS = 3
MEMORY = None
SIZES = (1, 4, 16, 64, 256)


def cases(quick: bool) -> list[dict[str, Any]]:
    """Return both lines of growth."""
    sizes = SIZES[:3] if quick else SIZES
    tasks = [{"axis": "tasks", "tasks": n, "steps": 5, "order": 2} for n in sizes]
    return tasks + [{"axis": "steps", "tasks": 4, "steps": n, "order": 2} for n in sizes]


data = w1.data
