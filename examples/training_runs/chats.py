"""Which of 64 training chats helped a language model's answers to 4 questions; is that true?

It makes chats about Python's standard library, then runs

    metafocus attribute --train_file train.jsonl --query_file query.jsonl --leave_one_out 8 ...

and at last compares the metagradient of 8 chats with central differences, in float64. On
SmolLM2-135M this takes most of an hour on one core.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import metafocus as mf
from metafocus.data import Collator, encode_chats, stdlib_qa
from metafocus.files import write_json


def write_chats(path, tokenizer, split, n, seed):
    chats = stdlib_qa.generate(tokenizer, split=split, n=n, context_tokens=150, seed=seed)
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return chats


def against_central_differences(name, train, query, *, steps, step_size=1e-2):
    """Return the metagradient of the chats' weights for one query, exact and measured.

    The norms of the model compute in float32 whatever its type, so that a loss has an error of
    about 1e-7, which a step of 1e-3 would turn into 1e-3 of these slopes. The error of the central
    difference itself is its third derivative times `step_size^2 / 6`.
    """
    model, tokenizer = mf.models.load(name, dtype=torch.float64)
    model.requires_grad_(False).eval()
    adapter = mf.LoRA(mf.top_layers(1.0, ("q_proj", "v_proj")), rank=8)
    loss = mf.lm_loss(model, adapter=adapter, mask=mf.masks.causal)
    collator = Collator(tokenizer.pad_token_id)

    def prepared(chats):
        samples = encode_chats(chats, tokenizer, max_length=256, strict=True).samples
        return [loss.prepare(collator([sample])) for sample in samples]

    def losses(fast, batch):
        return torch.stack([loss(fast, {}, one) for (one,) in batch])

    start = adapter.init(model, torch.Generator().manual_seed(0))
    stream = mf.Batches.from_dataset(
        [(row,) for row in prepared(train)],
        batch_size=2,
        steps=steps,
        generator=torch.Generator().manual_seed(0),
        collate=lambda chosen: [row for _, row in chosen],
    )
    found = mf.recipes.attribution(
        losses,
        lambda: {k: v.double() for k, v in start.items()},
        stream,
        [(row,) for row in prepared(query)],
        solver=mf.SGD(0.1, steps, momentum=0.9),
        runs_at_once=1,
    )
    moves = step_size * torch.eye(len(train), dtype=torch.float64)
    up, down = (found.retrained(1 + sign * moves)[:, 0] for sign in (1, -1))
    return found.scores[0].tolist(), ((up - down) / (2 * step_size)).tolist()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", default="smollm2")
    parser.add_argument("--output_dir", type=Path, default=Path("out/attribution_chats"))
    args = parser.parse_args(argv)
    folder, name = args.output_dir, args.model_name_or_path
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = mf.models.load(name)[1]
    train = write_chats(folder / "train.jsonl", tokenizer, "train", 64, 0)
    query = write_chats(folder / "query.jsonl", tokenizer, "heldout", 4, 1)

    exact, measured = against_central_differences(name, train[:8], query[:1], steps=4)
    difference = torch.tensor(exact) - torch.tensor(measured)
    error = (difference.norm() / torch.tensor(measured).norm()).item()
    print(f"8 data weights, 4 steps, float64: relative error {error:.1e} to central differences")
    check = {"exact": exact, "central differences": measured, "relative error": error}
    write_json(folder / "central_differences.json", check)

    flags = {
        "model_name_or_path": name, "train_file": folder / "train.jsonl",
        "query_file": folder / "query.jsonl", "output_dir": folder, "max_steps": 16,
        "max_train_samples": 64, "leave_one_out": 8,
    }  # fmt: skip
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    subprocess.run([sys.executable, "-m", "metafocus", "attribute", *words], check=True)


if __name__ == "__main__":
    main()
