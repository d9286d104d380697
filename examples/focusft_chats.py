"""FocuSFT on chats of your own: from a JSONL file to a checkpoint that plain transformers loads.

With a model and chats of yours: --model_name_or_path DIR --train_file chats.jsonl. Without, chats
are invented and a small Qwen2 is made. As a command this is `metafocus train`.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import metafocus as mf
from metafocus.data import encode_chats, read_chats

THINGS, PLACES = "lamp map key book coin rope".split(), "drawer shelf box bag desk chest".split()


def invent(path, count, seed):
    """Write chats: a list of notes, and a question that one of them answers."""
    rng, lines = random.Random(seed), []
    for _ in range(count):
        notes = dict(zip(rng.sample(THINGS, 4), rng.sample(PLACES, 4), strict=True))
        thing = rng.choice(list(notes))
        text = " ".join(f"The {a} is in the {b}." for a, b in notes.items())
        said = {"user": f"{text} Where is the {thing}?", "assistant": f"In the {notes[thing]}."}
        messages = [{"role": role, "content": content} for role, content in said.items()]
        lines.append(json.dumps({"messages": messages}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model_name_or_path", dest="name")
    parser.add_argument("--train_file", type=Path)
    parser.add_argument("--output", type=Path, default=Path("out/focusft_chats"))
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)

    # Chats become tokens, with the answers marked; a tenth of them is held out.
    records = read_chats(args.train_file or invent(args.output / "chats.jsonl", 240, args.seed))
    texts = [message["content"] for record in records for message in record["messages"]]
    torch.manual_seed(args.seed)
    model, tokenizer = mf.models.load(args.name) if args.name else mf.models.small(texts)
    samples = encode_chats(records, tokenizer, max_length=256).samples
    held, samples = samples[: len(samples) // 10], samples[len(samples) // 10 :]

    # Before each step new LoRA weights adapt to the batch; the step is conditioned on them.
    run = mf.FocusArguments(
        str(args.output), max_steps=(6 if args.name else 60) if args.quick else 600,
        per_device_train_batch_size=1 if args.name else 4, seed=args.seed, save_strategy="no",
        learning_rate=1e-5 if args.name else 3e-3,
    )  # fmt: skip
    data = {"train_dataset": samples, "eval_dataset": held}
    trainer = mf.FocusTrainer(model, run, **data, processing_class=tokenizer)
    before, _ = trainer.evaluate()["eval_loss"], trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out answer loss, as deployed: {before:.3f} before, {after:.3f} after")

    # The checkpoint is a plain one: transformers alone loads it, with the same logits.
    trainer.save_model(str(args.output / "model"))
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
