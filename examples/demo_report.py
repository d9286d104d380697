"""Compare trained checkpoints as a stranger would: with plain transformers.

python examples/demo_report.py demo/sft demo/focusft --before smollm2
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import metafocus as mf
from metafocus.lm import prefilled

QUESTION = "What does the function `textwrap.dedent` do?"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--before", help="the model that training began with, to answer first")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    args = parser.parse_args()
    table = Table(title="held-out answer loss, without adaptation (nats per token)")
    for head in ("checkpoint", "trained with", "before", "after", "with the training mask", "s"):
        table.add_column(head)
    for path in args.checkpoints:
        report = json.loads((path / "metafocus.json").read_text())
        before, after = report["heldout_loss_before"], report["heldout_loss_after"]
        same = after.get("training mask")
        table.add_row(
            str(path),
            f"{report['method']}, {report['mask']}",
            f"{before['deployed']:.4f}",
            f"{after['deployed']:.4f}",
            "-" if same is None else f"{before['training mask']:.4f} -> {same:.4f}",
            f"{report['seconds']:.0f}",
        )
    Console(width=110).print(table)
    print(QUESTION)
    if args.before:
        model, tokenizer = mf.models.load(args.before)
        print(f"before: {mf.models.described(model)}")
        answer(model, tokenizer, args.tokens)
    for path in args.checkpoints:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        fresh = AutoModelForCausalLM.from_config(model.config)
        same_keys = model.state_dict().keys() == fresh.state_dict().keys()
        print(f"{path}: loaded by plain transformers; keys of an untouched model: {same_keys}")
        answer(model, tokenizer, args.tokens)


def answer(model, tokenizer, tokens):
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    # As deployed, by transformers alone; then with the prompt read under FocuSFT's mask.
    trained = prefilled(model, dict(prompt), mf.masks.context_bidirectional)
    for name, inputs in (("as deployed", prompt), ("bidirectional prompt", trained)):
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        print(f"  {name}: {text!r}")


if __name__ == "__main__":
    main()
