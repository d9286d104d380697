"""FocuSFT inside TRL: `python examples/trl_sft.py [--steps 3]`.

TRL's SFTTrainer prepares the data set, the chat template and the collator; the mixin puts the
meta-loss where its loss was. Nothing of TRL is copied, and nothing in it is replaced at run time.
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from metafocus.data import train_tokenizer
from metafocus.trainer import FocusMixin, FocusOptions


class FocusSFTTrainer(FocusMixin, SFTTrainer):
    """TRL's SFTTrainer with FocuSFT's loss, evaluation and resumption."""


def main(steps: int = 3) -> FocusSFTTrainer:
    facts = {"red": "apple", "yellow": "lemon", "green": "pear", "blue": "plum"}
    chats = [
        {
            "prompt": [{"role": "user", "content": f"Which fruit is {colour}? {noise}"}],
            "completion": [{"role": "assistant", "content": f"The {fruit}."}],
        }
        for noise in ("Think.", "Be brief.", "Answer.")
        for colour, fruit in facts.items()
    ]
    texts = [m["content"] for chat in chats for part in chat.values() for m in part]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            max_length=128,
        )
        trainer = FocusSFTTrainer(
            model,
            args,
            focus=FocusOptions(layer_fraction=0.5, lora_rank=4),
            train_dataset=Dataset.from_list(chats),
            eval_dataset=Dataset.from_list(chats[:4]),
            processing_class=tokenizer,
        )
        trainer.train()
        print(trainer.evaluate())
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    main(parser.parse_args().steps)
