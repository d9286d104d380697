"""Checks when a trainer is made, of what would fail hours later or go wrong without an error."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from metafocus.data import Collator
from metafocus.errors import DataError, ProblemError
from metafocus.files import check_utf8, unwritable
from metafocus.trainer.batch import most_positions
from metafocus.trainer.refusals import refuse_parallel

# What transformers itself passes to the function that makes a scheduler.
_OF_EVERY_SCHEDULER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def check_supported(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raise for an argument of the Trainer that would have no effect here, or a wrong one.

    Args:
        args: the settings.
        given: the Trainer's other arguments, by name.
    """
    refuse_parallel(args, os.environ)
    _check_scheduler(args)
    _check_best_metric(args, given)
    reasons = {
        "label_smoothing_factor": (
            args.label_smoothing_factor,
            "the loss is the plain cross entropy of the answers; set it to 0",
        ),
        "compute_loss_func": (
            given.get("compute_loss_func"),
            "the loss is the meta-loss; pass meta_loss_factory instead",
        ),
        # Of trl's SFTConfig.
        "loss_type": (
            getattr(args, "loss_type", "nll") != "nll" and args.loss_type,  # pyright: ignore
            "the loss is the plain cross entropy of the answers; set it to 'nll'",
        ),
        "router_aux_loss_coef": (
            getattr(args, "router_aux_loss_coef", None),
            "the meta-loss has no auxiliary loss of a router; set it to 0 or None",
        ),
    }
    for name, (value, reason) in reasons.items():
        if value:
            raise ProblemError(f"{name}={value!r} is not supported by FocusTrainer: {reason}.")


def _check_scheduler(args: TrainingArguments) -> None:
    """Raise for settings that the scheduler of the learning rate does not take, or wants."""
    kind = SchedulerType(args.lr_scheduler_type)
    parameters = signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters
    own = {name: p for name, p in parameters.items() if name not in _OF_EVERY_SCHEDULER}
    given = args.lr_scheduler_kwargs or {}
    if not isinstance(given, Mapping):
        raise DataError(f"lr_scheduler_kwargs={given!r} is not a dict: pass names and values.")
    if any(p.kind is Parameter.VAR_KEYWORD for p in own.values()):
        return
    wrong = [name for name in given if name not in own]
    wanted = [name for name, p in own.items() if p.default is Parameter.empty and name not in given]
    if wrong or wanted:
        problem = f"{wrong[0]!r} is not one of" if wrong else f"{wanted[0]!r} is missing from"
        raise DataError(
            f"lr_scheduler_kwargs={given!r} does not fit lr_scheduler_type={kind.value!r}: "
            f"{problem} its settings ({', '.join(own) or 'none'})."
        )


def _check_best_metric(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raise for a best metric that is not measured; transformers does at the first evaluation."""
    name = args.metric_for_best_model
    if name is None or name.removeprefix("eval_") == "loss" or args.eval_strategy == "no":
        return
    if not given.get("compute_metrics") and not isinstance(given.get("eval_dataset"), Mapping):
        raise DataError(
            f"metric_for_best_model={name!r} is not measured: without compute_metrics there is "
            "only 'loss'."
        )


def check_columns(args: TrainingArguments, collator: Any) -> None:
    """Raise if the Trainer would drop columns that the collator of this library needs."""
    if args.remove_unused_columns and (collator is None or isinstance(collator, Collator)):
        raise DataError(
            "remove_unused_columns=True, the default of TrainingArguments, would drop answer_mask "
            "and turn_ids from every sample: pass FocusArguments, or remove_unused_columns=False."
        )


def check_router(model: Any) -> None:
    """Raise for a model that is asked for the auxiliary loss of its router."""
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ProblemError(
            "model.config.output_router_logits=True asks for the auxiliary loss of the router, "
            "which the meta-loss does not have: set it to False."
        )


def check_writable(args: TrainingArguments) -> None:
    """Raise before training, not at its first checkpoint, if nothing can be saved."""
    check_utf8("output_dir", str(args.output_dir))
    if not args.should_save:
        return
    folder = Path(args.output_dir or ".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable("output_dir", folder, error) from error


def check_dtypes(model: nn.Module, args: TrainingArguments) -> None:
    """Raise if the trained parameters are of several types; warn if they are too narrow."""
    if args.fp16 and args.device.type == "cpu":
        raise ProblemError(
            "fp16=True has no effect on a CPU, where accelerate neither casts nor scales: set "
            "bf16=True, or train in float32."
        )
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    half = dtypes & {torch.float16, torch.bfloat16}
    if len(dtypes) > 1 or (half and args.fp16):
        raise ProblemError(
            f"the trained parameters are of {', '.join(sorted(map(str, dtypes)))}"
            f"{', with fp16=True' if args.fp16 else ''}: optimiser and gradient scaler need one "
            "type, float32. Call model.float() and set bf16=True or fp16=True for mixed precision."
        )
    if half:
        warnings.warn(
            f"the trained parameters are {next(iter(half))}: most updates of a small learning rate "
            "round to nothing. Load the model with dtype=torch.float32 and set bf16=True.",
            stacklevel=4,
        )


def check_samples(name: str, samples: Any, model: nn.Module) -> None:
    """Raise for a data set that is empty, or a list with a sample that is too long for the model.

    Other data sets are not read here; a batch of theirs that is too long raises when it comes.

    Raises:
        DataError: naming the data set, the sample and what to do.
    """
    if isinstance(samples, dict):
        for key, part in samples.items():
            check_samples(f"{name}[{key!r}]", part, model)
        return
    if samples is None or not hasattr(samples, "__len__"):
        return
    if len(samples) == 0:
        raise DataError(
            f"{name} is empty: pass at least one sample, or leave it out. encode_chats leaves out "
            "chats without an answer and counts them."
        )
    most = most_positions(model)
    if most is None or not isinstance(samples, list):
        return
    for i, sample in enumerate(samples):
        length = len(sample.get("input_ids", ())) if isinstance(sample, Mapping) else 0
        if length > most and "document_ids" not in sample:
            raise DataError(
                f"{name}[{i}] has {length} tokens, the model has {most} positions: encode with "
                f"max_length={most}, or raise the model's max_position_embeddings (and its rope "
                "scaling)."
            )


def check_wrapper(model: nn.Module) -> None:
    """Raise for the first version of FSDP, which hides the parameters by name."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ProblemError(
            "FSDP version 1 flattens the parameters that the meta-loss needs by name. Use version "
            "2: fsdp_config={'version': 2, ...}, or fsdp_version: 2 in accelerate's configuration."
        )


def pad_token_id(model: Any, processing_class: Any) -> int:
    """Return the padding token of the tokenizer, or else of the model's configuration.

    Raises:
        DataError: if neither has one.
    """
    for owner in (processing_class, getattr(model, "config", None)):
        found = getattr(owner, "pad_token_id", None)
        if found is not None:
            return found
    raise DataError(
        "no padding token: set tokenizer.pad_token (to tokenizer.eos_token, say) and pass "
        "processing_class=tokenizer, or pass data_collator=metafocus.data.Collator(pad_token_id)."
    )
