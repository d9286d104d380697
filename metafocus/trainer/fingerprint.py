"""What a run was made of, kept in each checkpoint, so that a resumed run knows what changed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from metafocus.errors import DataError
from metafocus.lm.hf.attention import attention_name
from metafocus.sharding import class_of
from metafocus.trainer.config import FocusOptions

RUN = "metafocus_run.json"
"""In each checkpoint, beside what transformers writes there."""

_FREE = re.compile(
    "logging_.*|log_.*|eval_.*|evaluate_on|save_.*|hub_.*|push_to_hub|.*trackio.*|project|"
    "output_dir|run_name|report_to|disable_tqdm|per_device_eval_batch_size|prediction_loss_only|"
    "include_.*|batch_eval_metrics|load_best_model_at_end|metric_for_best_model|greater_is_better|"
    "restore_callback_states_from_checkpoint|ignore_data_skip|resume_from_checkpoint|do_.*|"
    "dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context)|"
    "local_rank|ddp_.*|debug|skip_memory_metrics|enable_jit_checkpoint|auto_find_batch_size|"
    "torch_empty_cache_steps|.*checkpointing.*|fp16_full_eval|bf16_full_eval|"
    "gradient_accumulation_steps|allow_changed|max_skipped|on_nonfinite|max_nonfinite|"
    "sequence_parallel|sharding|fsdp.*"
)
"""Settings that do not change what a step computes. Accumulation is compared with the ranks."""

_LENGTH = ("max_steps", "num_train_epochs")
"""Settings by which a run is made longer: they are noted only."""


def fingerprint(
    args: TrainingArguments, focus: FocusOptions, model: nn.Module, data: Any, recipe: Any
) -> dict[str, dict[str, Any]]:
    """Return settings, data and versions, as JSON holds them."""
    settings = {**args.to_dict(), **asdict(focus)}
    kept = {name: value for name, value in settings.items() if not _FREE.fullmatch(name)}
    attention = attention_name(model)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    ranks = args.world_size // focus.sequence_parallel
    kept |= {
        "micro_batches_per_step": args.gradient_accumulation_steps * ranks,
        # Where an object lies in memory differs from process to process.
        "recipe": re.sub(r" at 0x[0-9a-f]+", "", str(recipe)),
        "model": f"{class_of(model).__name__} with {sum(sizes)} trained parameters, {attention}",
    }
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")
    } | {"metafocus": _code(), "python": platform.python_version()}
    found = {"settings": kept, "data": digest(data), "versions": versions}
    return json.loads(json.dumps(found, default=str))


def _code() -> str:
    """A hash of this package's source: a version number does not change with every edit."""
    summary, root = hashlib.blake2b(digest_size=6), Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        summary.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return summary.hexdigest()


def digest(data: Any) -> dict[str, Any]:
    """Return the number of samples, and a hash of all of them where reading them is safe.

    A list of dicts is read. Other data sets may draw at random or read files, and are asked only
    for a `digest()` of their own.

    Example:
        >>> digest([{"input_ids": [1, 2]}])["hash"] == digest([{"input_ids": [1, 3]}])["hash"]
        False
    """
    found: dict[str, Any] = {"samples": len(data) if hasattr(data, "__len__") else None}
    own = getattr(data, "digest", None)
    if own is not None:
        found["hash"] = own()
    elif isinstance(data, list) and all(isinstance(sample, Mapping) for sample in data):
        summary = hashlib.blake2b(digest_size=16)
        for sample in data:
            for name in sorted(sample):
                value = sample[name]
                # Tensors and arrays in full: their repr leaves out the middle.
                plain = value.tolist() if hasattr(value, "tolist") else value
                summary.update(f"{name} {plain!r} ".encode())
        found["hash"] = summary.hexdigest()
    return found


def compared(place: Path, now: dict[str, dict[str, Any]], *, allowed: bool) -> list[str]:
    """Return what changed since a checkpoint was saved, in words.

    Args:
        place: the checkpoint. One without a fingerprint is not compared.
        now: the fingerprint of this run.
        allowed: settings and data may differ.

    Raises:
        DataError: for differences in what is computed that are not allowed.
    """
    then = read_run(place)
    changed, noted = [], []
    for part in ("settings", "data", "versions"):
        old, new = then.get(part, {}), now[part]
        for name in sorted(old.keys() & new.keys()):
            if old[name] != new[name]:
                free = part == "versions" or name in _LENGTH
                text = f"{name} {old[name]!s:.120} -> {new[name]!s:.120}"
                (noted if free else changed).append(f"data: {text}" if part == "data" else text)
    if changed and not allowed:
        raise DataError(
            f"{place} was trained otherwise: {'; '.join(changed)}. Give the settings and data of "
            "that run; or resume with what changed by --allow_changed (allow_changed=True), from "
            "that step on; or name another output_dir."
        )
    return [*changed, *noted]


def read_run(place: Path) -> dict[str, Any]:
    """Return what `RUN` says in a checkpoint; nothing where it is missing or no JSON."""
    try:
        found = json.loads((place / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
