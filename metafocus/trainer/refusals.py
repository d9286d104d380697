"""Settings of the Trainer that would fail late, train wrongly, or do nothing without a word."""

from __future__ import annotations

import json
import math
from typing import Any

from metafocus.errors import ProblemError

NO_DEEPSPEED = (
    "{} is not supported by FocusTrainer: DeepSpeed's engine must run the forward pass itself; "
    "use DDP, fsdp with version 2, or --sharding parametrised."
)
_CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")


def refuse_parallel(args: Any, environment: Any) -> None:
    """Raise for a way of spreading a model that would not train what it should.

    Args:
        args: `transformers.TrainingArguments`.
        environment: such as `os.environ`, through which accelerate's launcher gives its settings.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        source = "ACCELERATE_USE_DEEPSPEED=true (accelerate's configuration file or launcher)"
        raise ProblemError(NO_DEEPSPEED.format(source))
    for given, name in ((args.deepspeed, "deepspeed"), (_plugin(args), "deepspeed_plugin")):
        if given:
            raise ProblemError(NO_DEEPSPEED.format(f"{name}={given!r}"))
    parallelism = getattr(args, "parallelism_config", None)
    size = getattr(parallelism, "cp_size", None) or environment.get("PARALLELISM_CONFIG_CP_SIZE")
    if int(size or 1) > 1:
        raise ProblemError(
            f"accelerate's context parallelism (cp_size={size}) replaces every mask by a causal "
            "one, so bidirectional context would be lost without an error: set cp_size=1 "
            "(PARALLELISM_CONFIG_CP_SIZE)."
        )


def check_numbers(args: Any) -> None:
    """Raise for numbers out of their range, with which nothing would be trained or saved."""
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ProblemError(f"{name} must be a finite number >= 0, got {getattr(args, name)}.")
    for name in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    ):
        if getattr(args, name) < 1:
            raise ProblemError(f"{name} must be >= 1, got {getattr(args, name)}.")
    for name in ("logging", "eval", "save"):
        every, strategy = getattr(args, f"{name}_steps"), getattr(args, f"{name}_strategy")
        # transformers would save or evaluate never, without a word.
        if strategy == "steps" and every is not None and not every > 0:
            raise ProblemError(
                f"{name}_steps must be > 0, got {every}; for none pass {name}_strategy='no'."
            )
    if args.save_total_limit is not None and args.save_total_limit < 1:
        raise ProblemError(
            f"save_total_limit must be >= 1, got {args.save_total_limit}; leave it out to keep "
            "all checkpoints."
        )
    if args.max_steps < -1:
        raise ProblemError(
            f"max_steps must be >= 1, or -1 for num_train_epochs, got {args.max_steps}."
        )
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise ProblemError(
            f"nothing to train: max_steps={args.max_steps} and num_train_epochs="
            f"{args.num_train_epochs}. Give max_steps >= 1, or -1 and num_train_epochs > 0."
        )


def check_json(args: Any) -> None:
    """Raise for a text that is meant as a dict and is none; transformers would not name it."""
    for name in ("accelerator_config", "fsdp_config", "lr_scheduler_kwargs", *_CHECKPOINTING):
        value = getattr(args, name, None)
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise ProblemError(f"{name}={value!r} is not JSON: {error}.") from None


def _plugin(args: Any) -> Any:
    return getattr(args, "deepspeed_plugin", None)
