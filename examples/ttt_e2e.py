"""TTT-E2E on a toy task: a model whose weights go on learning while it reads.

Each text uses a cipher of its own, which maps letters to letters, again and again. The model sees
only the last 16 tokens, so it must keep the cipher in its weights. `mf.recipes.ttt_e2e` scores a
chunk, takes a step on it, and differentiates the mean score through all steps (arXiv 2512.23675).
For comparison the same network is trained with steps of length 0: a model with a sliding window.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import metafocus as mf

LETTERS, CHUNK, LENGTH = 8, 16, 96
CONFIG = Qwen2Config(
    vocab_size=2 * LETTERS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def draw(texts, generator):
    """Return texts, stacked for `mf.over_tasks`: a letter, its cipher, a letter, ..."""
    ids = []
    for _ in range(texts):
        cipher = LETTERS + torch.randperm(LETTERS, generator=generator)
        letters = torch.randint(LETTERS, (LENGTH // 2,), generator=generator)
        ids.append(torch.stack([letters, cipher[letters]], 1).reshape(1, LENGTH))
    known = torch.arange(LENGTH) % 2 == 1  # the letters themselves are random
    batch = {"input_ids": torch.stack(ids), "answer_mask": known.expand(texts, 1, LENGTH)}
    return mf.Episode(batch, batch)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/ttt_e2e"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    curves = {}
    for name, rate in (("fixed while it reads", 0.0), ("learns while it reads", 1.0)):
        torch.manual_seed(args.seed)
        model = Qwen2ForCausalLM(CONFIG)
        meta = mf.recipes.ttt_e2e(
            model,
            chunk=CHUNK,
            window=CHUNK,
            adapter=mf.FullWeights(mf.top_layers(0.5, ("mlp",))),
            solver=mf.SGD(rate, steps=1),
            estimator=mf.Unrolled() if rate else mf.FirstOrder(),
            **{f"{level}_tokens": mf.answer_tokens for level in ("inner", "outer")},
        )
        meta, generator = mf.over_tasks(meta), torch.Generator().manual_seed(args.seed)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(50 if args.quick else 300):
            meta({}, draw(4, generator))[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        curves[name] = meta({}, draw(20, generator))[1].inner_losses.mean(0).tolist()
        print(f"{name:22}", *(f"{value:.2f}" for value in curves[name]))
    print(f"loss of each chunk of {CHUNK} tokens; guessing costs {math.log(LETTERS):.2f}")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "ttt_e2e.json").write_text(json.dumps(curves, indent=2) + "\n")
    return curves


if __name__ == "__main__":
    main()
