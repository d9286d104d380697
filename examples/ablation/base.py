"""The small decoder that every cell starts from: pre-trained here, with Hugging Face's Trainer.

Every row and every chat begins with a token that stands nowhere else, as in Llama or Gemma: what
attends to nothing in particular can rest there.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from induction import plant_induction
from scale import Scale
from tasks import WORLD, chat, code_words, prose, samples
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from metafocus.data import encode_chat
from metafocus.data.tokenizer import train_tokenizer
from metafocus.evals.prose import Prose

PROSE_SHARE, REPEAT_SHARE, NOISE_SHARE = 0.15, 0.1, 0.4
NEAR = (1, 1, 2, 4)  # sentences of noise in a short chat that has any
TURNS = 3
FIRST = "<|begin|>"
TEXT, ANSWER, REPEATED, UNKNOWABLE = range(4)  # kinds of tokens; the last are in no loss
WEIGHTS = {TEXT: 1.0, ANSWER: 4.0, REPEATED: 1.0}


class Rows(Dataset):
    """Rows of one length: short chats of every task one after another, prose, or repetitions.

    A repetition is a few random words of the tasks two to four times over. Row i depends on i
    alone, so that a run which is resumed sees what it would have seen.
    """

    def __init__(self, scale: Scale, tokenizer: Any, noise: Prose):
        self.scale, self.tokenizer, self.noise = scale, tokenizer, noise
        self.tasks = scale.trained + scale.held_out
        words = [self._ids(" " + word) for word in (*code_words(), *WORLD.names)]
        self.words = [ids[0] for ids in words if len(ids) == 1]

    def __len__(self) -> int:
        return self.scale.pretrain_steps * self.scale.pretrain_rows

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rng, size = random.Random(f"row {i}"), self.scale.pretrain_length
        draw = rng.random()
        ids, kinds = [self.tokenizer.bos_token_id], [UNKNOWABLE]
        if draw < REPEAT_SHARE:
            while len(ids) < size:
                period = int(2 * (size / 4) ** rng.random())
                again = rng.choice((1, 2, 3)) * period
                drawn = [rng.choice(self.words) for _ in range(period)]
                ids += drawn + (drawn * 3)[:again]
                kinds += [UNKNOWABLE] * period + [REPEATED] * again
        elif draw < REPEAT_SHARE + PROSE_SHARE:
            text = " ".join(self.noise.stretch(self.noise.place(rng), size // 8))
            ids += self._ids(text)
            kinds += [TEXT] * (len(ids) - 1)
        while len(ids) < size:
            near = rng.choice(NEAR) if rng.random() < NOISE_SHARE else 0
            messages = chat(rng.choice(self.tasks), rng, self.noise, near, TURNS)
            encoded = encode_chat(messages, self.tokenizer)
            ids += encoded["input_ids"][1:].tolist()
            kinds += torch.where(encoded["answer_mask"], ANSWER, TEXT)[1:].tolist()
        return {"input_ids": torch.tensor(ids[:size]), "kinds": torch.tensor(kinds[:size])}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]


class KindsCount(Trainer):
    """Pre-training in which the few tokens of answers weigh more than all others."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted sum of the mean losses of text, of answers and of repetitions."""
        ids, kinds = inputs["input_ids"], inputs["kinds"][:, 1:].flatten()
        logits = model(input_ids=ids).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        masks = {kind: kinds == kind for kind in WEIGHTS}
        # Over counts of at least one: a batch may lack a kind.
        means = {k: (losses * m).sum() / m.sum().clamp(min=1) for k, m in masks.items()}
        return sum(WEIGHTS[kind] * mean for kind, mean in means.items())


def make_base(scale: Scale, directory: Path, seed: int = 0) -> None:
    """Pre-train into `directory`, from its last checkpoint if there is one; do nothing if done."""
    if directory.exists():
        return
    noise = prose("train")
    draft = directory.with_name(directory.name + "-draft")
    tokenizer, config = prepared(scale, noise, draft)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    plant_induction(model, tokenizer.bos_token_id, torch.Generator().manual_seed(seed))
    work = directory.with_name(directory.name + "-training")
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=scale.pretrain_steps,
        per_device_train_batch_size=scale.pretrain_rows,
        learning_rate=scale.pretrain_lr,
        warmup_steps=min(100, scale.pretrain_steps // 10),
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.98,
        save_steps=max(scale.pretrain_steps // 20, 1),
        save_total_limit=1,
        logging_steps=max(scale.pretrain_steps // 30, 1),
        remove_unused_columns=False,
        report_to=[],
        seed=seed,
    )
    trainer = KindsCount(model, arguments, train_dataset=Rows(scale, tokenizer, noise))
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(draft)
    # Renamed at the end: what is half written is not taken for done.
    draft.rename(directory)


def prepared(scale: Scale, noise: Prose, draft: Path) -> tuple[Any, Qwen2Config]:
    """Write a tokenizer and a configuration into `draft`; return both as they will be loaded."""
    texts = [
        m["content"]
        for i in range(1000)
        for task in scale.trained + scale.held_out
        for m in chat(task, random.Random(f"text {i}"), noise, 0, TURNS)
    ]
    roles = ["user", "assistant"] * len(texts)
    made: Any = train_tokenizer([*texts, *roles, *noise.sentences], vocab_size=scale.vocabulary)
    made.add_special_tokens({"bos_token": FIRST})
    made.chat_template = "{{- bos_token }}\n" + made.chat_template
    heads = scale.hidden // 32
    config = Qwen2Config(
        vocab_size=len(made),
        hidden_size=scale.hidden,
        intermediate_size=3 * scale.hidden,
        num_hidden_layers=scale.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=4 * max(scale.lengths),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )
    made.save_pretrained(draft)
    config.save_pretrained(draft)
    # transformers splits words beside a Qwen2 in its own way: train with what will be loaded.
    return AutoTokenizer.from_pretrained(draft), config


def load_base(directory: Path) -> tuple[Any, Any]:
    """Return the base and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
    return model, AutoTokenizer.from_pretrained(directory)


def held_out_samples(scale: Scale, tokenizer: Any) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Return the questions that every cell answers, by task and length."""
    noise = prose("heldout")
    return {
        task: {
            length: samples((task,), scale.questions, "held out", noise, length, tokenizer)
            for length in scale.lengths
        }
        for task in scale.trained + scale.held_out
    }
