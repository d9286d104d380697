"""Store the trajectories of every class anew: `python -m invariant.regenerate`, in `tests/`.

To be done when a class is added or when what is computed changes on purpose; the diff of
`tests/invariant/stored` then shows by how much. Members that disagree are refused, not stored.
"""

from __future__ import annotations

import json
import sys

import torch

from invariant.members import CLASSES, snapshot, stored
from invariant.test_trajectories import STORED, WITHIN, difference


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    for name in names or CLASSES:
        found = {member: run() for member, run in CLASSES[name].items()}
        first = next(iter(found.values()))
        for member, trajectory in found.items():
            off = difference(trajectory, first)
            print(f"{name}: {member}: {off:.1e}", flush=True)
            if off > WITHIN:
                print(f"not stored: {member} is no member of {name}", file=sys.stderr)
                return 1
        text = {
            "class": name,
            "tolerance": {"within the class": WITHIN, "against this file": STORED},
            "environment": snapshot(),
            "members": found,
        }
        stored(name).write_text(json.dumps(text, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
