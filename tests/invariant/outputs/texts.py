"""What is made of text: questions of the evaluations, encoded chats, masks, answers."""

from __future__ import annotations

import torch
from outputs import versions
from outputs.models import POLICIES, model_of

from metafocus import masks
from metafocus.data import Collator, encode_chats, pack
from metafocus.evals import babilong, builtin_prose, ruler
from metafocus.evals.run import answers


def words(text: str) -> int:
    return len(text.split())


def questions():
    """The generated questions of every task."""
    sentences = builtin_prose("train").sentences
    pool = [
        ruler.Question(f"What is {i}?", (f"it-{i}",), (f"{sentences[i]} It is it-{i}.",))
        for i in range(200)
    ]
    found = {}
    for task in babilong.TASKS:
        made = babilong.generate(words, task=task, length=600, n=3)
        found[f"babilong {task}"] = repr([x.chat() for x in made] + [x.record() for x in made])
    for task in ruler.TASKS:
        made = ruler.generate(words, task=task, length=1500, n=3, questions=pool)
        found[f"ruler {task}"] = repr([x.chat() for x in made] + [x.record() for x in made])
    made = versions.stdlib_qa().generate(words, n=4, context_tokens=300, turns=2)
    return {**found, "stdlib": repr(made)}


def encoded():
    """Chats as tokens and turns, padded and packed, and what each mask lets them see."""
    tokenizer = versions.tokenizer().train_tokenizer(builtin_prose("train").sentences[:300], 800)
    chats = versions.stdlib_qa().generate(tokenizer, n=4, context_tokens=120, turns=2)
    made = encode_chats(chats, tokenizer, max_length=300).samples
    collate = Collator(pad_token_id=tokenizer.pad_token_id)
    batches = {"padded": collate(made), "packed": collate(pack(made, 700))}
    seen = {
        f"{name}, {policy}": torch.stack(tuple(getattr(masks, policy)(batch)))
        for name, batch in batches.items()
        for policy in POLICIES
    }
    return {"vocabulary": repr(sorted(tokenizer.get_vocab().items())), "masks": seen, **batches}


def asked():
    """The greedy answers of a random model to generated questions."""
    tokenizer = versions.tokenizer().train_tokenizer(builtin_prose("train").sentences[:300], 800)
    model = model_of(
        torch.float64, vocab_size=len(tokenizer), max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    items = [
        *babilong.generate(words, task="qa1", length=0, n=2),
        *ruler.generate(words, task="vt", length=250, n=2),
    ]
    return repr(answers(model, tokenizer, items, batch_size=3))


OUTPUTS = {"questions": questions, "encoded chats": encoded, "answers": asked}
