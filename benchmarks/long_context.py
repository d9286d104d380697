"""An exact second-order FocuSFT hypergradient by length, with eager attention and with spans.

    python benchmarks/long_context.py --output benchmarks/results/long_context.json

A Qwen2 of 4 layers, hidden 64, LoRA on the MLPs of all layers, so below attention too; K = 2 inner
steps, `Unrolled(recompute=True)`, float32, one thread, one row. Each figure is of a fresh process:
seconds of CPU time, and the growth of its peak RSS. A process may use `--limit` bytes of memory;
what needs more is reported with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import metafocus as mf
from metafocus.comparison.memory import process_memory
from metafocus.comparison.report import environment

NAMES = ("gate_proj", "up_proj", "down_proj")


def batch(length: int) -> dict[str, Tensor]:
    """Four turns of context, each followed by an answer of a quarter of its tokens."""
    index = torch.arange(length)[None]
    size = length // 4
    answer = index % size >= size - size // 4
    ids = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    turns = index // size * 2 + answer
    ones = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": ones, "answer_mask": answer, "turn_ids": turns}


def run(length: int, attention: str) -> dict[str, float]:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        attn_implementation=attention,
    )
    model = transformers.Qwen2ForCausalLM(config)
    adapter = mf.LoRA(mf.top_layers(1.0, NAMES), 8, 16.0)
    meta = mf.recipes.focusft(model, adapter=adapter, estimator=mf.Unrolled(recompute=True))
    data = batch(length)
    before, start = process_memory("VmRSS"), time.process_time()
    loss, _ = meta({}, mf.Episode(data, data))
    loss.backward()
    squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    return {
        "seconds": time.process_time() - start,
        "peak_bytes": process_memory("VmHWM") - before,
        "loss": loss.item(),
        "gradient_norm": squares**0.5,
    }


def fresh(length: int, attention: str, limit: int) -> dict[str, float | str]:
    words = [sys.executable, __file__, "--one", attention, str(length), "--limit", str(limit)]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **malloc})
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if "Error" in x or "memory" in x]
        return {"error": lines[-1].strip() if lines else f"signal {-done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--limit", type=int, default=20 * 2**30, help="bytes; default 20 GiB")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("ATTENTION", "LENGTH"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        resource.setrlimit(resource.RLIMIT_DATA, (args.limit, args.limit))
        print(json.dumps(run(int(args.one[1]), args.one[0])))
        return
    rows = []
    for length in map(int, args.lengths.split(",")):
        for attention in ("eager", "sdpa"):
            row = fresh(length, attention, args.limit)
            rows.append({"length": length, "attention": attention, **row})
            print(rows[-1], flush=True)
    if args.output:
        report = {
            "benchmark": "long_context",
            "environment": environment(torch.float32),
            "limit": args.limit,
            "rows": rows,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
