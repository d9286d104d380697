"""FocuSFT's step with sequences shared by several GPUs: overhead on one, time and memory on more.

    torchrun --nproc-per-node=1 benchmarks/sequence_parallel.py     # overhead of the exchanges
    torchrun --nproc-per-node=4 benchmarks/sequence_parallel.py     # four GPUs, one sequence
    torchrun --nproc-per-node=2 benchmarks/sequence_parallel.py --device cpu --quick   # a trial

Random weights in bfloat16, layers as in Qwen2.5-7B, one row of FocuSFT's turns, activation
checkpointing, two inner steps; first order, and second order by recomputation. "alone" is every
rank running the whole sequence by itself, "shared" all ranks sharing it; with one process the
exchanges are those of a group of one rank, so the difference is what they cost. Median seconds of
the slowest rank after a first step, and the largest peak of the allocator. No result is kept here:
it has been tried on CPUs only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
from attention_gpu import ANSWERS, CONTEXT_TURNS
from transformers import Qwen2Config, Qwen2ForCausalLM

import metafocus as mf
from metafocus.comparison.report import environment

SEVEN_B = dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
TINY = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
ORDERS = {"first order": mf.FirstOrder(), "second order": mf.Unrolled(recompute=True)}


def chat(length: int, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Eight times a context turn and an answer, the same on every rank."""
    place = torch.arange(length) * CONTEXT_TURNS
    turn, inside = place.div(length, rounding_mode="floor"), place % length
    answer = inside >= (1 - ANSWERS) * length
    ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "turn_ids": 2 * turn + answer, "answer_mask": answer}
    return {name: x[None].to(device) for name, x in batch.items()}


def largest(value: float, device: torch.device) -> float:
    """The largest value of all ranks."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def measure(model, batch, estimator, group, repeats: int) -> dict[str, float]:
    device = batch["input_ids"].device
    cuda = device.type == "cuda"
    generator = torch.Generator(device=device).manual_seed(0)
    meta = mf.recipes.focusft(model, estimator=estimator, generator=generator, sequence_group=group)
    seconds = []
    for repeat in range(repeats + 1):
        if repeat == 1 and cuda:
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        start = time.perf_counter()
        loss, _ = meta({}, mf.Episode(batch, batch))
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "seconds": largest(statistics.median(seconds[1:]), device),
        "peak_bytes": largest(peak, device),
        "loss": float(loss.detach()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short sequences")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device(given.device, int(os.environ["LOCAL_RANK"]) if cuda else None)
    if cuda:
        torch.cuda.set_device(device)
    size, lengths = (TINY, [256]) if given.quick else (SEVEN_B, given.lengths)
    torch.manual_seed(0)
    config = Qwen2Config(
        **size, num_hidden_layers=given.layers, max_position_embeddings=max(lengths)
    )
    mf.attention.register()
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(
            config, attn_implementation="metafocus_ulysses", dtype=torch.bfloat16
        )
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    rows = []
    for length in lengths:
        batch = chat(length, config.vocab_size, device)
        for order, estimator in ORDERS.items():
            for name, group in (("alone", None), ("shared", dist.group.WORLD)):
                row = {"length": length, "order": order, "name": name}
                try:
                    row |= measure(model, batch, estimator, group, given.repeats)
                except torch.cuda.OutOfMemoryError:
                    # Only where each rank is alone: the others would wait for one that left.
                    if group is not None:
                        raise
                    row["error"] = "out of memory"
                rows.append(row)
    if dist.get_rank() == 0:
        report = {"ranks": dist.get_world_size(), "layers": given.layers, "rows": rows}
        print(json.dumps({**report, "environment": environment(torch.bfloat16)}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
