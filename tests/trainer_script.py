"""Real processes for the tests of the Trainer: killed ones, and ranks that train together.

`python trainer_script.py crash DIR` and `python trainer_script.py ranks DIR` import everything
once, fork the processes they need and write what these saw to DIR.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from processes import environments, forked, wait
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

import metafocus as mf
from metafocus.adapters import LoRA, top_layers
from metafocus.data import Collator
from metafocus.trainer import FocusArguments, FocusTrainer
from metafocus.trainer.distributed import through

VOCAB = 37
COLLATOR = Collator(pad_token_id=0)
NAMES = ("gate_proj", "up_proj", "down_proj")
ADAPTER = LoRA(top_layers(0.5, NAMES), rank=2, alpha=4.0)
SECOND_ORDER = mf.Unrolled(recompute=True)


def tiny(dtype: torch.dtype = torch.float64, **changes) -> Qwen2ForCausalLM:
    torch.manual_seed(3)
    config = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(Qwen2Config(**{**config, **changes})).to(dtype)


def sample(length: int, answers: list[int], seed: int) -> dict[str, torch.Tensor]:
    """One context turn and one answer turn; without answers, context alone."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[answers] = True
    first = min(answers, default=length)
    return {
        "input_ids": torch.randint(1, VOCAB, (length,), generator=generator),
        "turn_ids": (torch.arange(length) >= first).long(),
        "answer_mask": mask,
    }


SAMPLES = [
    sample(9, [6, 7, 8], 0),
    sample(5, [4], 1),
    sample(12, [3, 4, 5, 6, 7, 8, 9, 10], 2),
    sample(7, [2, 3, 6], 3),
    sample(6, [5], 4),
    sample(8, [4, 5, 6, 7], 5),
    sample(10, [], 6),
    sample(7, [3, 4], 7),
]


def arguments(folder, **changes) -> FocusArguments:
    settings = dict(
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        layer_fraction=0.5,
        lora_rank=2,
        lora_alpha=4.0,
        dataloader_pin_memory=False,
        seed=11,
    )
    return FocusArguments(str(folder), **{**settings, **changes})


def trainer(model, folder, *, samples=SAMPLES, heldout=None, callbacks=None, kept=None, **changes):
    return FocusTrainer(
        model,
        arguments(folder, **changes),
        train_dataset=samples,
        eval_dataset=heldout,
        data_collator=COLLATOR,
        callbacks=callbacks,
        **(kept or {}),
    )


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@torch.no_grad()
def mean_answer_loss(model, samples, mask=None) -> float:
    """The mean over answer tokens, from log probabilities of one sequence at a time.

    Args:
        model: any causal model of transformers.
        samples: of one document each.
        mask: a function of the length, `[S, S]` boolean; None: causal.
    """
    model.eval()
    losses = []
    for one in samples:
        ids, answers = one["input_ids"], one["answer_mask"].bool()
        seen = None if mask is None else mask(len(ids))[None, None]
        logits = model(input_ids=ids[None], attention_mask=seen, use_cache=False).logits[0]
        table = logits.double().log_softmax(-1)
        losses += [-table[i - 1, ids[i]].item() for i in range(1, len(ids)) if answers[i]]
    return sum(losses) / len(losses)


# --- killed processes ------------------------------------------------------------------------


class Diary(TrainerCallback):
    """Writes what was logged at once: a killed process has logged all it knew."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            logged = {k: v for k, v in logs.items() if k != "inner_time_share"}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logged}) + "\n")


CRASH_STEPS = 24


def run_once(folder: Path, diary: Path) -> None:
    """The command that is given again after every crash."""
    # Dropout draws from the global random state, which must come back too.
    model = tiny(torch.float32, attention_dropout=0.1)
    run = trainer(
        model, folder, callbacks=[Diary(diary)], max_steps=CRASH_STEPS, save_strategy="steps",
        save_steps=2, save_total_limit=3, gradient_accumulation_steps=2,
        per_device_train_batch_size=1, lr_scheduler_type="cosine", warmup_steps=3,
    )  # fmt: skip
    run.train(resume_from_checkpoint=True)
    run.save_model(str(folder / "final"))


def crash(folder: Path) -> None:
    chance = random.Random(5)
    whole, killed = folder / "whole", folder / "killed"
    code = wait(forked(lambda: run_once(whole, folder / "whole.jsonl")))
    diary = folder / "killed.jsonl"
    diary.touch()
    kills = []
    for low, high in ((1, 6), (8, 13), (15, 20)):
        aim, pid = chance.randint(low, high), forked(lambda: run_once(killed, diary))
        while logged(diary) < aim:
            time.sleep(0.002)
        # Some of these moments lie in the middle of writing a checkpoint.
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        kills.append([aim, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0])
    last = wait(forked(lambda: run_once(killed, diary)))
    (folder / "report.json").write_text(json.dumps({"codes": [code, last], "kills": kills}))


def logged(diary: Path) -> int:
    lines = diary.read_text().splitlines()
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


# --- ranks -----------------------------------------------------------------------------------


def ranks(folder: Path) -> None:
    codes = [wait(forked(lambda: torch.save(alone_facts(folder), folder / "alone.pt")))]
    codes += pair(lambda r: torch.save(rank_facts(folder), folder / f"rank{r}.pt"))
    (folder / "report.json").write_text(json.dumps({"codes": codes}))


def pair(work) -> list[int]:
    """Run `work(rank)` in two processes of one group."""
    pids = [forked(lambda r=r: work(r), env) for r, env in enumerate(environments(2))]
    return [wait(pid) for pid in pids]


# Newer transformers call it so, and warn of the other name.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in {field.name for field in dataclasses.fields(FocusArguments)}
    else "gradient_checkpointing"
)
METHODS = {
    "sft": {"method": "sft", "mask": "context-bidirectional"},
    "focusft": {},
    "second-order": {"estimator": "unrolled-recompute"},
    "checkpointing": {CHECKPOINTING: True},
}


def trained(folder: Path, accumulation: int, **changes) -> dict:
    """Two optimiser steps of four samples each, one of them without an answer."""
    model = tiny()
    run = trainer(
        model, folder / "run", max_steps=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation, heldout=SAMPLES[:5],
        per_device_eval_batch_size=2, **changes,
    )  # fmt: skip
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    return {"weights": weights(model), "logs": logs, "eval": run.evaluate()["eval_loss"]}


def alone_facts(folder: Path) -> dict:
    facts = {name: trained(folder, 4, **changes) for name, changes in METHODS.items()}
    for name, estimator in ESTIMATORS.items():
        facts[f"grad {name}"] = [gradient(name, estimator, r)[1] for r in range(2)]
    facts["no answers"] = unanswered(folder, [SAMPLES[0], SAMPLES[2]])
    return facts


ESTIMATORS = {"first": None, "second": SECOND_ORDER, "graph": mf.Unrolled()}


def gradient(name: str, estimator, rank: int, wrap=lambda model: model):
    """The gradient of one rank's batch, as `wrap` makes it."""
    model = tiny()
    wrapped = wrap(model)
    generator = torch.Generator().manual_seed(rank)
    meta = mf.recipes.focusft(model, adapter=ADAPTER, estimator=estimator, generator=generator)
    batch = COLLATOR(SAMPLES[:2] if rank == 0 else SAMPLES[2:4])
    loss = through(wrapped, lambda b: meta({}, mf.Episode(b, b))[0], batch)
    between = getattr(wrapped, "buckets", [0])[0]
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    return [between, getattr(wrapped, "buckets", [0])[0]], grads


def counted(model):
    """DDP with a hook that counts what it sends."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrapped = DistributedDataParallel(model)
    wrapped.buckets = [0]

    def hook(state, bucket):
        wrapped.buckets[0] += 1
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)
    return wrapped


def rank_facts(folder: Path) -> dict:
    rank = int(os.environ["RANK"])
    facts = {name: trained(folder, 2, **changes) for name, changes in METHODS.items()}
    for name, estimator in ESTIMATORS.items():
        facts[f"grad {name}"] = gradient(name, estimator, rank, counted)
        if estimator is not SECOND_ORDER:
            facts[f"fsdp {name}"] = sharded(estimator, rank)
    facts["fsdp checkpointing"] = sharded(None, rank, checkpointing=True)
    # Every sample of the second rank is without an answer.
    data = [SAMPLES[0], SAMPLES[6], SAMPLES[2], SAMPLES[6]]
    facts["no answers"] = unanswered(folder, data)
    dist.barrier()
    return facts


def unanswered(folder: Path, data: list) -> torch.Tensor:
    """What one step of gradient descent subtracts, on the given samples in their order."""
    model = tiny()
    run = trainer(model, folder / "run", samples=data, max_steps=1, max_grad_norm=0.0,
                  per_device_train_batch_size=1, gradient_accumulation_steps=2,
                  train_sampling_strategy="sequential", optim="sgd", learning_rate=1.0,
                  adaptation_start="step")  # fmt: skip
    before = weights(model)
    run.train()
    return before - weights(model)


def sharded(estimator, rank: int, *, checkpointing: bool = False) -> torch.Tensor:
    """The gradient under FSDP2; second order keeps the parameters gathered, by its own switches."""
    from torch.distributed.fsdp import fully_shard

    model = tiny()
    if checkpointing:
        # The second is its older name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    first = estimator is None
    for module in (*model.model.layers, model):
        fully_shard(module, reshard_after_forward=first)
    if not first:
        model.set_reshard_after_backward(False)
    generator = torch.Generator().manual_seed(rank)
    meta = mf.recipes.focusft(model, adapter=ADAPTER, generator=generator, estimator=estimator)
    batch = COLLATOR(SAMPLES[:2] if rank == 0 else SAMPLES[2:4])
    meta({}, mf.Episode(batch, batch))[0].backward()
    if not first:
        for module in (*model.model.layers, model):
            module.reshard()
    return torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"crash": crash, "ranks": ranks}[sys.argv[1]](Path(sys.argv[2]))
