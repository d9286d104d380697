"""Test-time training: adapt fast weights to a prompt, and keep them as a PEFT adapter.

Before it answers, the model takes steps on its prompt (`mf.recipes.qttt`: LoRA on the queries, the
next-token loss of the context). The fast weights can be bound, or written as a PEFT adapter.
"""

from pathlib import Path

import torch
from metafocus.training import Schedule, train
from peft import PeftModel
from transformers import AutoModelForCausalLM

import metafocus as mf
from metafocus.cli import options
from metafocus.data import Collator, encode_chats, stdlib_qa
from metafocus.models import model_and_tokenizer
from metafocus.recipes import export


def main(argv=None):
    parser = options.Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/test_time_training"))
    options.add_model(parser)  # --model, --device, --seed, ...
    args = parser.parse_args(argv)
    model, tokenizer = model_and_tokenizer(args, stdlib_qa.texts, 256)
    collator = Collator(pad_token_id=tokenizer.pad_token_id)

    def chats(split, n):
        made = stdlib_qa.generate(tokenizer, split=split, n=n, context_tokens=160, seed=args.seed)
        return encode_chats(made, tokenizer, max_length=256).samples

    # A model made on the spot knows nothing: teach it to read. No fast weights, all tokens.
    if args.model is None:
        nothing = mf.LoRA(mf.top_layers(0.0, ("q_proj",)))
        read = mf.lm_loss(model, adapter=nothing, mask=mf.masks.causal, tokens=mf.all_tokens)
        schedule = Schedule(60 if args.quick else 1000, lr=3e-3)

        def plain(_, episode):
            return read({}, {}, episode.query), mf.Aux({}, torch.zeros(0))

        train(model, plain, chats("train", 100), collator, schedule, progress=not args.quick)
    # Inference: each of two prompts gets fast weights of its own.
    model.eval()
    batch = {k: v.to(args.device) for k, v in collator(chats("heldout", 2)).items()}
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
        prompt = batch["input_ids"][row : row + 1, :length].cpu()
        fast = {k: v[row].cpu() for k, v in aux.params.items()}
        base = AutoModelForCausalLM.from_pretrained(args.output / "model").eval()
        loaded = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad(), queries.bind(model.cpu(), fast):
            bound = model(prompt).logits
        with torch.no_grad():
            error = (loaded(prompt).logits - bound).abs().max().item()
            moved = (model(prompt).logits - bound).abs().max().item()
        differences.append((error, moved))
        print(
            f"{folder}: PEFT's logits differ by {error:.1e} at most; adaptation moved {moved:.2f}"
        )
    return {"losses": losses, "differences": differences}


if __name__ == "__main__":
    main()
