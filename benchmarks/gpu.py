"""The section on a GPU of docs/benchmarks.md, from what the two scripts for GPUs measured."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]


def section(step: Report, attention: Report) -> list[str]:
    """Return the lines: a step of a large model's layers, then attention alone."""
    at = step["environment"]
    by = {(row["name"], row["length"]): row for row in step["rows"]}
    lines = [
        "",
        "## On a GPU",
        "",
        f"One step of {step['layers']} layers as in Qwen2.5-7B, bfloat16, activation "
        f"checkpointing, two inner steps, one row; {at['device']}, torch {at['torch']}; median of "
        f"{step['repeats']} steps after a first one, in a process for each contender; peak of the "
        "allocator. `python benchmarks/focusft_gpu.py --official CHECKOUT` measures it. "
        "Utilisation counts the products that the method needs, without recomputation.",
        "",
        "| tokens | contender | seconds | of official's | peak GB | of official's | utilisation |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for length in sorted({row["length"] for row in step["rows"]}):
        base = by["official", length]
        for row in (row for row in step["rows"] if row["length"] == length):
            if "error" in row:
                lines.append(f"| {length} | {row['name']} | {row['error']} | | | | |")
                continue
            lines.append(
                f"| {length} | {row['name']} | {row['seconds']:.3f} | "
                f"{row['seconds'] / base['seconds']:.2f} | {row['peak_bytes'] / 2**30:.1f} | "
                f"{row['peak_bytes'] / base['peak_bytes']:.2f} | {row['utilisation']:.0%} |"
            )
    lines += _attention(attention)
    return lines


def _attention(report: Report) -> list[str]:
    shape, at = report["shape"], report["environment"]
    errors = dict(report["relative_errors"])
    length = errors.pop("length")
    lines = [
        "",
        f"FocuSFT's attention alone, {shape['heads']} query heads and {shape['kv']} key heads of "
        f"{shape['size']}, {at['dtype']}, forward and gradient; {at['device']}, torch "
        f"{at['torch']}; median of {report['repeats']} (`python benchmarks/attention_gpu.py`).",
        *([f"These rows were {report['source']}."] if "source" in report else []),
        "",
        "| order | tokens | contender | ms | of the first one's time | peak MB |",
        "|---:|---:|---|---:|---:|---:|",
    ]
    for row in report["rows"]:
        start = f"| {row['order']} | {row['length']} | {row['contender']} |"
        if "error" in row:
            lines.append(f"{start} {row['error']} | | |")
            continue
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        megabytes = row["peak_bytes"] / 2**20 if isinstance(row["peak_bytes"], int) else None
        peak = "" if megabytes is None else f"{megabytes:.0f}"
        lines.append(f"{start} {row['seconds'] * 1e3:.1f} | {ratio} | {peak} |")
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return [*lines, "", f"Relative errors against float32 at {length} tokens: {told}."]
