"""`metafocus train`: Hugging Face's Trainer with FocuSFT, from chats to a checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from metafocus.adapters import LoRA
from metafocus.cli import chats, dry_run, options, splits
from metafocus.cli.callbacks import Bars, HeldOut, decisions_printed
from metafocus.cli.outcome import REPORT, finish, placed, say
from metafocus.cli.settings import ModelArguments, Settings, parse
from metafocus.data import Sample, encode_chats, spool
from metafocus.data.batches import Packed
from metafocus.data.encoding import NAMED, skipped_lines
from metafocus.errors import DataError
from metafocus.files import check_utf8
from metafocus.trainer.checkpoints import require_complete
from metafocus.trainer.config import FocusArguments
from metafocus.trainer.lock import files_of_a_run, one_run
from metafocus.trainer.trainer import FocusTrainer


def main(argv: list[str]) -> FocusTrainer:
    """Train, with the held-out loss before and after, and save; return the trainer.

    Args:
        argv: the words of the command line after `metafocus train`.

    Raises:
        MetafocusError: for settings or data that cannot be used, before anything slow happens
            where that is possible; for a loss that is not a number, with nothing saved.
    """
    settings = parse(argv)
    _require_reporters(settings.args)
    data, args = settings.data, settings.args
    for name, value in [item for part in settings[:3] for item in vars(part).items()]:
        if isinstance(value, str):
            check_utf8(f"--{name}", value)
    if data.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir = folder
            return _run(settings, Path(folder), None)
    output, resume = _output(args, data.overwrite_output_dir), _resume(args)
    with one_run(output), decisions_printed():
        return _run(settings, output, resume)


def _run(settings: Settings, output: Path, resume: str | bool | None) -> FocusTrainer:
    data, args = settings.data, settings.args
    # What is read and encoded lies there, in files without a name, and not in memory.
    output.mkdir(parents=True, exist_ok=True)
    skipped: list[str] = []
    how: Any = {"gather": chats.gatherer(output), "skipped": None if data.strict else skipped}
    train, heldout = splits.read(data, args.seed, how)
    if skipped:
        say(args, skipped_lines("records", len(skipped), skipped[:NAMED]))
    splits.check_evaluation(args, data, train, heldout)
    _note_unused(settings)
    torch.manual_seed(args.seed)
    model, tokenizer = options.model_and_tokenizer(
        settings.model,
        lambda: chats.texts(train),
        data.max_length,
        base=train is not None and not any("messages" in record for record in train),
        template=chats.template(data.chat_template),
    )
    adapter = args.adapter(model)
    if isinstance(adapter, LoRA):
        # Raises if no module has the names.
        say(args, placed(tuple(adapter.modules(model)), model))
    if train is None:
        train, heldout = splits.documentation(data, tokenizer, args.seed, heldout)
    samples = _encoded("train", train[: data.max_train_samples], tokenizer, settings)
    # A dry run evaluates nothing.
    heldout = [] if data.dry_run else heldout[: data.max_eval_samples]
    held = _encoded("held out", heldout, tokenizer, settings)
    rows = Packed(samples, data.max_length) if data.packing else samples
    planned = dry_run.planned_steps(rows, args)
    trainer = FocusTrainer(
        _with_outer_lora(model, settings.model),
        args,
        train_dataset=dry_run.shortened(rows, args) if data.dry_run else rows,
        eval_dataset=held or None,
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    if data.dry_run:
        say(args, dry_run.measured(trainer, planned))
        return trainer
    measure = HeldOut(trainer)
    if held:
        trainer.add_callback(measure)
    if not args.disable_tqdm:
        trainer.add_callback(Bars())
    if data.overwrite_output_dir and resume is None and trainer.is_world_process_zero():
        for old in output.glob("checkpoint-*"):
            shutil.rmtree(old)
    result = trainer.train(resume)
    if trainer.finished:
        if (output / REPORT).exists():
            return trainer
        # Stopped between its last checkpoint and its report.
        if held:
            measure.on_train_end(args, trainer.state, trainer.control)
    finish(trainer, settings, result.metrics, output)
    return trainer


def _output(args: FocusArguments, overwrite: bool) -> Path:
    output = options.directory(args.output_dir or "")
    # Asked by one process: another one may have begun to write there.
    free = args.process_index > 0 or args.resume_from_checkpoint or overwrite
    if not free and files_of_a_run(output):
        raise DataError(
            f"--output_dir {output} is not empty: name another directory, pass "
            "--overwrite_output_dir to replace the run in it, or --resume_from_checkpoint true to "
            "go on with it."
        )
    return output


def _resume(args: FocusArguments) -> str | bool | None:
    """Return what to resume: True is the newest checkpoint, a text the path of one."""
    word = str(args.resume_from_checkpoint or "")
    if word.lower() in ("true", "false", ""):
        return True if word.lower() == "true" else None
    return str(require_complete(word))


def _require_reporters(args: FocusArguments) -> None:
    """Raise for a `--report_to` whose package is missing."""
    for made in get_reporting_integration_callbacks(args.report_to):
        try:
            made()
        except RuntimeError as error:
            raise DataError(f"--report_to {args.report_to} cannot be used: {error}") from None


def _note_unused(settings: Settings) -> None:
    model, data, args = settings.model, settings.data, settings.args
    unused: dict[str, tuple[str, ...]] = {}
    if args.method == "sft":
        names = ("estimator", "inner_tokens", "inner_checkpointing", "per_example")
        unused["with method sft"] = (*names, *options.INNER)
    if data.train_file != chats.STDLIB:
        unused["without train_file stdlib"] = ("stdlib_turns",)
    if data.dataset_name is None:
        unused["without dataset_name"] = (
            "dataset_config_name",
            "dataset_train_split",
            "dataset_test_split",
            "dataset_streaming",
        )
    if data.validation_file:
        unused["with validation_file"] = ("validation_split_percentage", "dataset_test_split")
    if model.model_name_or_path is not None:
        unused["with model_name_or_path"] = options.OF_SMALL
    if args.max_steps > 0:
        unused["with max_steps"] = ("num_train_epochs",)
    if args.process_index == 0:
        for why, names in unused.items():
            options.note_unused(settings, names, why)


def _encoded(
    name: str, records: chats.Chats, tokenizer: Any, settings: Settings
) -> Sequence[Sample]:
    if not records:
        return []
    data = settings.data
    found = encode_chats(
        records,
        tokenizer,
        max_length=data.max_length,
        merge_context=not data.separate_messages,
        turns=data.turns,
        chat_template_kwargs=data.template_variables(),
        strict=data.strict,
        num_proc=data.dataset_num_proc,
        cache_dir=data.encoding_cache,
        into=spool.samples(settings.args.output_dir),
    )
    say(settings.args, f"{name}: {found.summary()}")
    return found.samples


def _with_outer_lora(model: Any, settings: ModelArguments) -> Any:
    if not settings.outer_lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    modules: Any = settings.outer_lora_modules
    if modules != "all-linear":
        modules = options.words(modules)
    rank = settings.outer_lora_rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    return get_peft_model(model, config)
