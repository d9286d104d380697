"""Compare trained checkpoints as a stranger would: with plain transformers.

python examples/demo_report.py demo/sft demo/focusft
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = "What does the function `textwrap.dedent` do?"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
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
            "-" if same is None else f"{same:.4f}",
            f"{report['seconds']:.0f}",
        )
    Console(width=110).print(table)
    for path in args.checkpoints:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        fresh = AutoModelForCausalLM.from_config(model.config)
        same_keys = model.state_dict().keys() == fresh.state_dict().keys()
        chat = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        print(f"{path}: loaded by plain transformers; keys of an untouched model: {same_keys}")
        print(f"  {QUESTION}\n  -> {answer!r}")


if __name__ == "__main__":
    main()
