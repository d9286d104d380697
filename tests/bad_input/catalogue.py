"""What is refused: one row for each bad input, with the code, the exception and its key words.

`python tests/bad_input/catalogue.py` writes `docs/bad_input.md` from the tables beside this file.
A row's code is what a user would write; `names` below gives it its arguments. Of the message a row
holds only what a reader needs: what is wrong, and what to do. Both are pieces of it, in order, with
an ellipsis between them; the rest of a message may change.
"""

from __future__ import annotations

import functools
import io
import json
import math
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "bad_input.md"
FOLDER = "FOLDER"
"""Stands for the temporary directory in a text."""


class Refused(Exception):
    """A command that ended with status 2; its text is what it printed, one line."""


class Case(NamedTuple):
    """One bad input.

    Attributes:
        id: what the user did.
        code: the same in Python; of several lines the last one raises.
        error: the name of the exception.
        sees: pieces of its message that say what is wrong.
        fix: pieces of its message that say what to do; in parentheses an advice of the page,
            where the message has none.
    """

    id: str
    code: str
    error: str
    sees: str
    fix: str

    def missing(self, text: str) -> list[str]:
        """Return the pieces that a message lacks or has in another order."""
        found = []
        for column in (self.sees, self.fix):
            start = 0
            if column.startswith("("):
                continue
            for piece in column.split(" … "):
                at = text.find(piece, start)
                found += [piece] if at < 0 else []
                start = max(at, start)
        return found


def cases() -> Iterator[tuple[str, Case]]:
    """Every row, with the name of its table."""
    from checkpoint_cases import CHECKPOINTS
    from command_cases import COMMANDS
    from config_cases import CONFIGURATION
    from data_cases import DATA
    from engine_cases import ENGINE
    from eval_cases import EVALUATION
    from mask_cases import MASKS
    from model_cases import MODELS
    from placement_cases import ADAPTERS

    tables = {
        "The engine": ENGINE,
        "Placements and adapters": ADAPTERS,
        "Masks, spans and attention": MASKS,
        "Language models and batches": MODELS,
        "Data": DATA,
        "Command lines": COMMANDS,
        "Configuration files": CONFIGURATION,
        "Checkpoints and disks": CHECKPOINTS,
        "Evaluation": EVALUATION,
    }
    for title, table in tables.items():
        for row in table:
            yield title, Case(*row)


def run(code: str, folder: Path) -> None:
    """Run the code of a case."""
    exec(compile(code, "case", "exec"), names(folder))


@functools.cache
def model() -> Any:
    """A small language model, float32."""
    import torch
    from models import build

    return build(dtype=torch.float32)


@functools.cache
def tokenizer() -> Any:
    """A small tokenizer with a chat template."""
    from metafocus.data.tokenizer import train_tokenizer

    return train_tokenizer(["hello there"], 270)


def names(folder: Path) -> dict[str, Any]:
    """What a case's code may use."""
    import torch
    from models import chat_batch
    from torch import nn

    import metafocus as mf
    from metafocus import data, masks

    def loss(fast: Any, slow: Any, x: Any) -> Any:
        return ((fast["w"] - x) ** 2).sum()

    def problem(inner: Any = loss, outer: Any = loss, init: Any = None, **more: Any) -> Any:
        return mf.Problem(inner, outer, init or mf.from_slow, **more)

    weights = {"w": torch.ones(2)}
    zeros = mf.Episode(torch.zeros(2), torch.zeros(2))

    whole, steps, unrolled = problem(), mf.SGD(0.1, 2), mf.Unrolled()

    def hypergrad(
        problem: Any = whole,
        outer: Any = weights,
        episode: Any = zeros,
        solver: Any = steps,
        estimator: Any = unrolled,
        path: Any = None,
    ) -> Any:
        meta = mf.bilevel(problem, solver=solver, estimator=estimator, path=path)
        return mf.hypergrad(meta)(outer, episode)

    def meta_loss() -> Any:
        return mf.bilevel(problem(), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())

    def dropout() -> Any:
        dropped = problem(lambda f, s, x: (nn.functional.dropout(f["w"], 0.5) - x).square().sum())
        return mf.bilevel(dropped, solver=steps, estimator=unrolled)

    def descent(update: Any) -> Any:
        class Descent(mf.SGD):
            def update(self, params: Any, grads: Any, state: Any, step: Any, outer: Any) -> Any:
                return update(params, grads)

        return Descent(0.1, 2)

    def write(name: str, content: str | bytes) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def command(words: str) -> None:
        from metafocus.__main__ import main

        error = io.StringIO()
        with redirect_stderr(error), redirect_stdout(io.StringIO()):
            status = main(words.format(folder=folder).split())
        assert status == 2, status
        line = error.getvalue()
        assert line.startswith("metafocus: error: ") and line.count("\n") == 1, line
        raise Refused(line.removeprefix("metafocus: error: ").rstrip("\n"))

    def config(text: str | bytes, name: str = "run.yaml") -> Any:
        from metafocus.cli.settings import parse

        basic = "" if name.endswith("json") else "output_dir: run\nuse_cpu: true\n"
        content = text if isinstance(text, bytes) else basic + text
        return parse([str(write(name, content)), "--train_file", "chats.jsonl"])

    def batch(**changes: Any) -> dict[str, Any]:
        return {**chat_batch(length=12), **changes}

    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    sample = {
        "input_ids": torch.tensor([1, 2]),
        "turn_ids": torch.tensor([0, 1]),
        "answer_mask": torch.tensor([False, True]),
    }
    lora = mf.LoRA(mf.top_layers(0.5, ("up_proj",)), rank=2, alpha=4.0)

    def lm_loss(
        changes: Any, *, adapter: Any = lora, mask: Any = masks.causal, tokens: Any = None
    ) -> Any:
        more = {} if tokens is None else {"tokens": tokens}
        value = mf.lm_loss(model(), adapter=adapter, mask=mask, **more)
        return value(adapter.init(model()), {}, batch(**changes))

    return {
        "Path": Path,
        "batch": batch,
        "chat": chat,
        "command": command,
        "config": config,
        "data": data,
        "descent": descent,
        "dropout": dropout,
        "folder": folder,
        "hypergrad": hypergrad,
        "json": json,
        "line": json.dumps({"messages": chat}),
        "linear": nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)),
        "lm_loss": lm_loss,
        "lora": lora,
        "loss": loss,
        "masks": masks,
        "math": math,
        "meta_loss": meta_loss,
        "mf": mf,
        "model": model,
        "nn": nn,
        "problem": problem,
        "q": torch.ones(1, 2, 4, 3),
        "sample": sample,
        "stacked": mf.stack_episodes([zeros, zeros]),
        "spans": masks.causal({"input_ids": torch.zeros(1, 4)}),
        "struct": struct,
        "tokenizer": tokenizer,
        "torch": torch,
        "weights": weights,
        "write": write,
        "zeros": zeros,
    }


def page(rows: Iterable[tuple[str, Case]]) -> str:
    """The catalogue as a page."""
    rows = list(rows)
    lines = [
        "# Bad input",
        "",
        f"The library refuses {len(rows)} mistakes that would otherwise give a wrong result or a "
        "message from deep inside torch. Search this table for a word of your error.",
        "",
        "Every error is a `ValueError`, most of them of a class in `mf.errors`. A command ends "
        "with status 2 and prints one line. An ellipsis stands for the rest of a message, "
        f"`{FOLDER}` for a directory of yours.",
        "",
        "| what you did | what you see | what to do |",
        "|---|---|---|",
    ]
    title = ""
    for name, case in rows:
        if name != title:
            title = name
            lines.append(f"| **{title}** | | |")
        error = "" if case.error == Refused.__name__ else f"{case.error}: "
        lines.append(f"| {_cell(case.id)} | {_cell(error + case.sees)} | {_cell(case.fix)} |")
    lines += [
        "",
        "`python tests/bad_input/catalogue.py` writes this page; "
        "`tests/bad_input/test_bad_input.py` makes each of these mistakes.",
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Return a text as it looks, between the bars of a table."""
    for special in "\\`*_[]>|{}#":
        text = text.replace(special, f"\\{special}")
    # Not every reader of Markdown knows "\<".
    return text.replace("<", "&lt;").replace("~~", "~\\~")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    PAGE.write_text(page(cases()))
    print(f"wrote {PAGE}")
