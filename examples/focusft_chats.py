"""FocuSFT on chats of your own: from a JSONL file to a checkpoint that plain transformers loads.

With a model and chats of yours: --model DIR --lr 1e-5 --data chats.jsonl, one chat a line:
{"messages": [{"role": "user", "content": "..."}, ...]}. Without, chats are invented and a small
Qwen2 is made. The trained model is a plain one: fast weights are thrown away after each step.
"""

import json
import random
from pathlib import Path

import torch
from metafocus.training import Schedule, evaluate, train
from transformers import AutoModelForCausalLM, AutoTokenizer

import metafocus as mf
from metafocus.cli import options
from metafocus.data import Collator, encode_chats, read_chats
from metafocus.models import model_and_tokenizer

THINGS, PLACES = "lamp map key book coin rope".split(), "drawer shelf box bag desk chest".split()


def invent(path, count, seed):
    """Write chats: a list of notes, and a question that one of them answers."""
    rng, lines = random.Random(seed), []
    for _ in range(count):
        notes = dict(zip(rng.sample(THINGS, 4), rng.sample(PLACES, 4), strict=True))
        thing = rng.choice(list(notes))
        text = " ".join(f"The {a} is in the {b}." for a, b in notes.items())
        user = {"role": "user", "content": f"{text} Where is the {thing}?"}
        answer = {"role": "assistant", "content": f"In the {notes[thing]}."}
        lines.append(json.dumps({"messages": [user, answer]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def main(argv=None):
    parser = options.Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("out/focusft_chats"))
    options.add_model(parser)  # --model, --device, --seed, ...
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    # Chats become tokens, with the answers marked; a tenth of them is held out.
    records = read_chats(args.data or invent(args.output / "chats.jsonl", 240, args.seed))
    texts = [message["content"] for record in records for message in record["messages"]]
    model, tokenizer = model_and_tokenizer(args, lambda: texts, 256)
    samples = encode_chats(records, tokenizer, max_length=256).samples
    held, samples = samples[: len(samples) // 10], samples[len(samples) // 10 :]
    collator = Collator(pad_token_id=tokenizer.pad_token_id)

    # Before each step fresh LoRA weights adapt to the batch; the step is conditioned on them.
    meta = mf.recipes.focusft(model)
    before = evaluate(model, held, collator, mask=mf.masks.causal)
    schedule = Schedule(60 if args.quick else 600, lr=args.lr)
    train(model, meta, samples, collator, schedule, progress=not args.quick)
    after = evaluate(model, held, collator, mask=mf.masks.causal)
    print(f"held-out answer loss, as deployed: {before:.3f} before, {after:.3f} after")

    # The checkpoint is a plain one: transformers alone loads it, with the same logits.
    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    loaded = AutoModelForCausalLM.from_pretrained(args.output / "model").eval()
    words = AutoTokenizer.from_pretrained(args.output / "model")
    *chat, expected = records[0]["messages"]
    prompt = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        same = torch.equal(model.cpu().eval()(**prompt).logits, loaded(**prompt).logits)
    reply = loaded.generate(**prompt, max_new_tokens=8, do_sample=False)[0, len(prompt[0]) :]
    answer = words.decode(reply, skip_special_tokens=True)
    print(f"plain transformers: equal logits: {same}; {expected['content']!r} -> {answer!r}")
    return {"before": before, "after": after, "same": same, "answer": answer}


if __name__ == "__main__":
    main()
