"""The section of docs/benchmarks.md on the modelled step, from `results/roofline.json`."""

from __future__ import annotations

from typing import Any

NAMES = {
    "official": "official",
    "metafocus": "metafocus",
    "plain": "plain SFT, same mask",
    "transformers": "plain SFT, transformers",
}
TEXT = """
No GPU was at hand for these changes, so their effect on the step above is **modelled and not
measured**. `python -m benchmarks.roofline` records the operations of a step at small sizes,
rescales them to the 7B layers, and computes when a host that issues them one after another and a
device that works through them are done (`benchmarks/roofline/machine.py`). Its constants were
committed before the first change. They were fitted to the eight measured rows, so that the model
agrees with these is no proof: the largest difference is {worst:.1%}. The time of a synchronisation
that reads spans (1.5 ms) has no other source than this fit. cuDNN's kernels on slices have not run
on a GPU yet; the model gives them the rate of transformers' own causal attention.
"""


REST = [
    "",
    "The check that inner losses are finite is one synchronisation for all inner steps, after the "
    "last of them; a step of `recipes.focusft` has no other check of values.",
    "",
    "FA3 and FA4: torch 2.13 has a registry for them, and "
    '`torch.nn.attention.activate_flash_attention_impl("FA3")` replaces the operators that the '
    "variable-length kernels here call. After this call, which torch leaves to the user, they are "
    "used, once they have agreed with tiles on a small attention (`flash.fault`). A test on a CPU "
    "shows that an activated implementation is called; neither has run on a GPU from here.",
    "",
    "RMSNorm is left as transformers has it. If each norm were one kernel (in the model: a product "
    "with its weight), a step would take 8% less at 4,096 tokens (0.179 s instead of 0.196 s by "
    "variable-length kernels, 2,579 kernels instead of 3,266) and 4% less at 32,768 (2.59 s "
    "instead of 2.70 s). That is an upper bound. To use `F.rms_norm`, the forward pass of a norm "
    "would have to be replaced by the name of its class. It would round otherwise than the same "
    "model does when it is served, and its second derivative on CUDA needs a GPU to be checked.",
]


def section(step: dict[str, Any], changes: list[dict[str, Any]]) -> list[str]:
    """Return the lines: the rows before and after, then one line for each change."""
    measured = {(row["name"], row["length"]): row["seconds"] for row in step["rows"]}
    before = {(row["name"], row["length"]): row for row in changes[0]["rows"]}
    after = {(r["name"], r["length"]): r for entry in changes for r in entry["rows"]}
    errors = [
        abs(row["seconds"] / measured[NAMES[name], length] - 1)
        for (name, length), row in before.items()
    ]
    lines = ["", "## The step on a GPU, modelled", "", " ".join(TEXT.split()).format(
        worst=max(errors)
    )]  # fmt: skip
    lines += [
        "",
        "| tokens | contender | measured s, before | modelled s, before | modelled s, now | "
        "synchronisations |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for (name, length), row in sorted(before.items(), key=lambda item: item[0][1]):
        now = after[name, length]
        waits = [sum(x["synchronisations"].values()) for x in (row, now)]
        lines.append(
            f"| {length} | {NAMES[name]} | {measured[NAMES[name], length]:.3f} | "
            f"{row['seconds']:.3f} | {now['seconds']:.3f} | {waits[0]} to {waits[1]} |"
        )
    lines += [
        "",
        "metafocus, change by change (each row has all changes above it; modelled):",
        "",
        "| change | tokens | kernels | GB moved | TFLOP | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for entry in changes:
        for row in (row for row in entry["rows"] if row["name"] == "metafocus"):
            lines.append(
                f"| {entry['change']} | {row['length']} | {row['kernels']} | "
                f"{row['gigabytes']:.0f} | {row['teraflop']:.0f} | {row['seconds']:.3f} |"
            )
    waits = after["metafocus", 4096]["synchronisations"]
    listed = "; ".join(f"{name} ({number})" for name, number in waits.items())
    return [*lines, "", f"The synchronisations of a FocuSFT step now: {listed}.", *REST]
