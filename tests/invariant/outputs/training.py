"""Steps of the Trainer, attention profiles, exported files."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path

import torch
from outputs import versions
from outputs.models import ADAPTER, SOLVER, batch_of, model_of
from torch import Tensor

import metafocus as mf
from metafocus import masks
from metafocus.data import Collator


def samples() -> list[dict[str, Tensor]]:
    """Eight chats of one question and one answer."""
    found = []
    for i, (length, first) in enumerate(((9, 6), (5, 4), (12, 3), (7, 2), (6, 5), (8, 4)) * 2):
        ids = torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(i))
        answer = torch.arange(length) >= first
        found.append({"input_ids": ids, "turn_ids": answer.long(), "answer_mask": answer})
    return found


def trainer(**changes):
    """Three steps with AdamW, their logged losses, and the evaluation after them."""

    def run(dtype):
        module = versions.trainer()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            settings = dict(
                max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
                save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True, seed=11,
                layer_fraction=0.5, lora_rank=2, lora_alpha=5.0, inner_lr=0.7,
                dataloader_pin_memory=False,
            )  # fmt: skip
            args = module.FocusArguments(folder, **{**settings, **changes})
            model = model_of(dtype)
            training = module.FocusTrainer(
                model, args, train_dataset=samples(), eval_dataset=samples()[:5],
                data_collator=Collator(pad_token_id=0),
            )  # fmt: skip
            training.train()
            scored = training.evaluate()["eval_loss"]
        names = ("loss", "grad_norm", "learning_rate", "inner_loss_first", "inner_loss_last")
        logs = [
            {k: x[k] for k in names if k in x} for x in training.state.log_history if "loss" in x
        ]
        weights = {k: v.detach() for k, v in model.named_parameters()}
        return {"weights": weights, "logs": logs, "eval_loss": scored}

    return run


# --- profiles and files --------------------------------------------------------------------------


def profile(dtype):
    """Where the model looks, by layer and by head, without and with adapted fast weights."""
    found = {}
    for policy in ("causal", "context_bidirectional"):
        model, batch, mask = model_of(dtype), batch_of(), getattr(masks, policy)
        meta = mf.recipes.focusft(model, adapter=ADAPTER, solver=SOLVER, mask=mask)
        fast = meta({}, mf.Episode(batch, batch))[1].params
        for name, extra in (("plain", {}), ("adapted", {"adapter": ADAPTER, "fast": fast})):
            seen = mf.diagnostics.attention_profile(model, batch, mask=mask, **extra)
            found[f"{policy}, {name}"] = {
                "heads": {k: dict(v.items()) for k, v in seen.heads.items()},
                "layers": {k: dict(v.items()) for k, v in seen.layers.items()},
                "cells": seen.cells,
                "table": seen.table(),
                "json": json.dumps(seen.to_dict()),
            }
    return found


def files(folder: Path) -> dict[str, bytes | str]:
    """The bytes of every file; of configurations what does not name a version."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            text = {k: v for k, v in json.loads(path.read_text()).items() if "version" not in k}
            found[str(path.relative_to(folder))] = json.dumps(text, sort_keys=True)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def export(dtype):
    """The files of adapted fast weights: shared, one for each example, and full weights."""
    found = {}
    full = mf.FullWeights(mf.top_layers(0.25, ("mlp",)))
    for name, adapter, each in (
        ("shared", ADAPTER, False),
        ("per example", ADAPTER, True),
        ("full", full, False),
    ):
        model, batch = model_of(dtype), batch_of()
        meta = mf.recipes.focusft(model, adapter=adapter, solver=SOLVER, per_example=each)
        fast = meta({}, mf.Episode(batch, batch))[1].params
        with tempfile.TemporaryDirectory() as folder:
            mf.recipes.export(model, adapter, fast, folder)
            found[name] = files(Path(folder))
    return found


OUTPUTS = {
    "trainer, focusft": trainer(),
    "trainer, sft": trainer(method="sft"),
    "trainer, second order": trainer(estimator="unrolled-recompute"),
    "trainer, accumulation, per example": trainer(
        gradient_accumulation_steps=2, per_example=True, adaptation_start="step"
    ),
    "trainer, mixed precision": trainer(bf16=True),
    "trainer, evaluated adapted": trainer(evaluate_on="prompt", mask="causal"),
    "profile": profile,
    "export": export,
}
