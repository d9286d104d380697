"""How much memory does `metafocus train` take on a large file? `python benchmarks/large_file.py`.

It writes 500 MB of chats as JSONL and trains a small model on them for three steps, in a new
process. All chats are read and encoded; a tenth is held out, of which 200 are evaluated. It adds up
the resident memory of that process and its children every 50 ms, and ends with 1 if the sum is ever
above `--limit`. Memory that processes share is counted for each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil
import torch

from metafocus.comparison.report import environment
from metafocus.files import write_json

MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 2048, "max_length": 1024}
STEPS = {
    "max_steps": 3,
    "max_eval_samples": 200,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
}
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
TRAINING = {**MODEL, **STEPS, **QUIET, "dataloader_pin_memory": False}


def write_chats(path: Path, size: int) -> int:
    """Write chats of made-up words until the file has `size` bytes; return their number."""
    draw, count = random.Random(0), 0
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(draw.choices(letters, k=draw.randint(2, 10))) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            words = [draw.choices(vocabulary, k=n) for n in (200, 8, 40)]
            roles = ("system", "user", "assistant")
            turns = [
                {"role": role, "content": " ".join(text)}
                for role, text in zip(roles, words, strict=True)
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
            count += 1
    return count


def peak_of(command: list[str]) -> tuple[int, float, float]:
    """Run a command; return its status, the peak memory of its processes in MiB, and seconds."""
    begin, peak = time.perf_counter(), 0.0
    process = psutil.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        used = 0
        for one in [process, *_children(process)]:
            try:
                used += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, used / 2**20)
        time.sleep(0.05)
    return process.returncode, peak, time.perf_counter() - begin


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def main(argv: list[str] | None = None) -> int:
    """Write, train, measure; return 1 if it took more memory than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=500, help="MB; default %(default)s")
    parser.add_argument("--limit", type=float, default=2000, help="MB; default %(default)s")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "chats.jsonl")
        chats = write_chats(data, args.size * 10**6)
        settings = {**TRAINING, "train_file": data, "output_dir": Path(folder, "run")}
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        code, peak, seconds = peak_of([sys.executable, "-m", "metafocus", "train", *flags])
    if code:
        raise SystemExit(f"the training ended with {code}")
    found = {
        "date": date.today().isoformat(),
        "file_mb": args.size,
        "chats": chats,
        "peak_mb": round(peak * 2**20 / 10**6),
        "seconds": round(seconds),
    }
    print(f"{args.size} MB, {chats} chats: peak {found['peak_mb']} MB, {found['seconds']} s")
    if args.output:
        write_json(args.output, {**found, "environment": environment(torch.float32)})
    return int(found["peak_mb"] > args.limit)


if __name__ == "__main__":
    sys.exit(main())
