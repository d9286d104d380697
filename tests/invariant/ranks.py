"""One run in two processes: `python -m invariant.ranks SETTINGS FOLDER`, from the tests' folder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent


def launch(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Run two processes of a fresh interpreter; return their joint trajectory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "invariant.ranks", json.dumps(settings), folder]
        done = subprocess.run(
            command, cwd=TESTS, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        first, second = (
            json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(2)
        )
    if [x["grad_norm"] for x in first] != [x["grad_norm"] for x in second]:
        raise RuntimeError(f"the ranks disagree: {first} and {second}")
    return [
        {"loss": one["loss"] + two["loss"], "grad_norm": one["grad_norm"]}
        for one, two in zip(first, second, strict=True)
    ]


def main() -> int:
    import torch
    from trainer_script import pair

    from invariant.members import trainer_run

    torch.set_num_threads(1)
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])

    def work(rank: int) -> None:
        (folder / f"rank{rank}.json").write_text(json.dumps(trainer_run(**settings)))

    return max(map(abs, pair(work)))


if __name__ == "__main__":
    sys.exit(main())
