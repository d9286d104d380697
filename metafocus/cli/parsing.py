"""Command lines that are read strictly: a flag that is unknown is refused, with the right one."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn

from metafocus.errors import DataError

# What other tools call it. A name is suggested only where the command has it; the first one counts.
_ELSEWHERE = {
    "model_name_or_path": "model, base_model, model_name, model_path, pretrained, checkpoint",
    "output_dir": "output, out, output_path, save_dir, save_path",
    "train_file": "data, data_path, data_file, data_files, train_data, train_dataset, "
    "validation_file, dataset_name",
    "dataset_name": "dataset, dataset_path",
    "dataset_config_name": "dataset_config, subset",
    "dataset_streaming": "streaming",
    "dataset_num_proc": "num_proc, preprocessing_num_workers, num_workers",
    "encoding_cache": "cache, cache_dir, overwrite_cache",
    "chat_template": "chat_template_path, template",
    "chat_template_kwargs": "template_kwargs, enable_thinking",
    "validation_file": "heldout, eval_file, eval_data, eval_dataset, test_file, val_data, val_file",
    "validation_split_percentage": "heldout_fraction, val_set_size, test_size, eval_split",
    "max_train_samples": "samples, limit, n_samples, num_samples, max_samples, max_eval_samples",
    "max_length": "max_seq_length, max_seq_len, seq_len, sequence_len, cutoff_len, block_size, "
    "model_max_length, context_length, max_tokens",
    "stdlib_turns": "turns",
    "max_steps": "steps, num_steps, train_steps, max_iters, iterations",
    "num_train_epochs": "epochs, epoch, num_epochs, n_epochs",
    "learning_rate": "lr, rate",
    "per_device_train_batch_size": "batch_size, micro_batch_size, train_batch_size, batch",
    "per_device_eval_batch_size": "batch_size, eval_batch_size, val_batch_size",
    "gradient_accumulation_steps": "accumulation, accumulation_steps, grad_accum, "
    "gradient_accumulation",
    "warmup_steps": "warmup, warmup_ratio, num_warmup_steps",
    "max_grad_norm": "clip, grad_clip, clip_grad, gradient_clip",
    "lr_scheduler_type": "scheduler, lr_scheduler, lr_schedule",
    "optim": "optimizer",
    "eval_strategy": "evaluation_strategy",
    "attn_implementation": "attn, attention, flash_attention",
    "num_hidden_layers": "layers, num_layers, n_layer, n_layers",
    "hidden_size": "hidden, width, n_embd, d_model, dim",
    "lora_rank": "rank, r, lora_r, inner_rank",
    "lora_alpha": "alpha, inner_alpha",
    "lora_modules": "modules, target_modules, lora_target, lora_target_modules, "
    "inner_target_modules",
    "layer_fraction": "fraction, inner_layer_fraction, layers_fraction",
    "inner_steps": "num_inner_steps, adaptation_steps",
    "inner_lr": "inner_learning_rate, adaptation_lr, fast_lr",
    "inner_clip": "inner_grad_clip, inner_max_grad_norm",
    "outer_lora_rank": "use_peft, use_lora, peft",
    "resume_from_checkpoint": "resume, resume_from, continue",
    "overwrite_output_dir": "overwrite, force",
    "gradient_checkpointing": "checkpointing, grad_checkpointing, inner_gradient_checkpointing",
    "max_new_tokens": "new_tokens, max_gen_toks, max_completion_tokens, max_tokens",
    "use_cpu": "device, cpu, no_cuda",
    "seed": "random_seed",
}
_MEANT: dict[str, list[str]] = {}
for _ours, _theirs in _ELSEWHERE.items():
    for _name in _theirs.split(", "):
        _MEANT.setdefault(_name, []).append(_ours)


def suggestion(name: str, known: Collection[str]) -> str | None:
    """Return the known name that was probably meant, or None.

    Example:
        >>> known = ["learning_rate", "inner_lr", "max_steps"]
        >>> suggestion("lr", known), suggestion("inner-lr", known), suggestion("max_step", known)
        ('learning_rate', 'inner_lr', 'max_steps')
    """
    plain = name.lstrip("-").replace("-", "_").lower()
    for candidate in (plain, *_MEANT.get(plain, ())):
        if candidate in known:
            return candidate
    return next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=0.75)), None)


def unknown(what: str, names: Iterable[str], known: Collection[str], sign: str = "") -> str:
    """Return what to say of unknown names, each with the one that was probably meant.

    Args:
        what: a name is, such as "flag".
        names: as they were given.
        known: the right ones.
        sign: the prefix of a suggestion, such as `--`.

    Example:
        >>> unknown("flag", ["--lr", "--zigzag"], ["learning_rate"], "--")
        'unknown flag --lr, did you mean --learning_rate?; unknown flag --zigzag'
    """
    found = []
    for name in dict.fromkeys(names):
        meant = suggestion(name, known)
        ask = f", did you mean {sign}{meant}?" if meant else ""
        found.append(f"unknown {what} {name:.40}{ask}")
    return "; ".join(found)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and an exception, and which knows what was `given`."""

    def __init__(self, *args: Any, **kwargs: Any):
        # In full: what is short today may stand for two options tomorrow.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse; refuse a flag that is unknown before a required one is missed.

        Raises:
            DataError: with the flags that were probably meant.
        """
        words = list(sys.argv[1:] if args is None else args)
        given = [word.partition("=")[0] for word in words if word[:2] == "--" and word != "--"]
        if self._subparsers is None:
            flags = [flag[2:] for flag in self._option_string_actions if flag[:2] == "--"]
            odd = [flag for flag in given if flag[2:] not in flags]
            if odd:
                self.error(unknown("flag", odd, flags, "--"))
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"unexpected words: {' '.join(rest)}")
        found.given = {flag[2:] for flag in given}
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        if message.endswith("expected one argument"):
            flag = message.split()[1].rstrip(":").partition("/")[0]
            message += f"; a value that begins with a minus is written {flag}=-VALUE"
        raise DataError(f"{message} (see {self.prog} --help)")
