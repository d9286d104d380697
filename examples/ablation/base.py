"""The small decoder that every cell starts from: pre-trained here, with Hugging Face's Trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scale import Scale
from tasks import chat, prose, samples
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from metafocus.cli.models import small_qwen2
from metafocus.data import encode_chat
from metafocus.evals.prose import Prose
from metafocus.tokenizer import SPECIAL_TOKENS, train_tokenizer

PROSE_SHARE, REPEAT_SHARE, NOISE_SHARE = 0.15, 0.2, 0.2
TURNS = 3
TEXT, ANSWER, REPEATED, UNKNOWABLE = range(4)  # kinds of tokens; the last are in no loss


class Rows(Dataset):
    """Rows of one length: short chats of every task one after another, prose, or repetitions.

    A repetition is random tokens twice. They teach within minutes what looking something up in
    the context is made of, and prose alone takes hours to. Row i depends on i alone, so that a run
    which is resumed sees what it would have seen.
    """

    def __init__(self, scale: Scale, tokenizer: Any, noise: Prose):
        self.scale, self.tokenizer, self.noise = scale, tokenizer, noise
        self.tasks = scale.trained + scale.held_out

    def __len__(self) -> int:
        return self.scale.pretrain_steps * self.scale.pretrain_rows

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rng, size = random.Random(f"row {i}"), self.scale.pretrain_length
        draw = rng.random()
        if draw < REPEAT_SHARE:
            ids, kinds = self._repetition(rng, size)
        elif draw < REPEAT_SHARE + PROSE_SHARE:
            text = " ".join(self.noise.stretch(self.noise.place(rng), size // 8))
            ids = torch.tensor(self.tokenizer("<|im_start|>" + text)["input_ids"])
            kinds = torch.full_like(ids, TEXT)
        else:
            ids = kinds = torch.empty(0, dtype=torch.long)
        while len(ids) < size:
            near = int(rng.random() < NOISE_SHARE)
            messages = chat(rng.choice(self.tasks), rng, self.noise, near, TURNS)
            encoded = encode_chat(messages, self.tokenizer)
            ids = torch.cat((ids, encoded["input_ids"]))
            kinds = torch.cat((kinds, torch.where(encoded["answer_mask"], ANSWER, TEXT)))
        return {"input_ids": ids[:size], "kinds": kinds[:size]}

    def _repetition(self, rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        half = size // 2
        first, specials = self.tokenizer("<|im_start|>")["input_ids"], len(SPECIAL_TOKENS)
        drawn = [rng.randrange(specials, len(self.tokenizer)) for _ in range(half)]
        ids = torch.tensor([*first, *drawn, *drawn])
        kinds = torch.tensor([UNKNOWABLE] * (half + 1) + [REPEATED] * half)
        return ids, kinds


class KindsCount(Trainer):
    """Pre-training in which the few tokens of answers weigh as much as all others."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum of the mean losses of text, of answers and of repetitions."""
        ids, kinds = inputs["input_ids"], inputs["kinds"][:, 1:].flatten()
        logits = model(input_ids=ids).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        masks = [kinds == kind for kind in (TEXT, ANSWER, REPEATED)]
        # Over counts of at least one: a batch may lack a kind.
        return sum((losses * m).sum() / m.sum().clamp(min=1) for m in masks)


def make_base(scale: Scale, directory: Path, seed: int = 0) -> None:
    """Pre-train into `directory`, from its last checkpoint if there is one; do nothing if done."""
    if (directory / "config.json").exists():
        return
    noise = prose("train")
    texts = [
        m["content"]
        for i in range(1000)
        for task in scale.trained + scale.held_out
        for m in chat(task, random.Random(f"text {i}"), noise, 0, TURNS)
    ]
    tokenizer: Any = train_tokenizer([*texts, *noise.sentences], vocab_size=scale.vocabulary)
    torch.manual_seed(seed)
    model = small_qwen2(tokenizer, scale.hidden, scale.layers, 4 * max(scale.lengths), "sdpa")
    model.config.pad_token_id = tokenizer.pad_token_id
    work = directory.with_name(directory.name + "-training")
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=scale.pretrain_steps,
        per_device_train_batch_size=scale.pretrain_rows,
        learning_rate=scale.pretrain_lr,
        warmup_steps=min(100, scale.pretrain_steps // 10),
        lr_scheduler_type="cosine",
        weight_decay=0.01,
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
    tokenizer.save_pretrained(directory)
    # config.json is written with the weights, last: what is half written is not taken for done.
    model.save_pretrained(directory)


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
