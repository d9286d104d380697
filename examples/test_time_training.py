"""Test-time training: adapt fast weights to a prompt, and keep them as a PEFT adapter.

Before it answers, the model takes steps on its prompt (`mf.recipes.qttt`: LoRA on the queries, the
next-token loss of the context). The fast weights can be bound, or written as a PEFT adapter.
"""

import argparse
import random
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import metafocus as mf
from metafocus.data import Collator, encode_chats, stdlib_qa
from metafocus.recipes import export


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/test_time_training"))
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    name, texts = args.model_name_or_path, stdlib_qa.texts()
    model, tokenizer = mf.models.load(name) if name else mf.models.small(texts, max_length=256)
    collator = Collator(pad_token_id=tokenizer.pad_token_id)

    def chats(split, n):
        made = stdlib_qa.generate(tokenizer, split=split, n=n, context_tokens=160, seed=args.seed)
        return encode_chats(made, tokenizer, max_length=256).samples

    # A model made on the spot knows nothing: teach it to read. No fast weights, all tokens.
    if name is None:
        kinds = {"mask": mf.masks.causal, "tokens": mf.all_tokens}
        read = mf.lm_loss(model, adapter=mf.NoAdapter(), **kinds)
        samples, rng = chats("train", 100), random.Random(args.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60 if args.quick else 1000):
            read({}, {}, collator(rng.sample(samples, 4))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    # Inference: each of two prompts gets fast weights of its own.
    model.eval()
    batch = collator(chats("heldout", 2))
    queries = mf.LoRA(mf.top_layers(1.0, ("q_proj",)), rank=8, alpha=16.0)
    solver = mf.SGD(2.0, steps=16, clip=mf.clip_per_tensor(1.0))
    adapt = mf.recipes.qttt(model, adapter=queries, solver=solver)
    with torch.no_grad():
        _, aux = adapt({}, mf.Episode(batch, batch))
    losses = aux.inner_losses.tolist()
    print(f"loss on the prompts: {losses[0]:.3f}, after {len(losses) - 1} steps {losses[-1]:.3f}")

    # Bound, they are in force inside the block; exported, each is an adapter for plain PEFT.
    folders = export(model, queries, aux.params, args.output / "adapters")
    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    differences = []
    for row, folder in enumerate(folders):
        length = int(batch["attention_mask"][row].sum())
        prompt = batch["input_ids"][row : row + 1, :length]
        fast = {k: v[row] for k, v in aux.params.items()}
        base = AutoModelForCausalLM.from_pretrained(args.output / "model").eval()
        loaded = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad(), queries.bind(model, fast):
            bound = model(prompt).logits
        with torch.no_grad():
            error = (loaded(prompt).logits - bound).abs().max().item()
            moved = (model(prompt).logits - bound).abs().max().item()
        differences.append((error, moved))
        print(f"{folder}: PEFT's logits differ by {error:.1e} at most; adapting moved {moved:.2f}")
    return {"losses": losses, "differences": differences}


if __name__ == "__main__":
    main()
