"""Are the numbers before and after a change of the code the same, to the last bit?

    PYTHONPATH=OLD python tests/invariant/before_after.py --write before.json
    PYTHONPATH=NEW python tests/invariant/before_after.py --against before.json

`--against` prints which figures moved and by how much, and exits with 1 if any did; those that
were meant to move (`meant`) are printed too, but not counted. `--only WORD` runs the outputs whose
names contain the word, `--list` names them all. The script runs on one
thread, on the code before the redesign of the contract (commit f9c4d91) as well as on today's:
`outputs/versions.py` has the few places where the two are called differently.

A figure is a tensor (dicts of tensors are joined in the order of their names), a number or a text.
It is kept as the SHA-256 of its bytes and a few of its values as hexadecimal floats, from which the
size of a difference is taken. Exact sums depend on the processor and on the versions of torch and
its libraries, so a file is compared only with runs in the same environment: `--against` names
what differs. `before.json` was written at f9c4d91; on another machine write one there first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from outputs import algorithms, hypergradients, models, tasks, texts, training
from torch import Tensor

import metafocus as mf

KEPT = 4
TYPES = {"float64": torch.float64, "float32": torch.float32}
HALF = (
    "maml, graph", "imaml, CG", "imaml, Neumann", "adam", "muon", "over tasks, vmap", "SOBA",
    "focusft, sdpa", "focusft, second order, metafocus", "focusft, full weights",
    "language model loss", "profile", "export",
)  # fmt: skip
"""The outputs that are computed in bfloat16 as well."""


# --- figures -------------------------------------------------------------------------------------


def figures(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their places; the tensors of a dict are joined, by type."""
    if isinstance(value, Mapping) and value and all(isinstance(x, Tensor) for x in value.values()):
        types = sorted({x.dtype for x in value.values()}, key=str)
        for dtype in types:
            flat = [value[k].detach().flatten() for k in sorted(value) if value[k].dtype == dtype]
            yield f"{path} {dtype}".strip("/") if len(types) > 1 else path[1:], torch.cat(flat)
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from figures(value[key], f"{path}/{key}")
    elif isinstance(value, tuple | list):
        for i, x in enumerate(value):
            name = value._fields[i] if hasattr(value, "_fields") else i
            yield from figures(x, f"{path}/{name}")
    elif value is not None:
        yield path[1:], value


def kept(value: Any) -> dict[str, Any]:
    """What the file says of a figure."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(KEPT, len(flat))).long()
        return {
            "type": f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}",
            "sha256": digest(flat.view(torch.uint8).numpy().tobytes()),
            "values": " ".join(map(short, flat[places].tolist())),
        }
    if isinstance(value, bool | int | float):
        return {"type": type(value).__name__, "values": short(value)}
    text = value if isinstance(value, bytes) else str(value).encode()
    return {"type": type(value).__name__, "sha256": digest(text), "text": str(value)[:60]}


def short(number: float) -> str:
    """A hexadecimal float without the zeros at its end."""
    mantissa, power, exponent = float(number).hex().partition("p")
    return mantissa.rstrip("0").rstrip(".") + power + exponent


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def environment() -> dict[str, str]:
    """What exact sums and generated questions depend on beside the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "unknown")


# --- runs ----------------------------------------------------------------------------------------


def outputs() -> dict[str, tuple[Any, torch.dtype | None]]:
    """All outputs by name: a function, and the type that it is given."""
    typed = {}
    for module in (hypergradients, tasks, algorithms, models, training):
        typed |= module.OUTPUTS
    found = {f"{k}, {t}": (f, dtype) for k, f in typed.items() for t, dtype in TYPES.items()}
    found |= {f"{k}, bfloat16": (typed[k], torch.bfloat16) for k in HALF}
    return {**found, **{k: (f, None) for k, f in texts.OUTPUTS.items()}}


def computed(run: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """The figures of one output; what it raises is a figure too."""
    torch.manual_seed(0)
    random.seed(0)
    try:
        result = run() if dtype is None else run(dtype)
    except Exception as error:
        traceback.print_exc()
        return {"raised": {"type": "raised", "text": f"{type(error).__name__}: {error}"[:200]}}
    return {place: kept(value) for place, value in figures(result)}


def run_all(word: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, (run, dtype) in outputs().items():
        if word in name:
            begin = time.perf_counter()
            found[name] = computed(run, dtype)
            seconds = time.perf_counter() - begin
            print(f"{name}: {len(found[name])} figures, {seconds:.1f} s", file=sys.stderr)
    return found


def write(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Write one line for each output."""
    lines = [f" {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in found.items()]
    head = f'{{"environment": {json.dumps(environment())},\n"outputs": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n}}\n")


# --- the comparison ------------------------------------------------------------------------------


def meant(name: str, place: str, before: dict[str, Any], new: Any) -> str | None:
    """Return why a figure was meant to move, if it moved in just this way."""
    old = before.get(place)
    if name.startswith("over tasks") and place in ("backward/grads", "wrapped"):
        if new == before["hypergrad/grads"]:
            return "all ways add gradients chunk by chunk, as hypergrad alone did"
    if name.startswith("compare"):
        if place.endswith("verdict"):
            return "the words for verdicts are new"
        if place == "penalty/hvp_evaluations" and new == kept(0):
            return "counted for every estimator"
        eps = next(torch.finfo(dtype).eps for t, dtype in TYPES.items() if t in name)
        if old and new and apart(old, new) < 4 * eps:
            return "sums over each tensor in float64, not over all in one"
    return None


def moved(
    name: str, before: dict[str, Any], after: dict[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """Yield each figure of one output that is not what it was, with the reason if it has one."""
    if "raised" in after:
        yield f"raised {after['raised']['text']}", None
        return
    for place in dict.fromkeys([*before, *after]):
        old, new = before.get(place), after.get(place)
        if old != new:
            line = f"{place}: {difference(old, new)}".removeprefix(": ")
            yield line, meant(name, place, before, new)


def apart(old: dict[str, Any], new: dict[str, Any]) -> float:
    """Return the largest difference of the kept values, relative to the largest of them."""
    a, b = values(old), values(new)
    size = max(map(abs, a), default=0.0)
    far = max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)
    return far / size if size else far and float("inf")


def values(figure: dict[str, Any]) -> list[float]:
    return [float.fromhex(x) for x in figure["values"].split()]


def difference(old: dict[str, Any] | None, new: dict[str, Any] | None) -> str:
    if old is None or new is None:
        return "is missing" if new is None else "is new"
    if old["type"] != new["type"]:
        return f"{new['type']} instead of {old['type']}"
    if "values" not in old:
        return f"{new['text']!r} instead of {old['text']!r}"
    relative = apart(old, new)
    if not relative:
        return f"{old['type']}: differs elsewhere than in the values that are kept"
    a, b = max(zip(values(old), values(new), strict=True), key=lambda x: abs(x[0] - x[1]))
    return f"{old['type']}: {relative:.1e} relative, {b!r} instead of {a!r}"


def compare(before: dict[str, Any], after: dict[str, Any], word: str) -> int:
    """Print what moved; return how many outputs did."""
    for key, value in environment().items():
        if before["environment"][key] != value:
            print(f"another environment: {key} {before['environment'][key]} -> {value}")
    expected = {k: v for k, v in before["outputs"].items() if word in k}
    count = 0
    for name in dict.fromkeys([*expected, *after]):
        lines = list(moved(name, expected.get(name, {}), after.get(name, {})))
        count += any(reason is None for _, reason in lines)
        for line, reason in lines:
            print(f"{name}: {line}" + (f" (meant: {reason})" if reason else ""))
    total = sum(map(len, expected.values()))
    print(f"{count} of {len(expected)} outputs ({total} figures) moved; {mf.__file__}")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="write the figures to this file")
    parser.add_argument("--against", type=Path, help="compare the figures with those of this file")
    parser.add_argument("--only", default="", help="a word in the names of the outputs to compute")
    parser.add_argument("--list", action="store_true", help="name all outputs")
    args = parser.parse_args()
    if args.list:
        print(*outputs(), sep="\n")
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = run_all(args.only)
    if args.write:
        write(args.write, found)
    if args.against:
        return int(compare(json.loads(args.against.read_text()), found, args.only) > 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
