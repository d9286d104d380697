"""Runs checkpoints in lm-evaluation-harness, and exports questions as tasks for it.

A checkpoint is a plain Hugging Face directory, so the harness can load it directly. `run_tasks`
calls its Python API with the settings that a report needs. `export_tasks` writes questions as a
folder of tasks that any installation of the harness reads with `--include_path`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from metafocus.errors import DataError
from metafocus.evals.items import Item
from metafocus.evals.report import length_name
from metafocus.evals.results import SCORERS, score
from metafocus.files import write_json_lines, write_whole

VERSION = 1.0
"""The version of the exported tasks; it changes if their prompts or scores change."""

# This file is next to the tasks, so that the folder can be moved: the harness finds functions by
# their file.
_SCORING = """\
# Questions and scores of the tasks in this folder; needs metafocus.
from functools import partial
from pathlib import Path

from metafocus.evals import harness

load = partial(harness.load, Path(__file__).parent)
process_results = harness.process_results
"""


def export_tasks(items: Iterable[Item], directory: str | Path) -> list[str]:
    """Write questions as tasks of lm-evaluation-harness: one for each suite, task and length.

    A task is a YAML file and a file of questions in JSON lines, with names such as
    `metafocus_babilong_qa1_4k`. The prompts, the first words of an answer, the numbers of new
    tokens and the scorers are those of `metafocus eval`, so the same greedy answers get the same
    scores. The file `scoring.py` in the same folder imports metafocus.

    Args:
        items: the questions that the generators made.
        directory: it is created if it does not exist. Tasks of the same names are replaced.

    Returns:
        The names of the tasks.

    Raises:
        DataError: if there are no items.

    Example:
        >>> import tempfile
        >>> from metafocus.evals import babilong, harness
        >>> items = babilong.generate(lambda s: len(s.split()), task="qa1", length=0, n=2)
        >>> harness.export_tasks(items, tempfile.mkdtemp())
        ['metafocus_babilong_qa1_0k']
    """
    groups: dict[tuple[str, str, int], list[Item]] = {}
    for item in items:
        groups.setdefault((item.suite, item.task, item.length), []).append(item)
    if not groups:
        raise DataError("items is empty: pass what a generator of metafocus.evals made")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "scoring.py", _SCORING)
    names = []
    for (suite, task, length), group in groups.items():
        name = f"metafocus_{suite}_{task}_{length_name(length)}"
        records = ({**item.record(), "prompt": item.prompt} for item in group)
        write_json_lines(folder / f"{name}.jsonl", records)
        write_whole(folder / f"{name}.yaml", _yaml(name, group[0]))
        names.append(name)
    return names


def _yaml(name: str, item: Item) -> str:
    kind = "ruler qa" if (item.suite, item.task) == ("ruler", "qa") else item.suite
    metrics = "\n".join(
        f"  - metric: {scorer}\n    aggregation: mean\n    higher_is_better: true"
        for scorer in SCORERS[kind]
    )
    prefix = 'gen_prefix: "{{answer_prefix}}"\n' if item.answer_prefix else ""
    return f"""\
task: {name}
custom_dataset: !function scoring.load
dataset_kwargs:
  name: {name}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{references[0]}}}}"
{prefix}generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: {item.new_tokens}
process_results: !function scoring.process_results
metric_list:
{metrics}
metadata:
  version: {VERSION}
"""


def load(folder: Path, *, name: str, **_: Any) -> dict[str, Any]:
    """Return the questions of a task in the form that the harness needs."""
    datasets = importlib.import_module("datasets")
    with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in file])}


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the score of an answer by each scorer, in the form that the harness needs."""
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in doc.items()}
    return score(Item(**known), results[0])


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    output: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 1234,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a checkpoint on tasks of lm-evaluation-harness, with the tokenizer's chat template.

    Args:
        model: a directory that `save_pretrained` wrote, or a hub id.
        tasks: the names of the tasks: those of `export_tasks`, or any task of the harness.
        include_path: the folder of `export_tasks`. Then only its tasks are known, and the harness
            need not read thousands of others.
        output: a JSON file for the report; its folder is created.
        limit: the number of questions of each task; None for all.
        batch_size: the number of prompts in a batch.
        device: a device such as "cuda".
        dtype: the type of the weights.
        seed: the seed of all random states that the harness sets.
        metadata: for RULER, for example `{"max_seq_lengths": [4096], "pretrained": "..."}`.

    Returns:
        `results` by task with their standard errors, `versions` of the tasks, `n_samples`,
        `samples` with every answer, `configs`, and under `metafocus` the settings and versions of
        this run. The file holds everything except the prompts of the samples.

    Raises:
        DataError: if lm-eval is not installed, or if no task is named.
    """
    if isinstance(tasks, str) or not tasks:
        raise DataError(f"tasks={tasks!r}: pass a list with at least one name of a task")
    try:
        lm_eval: Any = importlib.import_module("lm_eval")
        tasks_of: Any = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise DataError(
            f"lm-evaluation-harness is needed ({error}): pip install 'metafocus[eval]'"
        ) from error
    manager = tasks_of.TaskManager(
        include_path=None if include_path is None else str(include_path),
        include_defaults=include_path is None,
        metadata=metadata,
    )
    arguments: dict[str, Any] = {"pretrained": str(model), "dtype": dtype}
    simple_evaluate: Any = lm_eval.simple_evaluate
    found = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=list(tasks),
        batch_size=batch_size,
        device=device,
        limit=limit,
        apply_chat_template=True,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        metadata=metadata,
    )
    report = {
        **{k: found[k] for k in ("results", "versions", "n-samples", "configs", "samples")},
        "metafocus": _about(arguments, tasks, limit, batch_size, device, seed),
    }
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {**report, "samples": {k: [_short(s) for s in v] for k, v in _samples(report)}}
        write_whole(path, json.dumps(kept, indent=1, default=str) + "\n")
    return report


def _about(
    arguments: dict[str, Any],
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
    device: str,
    seed: int,
) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    from metafocus.comparison.report import environment

    return {
        "model_args": arguments,
        "tasks": list(tasks),
        "limit": limit,
        "batch_size": batch_size,
        "device": device,
        "seed": seed,
        "lm_eval": version("lm_eval"),
        "transformers": version("transformers"),
        "environment": environment(getattr(torch, arguments["dtype"])),
    }


def _samples(report: dict[str, Any]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    return report["samples"].items()


def _short(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample without its long prompt."""
    kept = {k: v for k, v in sample.items() if k not in ("doc", "arguments")}
    doc = {k: v for k, v in sample["doc"].items() if k != "prompt"}
    return {**kept, "doc": doc}
