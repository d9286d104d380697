"""Memory of language-model losses, in fresh processes: real RSS."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch
import metafocus as mf
from metafocus.comparison.memory import process_memory
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)
steps, recompute = int(sys.argv[1]), sys.argv[2] == "recompute"
torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(
    vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    attn_implementation="eager"))
ids = torch.randint(0, 1000, (2, 256))
answers = torch.zeros(2, 256, dtype=torch.bool)
answers[:, 200:] = True
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "answer_mask": answers,
         "turn_ids": answers.long()}
meta = mf.recipes.focusft(
    model,
    adapter=mf.LoRA(mf.top_layers(0.5, ("gate_proj", "up_proj", "down_proj")), 8, 16.0),
    solver=mf.SGD(0.1, steps), estimator=mf.Unrolled(recompute=recompute))
small = {k: v[:, :8] for k, v in batch.items()}
small["answer_mask"] = small["answer_mask"] | True
meta({}, mf.Episode(small, small))[0].backward()
before = process_memory("VmRSS")
meta({}, mf.Episode(batch, batch))[0].backward()
print(json.dumps(process_memory("VmHWM") - before))
"""

HEAD = """
import json, sys
import torch
import metafocus as mf
from metafocus.comparison.memory import process_memory
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(
    vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
    attn_implementation="sdpa"))
ids = torch.randint(0, 32000, (1, 1024))
answers = torch.zeros(1, 1024, dtype=torch.bool)
answers[:, 768:] = True
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "answer_mask": answers,
         "turn_ids": answers.long()}
loss = mf.lm_loss(model, adapter=mf.LoRA(lambda model: ()), mask=mf.masks.causal)

def plain(fast, slow, batch):
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    targets = torch.where(batch["answer_mask"], batch["input_ids"], -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

if sys.argv[1] == "all":
    loss = plain
small = {k: v[:, 760:776] for k, v in batch.items()}
loss({}, {}, small).backward()
before = process_memory("VmRSS")
loss({}, {}, batch).backward()
print(json.dumps(process_memory("VmHWM") - before))
"""


def peak(*arguments, script=SCRIPT):
    # Large blocks go back to the system at once, so the peak of the process is that of the
    # computation.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_recompute_is_flat_in_the_inner_steps():
    two, sixteen, graph = peak(2, "recompute"), peak(16, "recompute"), peak(16, "graph")
    # Measured here: 76 MB at 2 and at 16 steps; the graph form 153 MB and 940 MB.
    assert sixteen < 1.15 * two
    assert graph > 4 * sixteen


@pytest.mark.slow
def test_head_on_scored_positions_holds_a_chunk_of_logits():
    """Vocabulary 32000, 1024 tokens, a quarter of them answers, loss and gradient."""
    scored, every = peak("scored", script=HEAD), peak("all", script=HEAD)
    # All logits in float32 are 131 MB. Measured here: 63 MB and 405 MB, of which the weight's
    # gradients are 16 MB in both.
    assert every > 5 * scored
