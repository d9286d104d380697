"""Commands run in this process, and the files that they need and leave."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from metafocus.__main__ import main

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320}
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
SHORT = {
    **{"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 3e-3},
    **{"lora_rank": 2, "layer_fraction": 0.5, "logging_steps": 1, "save_strategy": "no"},
    "max_length": 64,
}


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def run(*argv: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return Ran(code, out.getvalue(), err.getvalue())


def refused(*argv: object) -> str:
    """Run a command that must be refused; return its one line of error."""
    ran = run(*argv)
    assert ran.code == 2
    # transformers shows how far it is with loading.
    lines = [line for line in ran.err.split("\n") if line and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("metafocus: error: "), ran.err
    return lines[0].removeprefix("metafocus: error: ")


def flags(**settings: object) -> list[str]:
    """Settings as words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def training(data: object, output: Path, **changes: object) -> list[str]:
    """The words of a short `metafocus train`; a setting that is None is left out."""
    small = {} if "model_name_or_path" in changes else SMALL
    settings = {**small, **QUIET, **SHORT, "train_file": data, "output_dir": output, **changes}
    return ["train", *flags(**{k: v for k, v in settings.items() if v is not None})]


def train(data: object, output: Path, **changes: object) -> dict:
    """Run `metafocus train` well; return its report, with its `history` of log entries."""
    ran = run(*training(data, output, **changes))
    assert ran.code == 0, ran.err
    assert f"saved in {output}" in ran.out
    return report(output)


def report(directory: Path) -> dict:
    found = read_json(directory / "metafocus.json")
    state = read_json(directory / "trainer_state.json")
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    # What the clock measures differs from run to run.
    clock = "inner_time_share"
    return {**found, "history": [{k: v for k, v in e.items() if k != clock} for e in steps]}


def read_json(path: Path) -> dict:
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def chat(i: int, turns: int = 1) -> dict:
    messages = [{"role": "system", "content": "You count."}]
    for turn in range(turns):
        number = 3 * i + turn
        messages += [
            {"role": "user", "content": f"What follows {number}?"},
            {"role": "assistant", "content": f"{number + 1} follows."},
        ]
    return {"messages": messages}


def write(path: Path, *records: object) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(folder: Path, **changes: object) -> dict:
    """The settings of a short run from a file, whose chats are written into `folder`."""
    made = {
        **{"train_file": str(write(folder / "train.jsonl", *map(chat, range(8))))},
        **{"validation_file": str(write(folder / "heldout.jsonl", *map(chat, range(3))))},
        **{"output_dir": str(folder / "run"), "save_strategy": "steps", "save_steps": 1},
    }
    return {**SMALL, **QUIET, **SHORT, **made, "max_steps": 2, **changes}


def written(folder: Path, values: dict, name: str = "config.yaml") -> str:
    path = folder / name
    path.write_text(json.dumps(values) if name.endswith("json") else yaml.safe_dump(values))
    return str(path)
