"""W6: one step of FocuSFT against the official code, and against plain fine-tuning."""

from __future__ import annotations

from typing import Any

from benchmarks.rivals.targets import Target

TITLE = "W6: a FocuSFT step against the official code"
TEXT = """
Qwen2 of 12 layers, hidden 256, two rows of 512 tokens of which a quarter are answers, K = 2, rank
32, float32. The plain steps score the same answers without an inner loop, so their gradient is
another one; the one with the same mask is this library's own, lean in the same places. With
checkpointing, our inner loop still keeps its activations where the memory of the machine allows it
(`inner_checkpointing="auto"`), which costs memory and saves time.
"""
REFERENCE = "official"
TOLERANCE = 1e-11  # the same products, summed in another order
REPEATS = 4
MEMORY: dict[str, Any] = {}
COUNTABLE = {"checkpointing": False}
"""Of which cases the live tensors are counted: what counts them keeps what is checkpointed."""
BASELINES = ("plain SFT, same mask", "plain SFT, transformers")


def cases(quick: bool) -> list[dict[str, Any]]:
    """Two vocabularies, without and with activation checkpointing."""
    return [
        {"vocabulary": vocabulary, "checkpointing": checkpointing}
        for vocabulary in ((4096,) if quick else (4096, 32000))
        for checkpointing in (False, True)
    ]


def check_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the case with the smaller vocabulary."""
    return {**case, "vocabulary": 4096}


def data(case: dict[str, Any]) -> dict[str, Any]:
    """Return the fast weights that both start from; each builds the same model and batch."""
    from benchmarks import focusft_step

    return {"start": focusft_step.start(size(case))}


def size(case: dict[str, Any]) -> Any:
    """Return the model and the batch of a case."""
    from benchmarks.focusft_step import Size

    return Size(vocabulary=case["vocabulary"])


def report(results: dict[str, Any]) -> list[str]:
    """Return what the products alone allow."""
    lines = []
    for vocabulary in dict.fromkeys(run["case"]["vocabulary"] for run in results["runs"]):
        ours, plain = products(vocabulary)
        lines.append(
            f"Counted in products of layers and head at vocabulary {vocabulary}, a plain step is "
            f"{plain / 1e9:.0f} GFLOP, one with the two inner steps {ours / 1e9:.0f}: "
            f"{ours / plain:.2f} times as much is the least.{_most(results, vocabulary)}"
        )
    for run in results["runs"]:
        memory = {k: row.get("process_bytes") for k, row in run["rows"].items()}
        if run["threads"] == 1 and all(memory.get(k) for k in (REFERENCE, *BASELINES)):
            least = min(memory[k] for k in BASELINES) / memory[REFERENCE]
            at = ", ".join(f"{k} {v}" for k, v in run["case"].items())
            lines.append(
                f"At {at} a plain step, without any inner loop, needs {least:.2f} of the official "
                "code's memory."
            )
    return [" ".join(lines), ""]


def _most(results: dict[str, Any], vocabulary: int) -> str:
    """Return what the products leave of the official code's time, at the speed of a plain step."""
    case = {"vocabulary": vocabulary, "checkpointing": False}
    runs = [run["rows"] for run in results["runs"] if run["case"] == case and run["threads"] == 1]
    seconds = [{name: row.get("seconds") for name, row in rows.items()} for rows in runs]
    if not seconds or not all(seconds[0].get(k) for k in (REFERENCE, BASELINES[0])):
        return ""
    ours, plain = products(vocabulary)
    most = seconds[0][REFERENCE] / seconds[0][BASELINES[0]] * plain / ours
    return f" At its speed, {most:.2f} times as fast as the official code is the most."


def products(vocabulary: int) -> tuple[float, float]:
    """Return the operations of our step and of a plain one, the last layer at answers only."""
    from benchmarks.focusft_step import flop

    at = size({"vocabulary": vocabulary})
    ours, plain = (flop(at, name, last=0.25) for name in ("metafocus", BASELINES[0]))
    return ours, plain


def _targets(vocabulary: int, fast: float, checkpointed: float, leaner: float) -> list[Target]:
    case = {"vocabulary": vocabulary}
    ours, plain = products(vocabulary)
    return [
        Target(f"at least {fast} times as fast", "metafocus", REFERENCE, 1 / fast,
               case={**case, "checkpointing": False}),
        Target(f"at least {checkpointed} times as fast", "metafocus", REFERENCE, 1 / checkpointed,
               case={**case, "checkpointing": True}),
        Target(f"at least {leaner} times less memory", "metafocus", REFERENCE, 1 / leaner,
               "process_bytes", case),
        Target("at most 1.1 times what the products allow", "metafocus", BASELINES[0],
               1.1 * ours / plain, case={**case, "checkpointing": False}),
    ]  # fmt: skip


TARGETS = [*_targets(4096, 1.45, 1.3, 1.2), *_targets(32000, 2.2, 1.7, 1.6)]
