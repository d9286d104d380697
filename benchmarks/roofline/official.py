"""The recorded step of the official code, whose code is not in this repository.

`python -m benchmarks.roofline --official CHECKOUT` records it anew and writes the file.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.roofline.record import Op

FILE = Path(__file__).with_name("official.json")


def write(recorded: dict[int, list[Op]]) -> None:
    """Write the operations of one step, for each length."""
    found = {}
    for length, ops in recorded.items():
        table = list(dict.fromkeys(ops))
        places = {op: i for i, op in enumerate(table)}
        found[str(length)] = {"operations": table, "order": [places[op] for op in ops]}
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


def read(length: int) -> list[Op]:
    """Return the operations of one step."""
    found = json.loads(FILE.read_text())[str(length)]
    table = [Op(*op[:-1], tuple(map(tuple, op[-1]))) for op in found["operations"]]
    return [table[i] for i in found["order"]]
