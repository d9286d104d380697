"""Train from a configuration file or flags: `python -m metafocus.trainer.launch config.yaml`.

Every flag of `TrainingArguments` and of `FocusOptions`, and those of `Source` below. A YAML or
JSON file gives the same names; flags after it win. Under `torchrun` or `accelerate launch` it is
the script of every process.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from metafocus.cli import chats
from metafocus.data import encode_chats, pack, read_chats
from metafocus.errors import DataError, MetafocusError
from metafocus.models import model_and_tokenizer
from metafocus.trainer import FocusArguments, FocusTrainer, config_file
from metafocus.trainer.config import described


@dataclass
class Source:
    """What is trained, and on what."""

    model: str | None = described(None, "directory or hub id; default: a small Qwen2")
    attn: str = described("sdpa", "attention implementation: sdpa or eager")
    vocab_size: int = described(2048, "of the small model")
    hidden_size: int = described(128, "of the small model")
    layers: int = described(4, "of the small model")
    data: str = described("stdlib", "file of chats (.jsonl, .parquet), or stdlib")
    heldout: str | None = described(None, "file of held-out chats")
    max_length: int = described(512, "tokens of a sample")
    samples: int = described(400, "of stdlib")
    turns: int = described(1, "of stdlib")
    packing: bool = described(False, "join training samples into rows of max_length tokens")
    separate_messages: bool = described(False, "every message is a context turn of its own")
    outer_lora_rank: int = described(0, "train a PEFT LoRA of this rank, not the whole model")
    outer_lora_modules: str = described("all-linear", "modules of the outer LoRA")

    def __post_init__(self) -> None:
        least = {"vocab_size": 1, "hidden_size": 1, "layers": 1, "max_length": 2, "samples": 1}
        for name, low in {**least, "turns": 1, "outer_lora_rank": 0}.items():
            if not getattr(self, name) >= low:
                raise DataError(f"{name} must be >= {low}, got {getattr(self, name)}.")
        if self.attn not in ("sdpa", "eager"):
            raise DataError(f"attn={self.attn!r} is unknown: use one of sdpa, eager.")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print all of the flags before it.
        raise DataError(f"{message}; --help lists the known settings.")


def parse(argv: list[str]) -> tuple[Source, FocusArguments]:
    """Return the settings that a configuration file and flags describe.

    Raises:
        DataError: for a file that cannot be read, or a name or value that is unknown.

    Example:
        >>> parse(["--output_dir", "run", "--inner_steps", "3"])[1].inner_steps
        3
    """
    kinds: Any = (Source, FocusArguments)
    parser = _Parser(kinds, prog="metafocus train", description=__doc__, allow_abbrev=False)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        values = config_file.read(Path(argv[0]), kinds)
        # As defaults, words become numbers as they do on a command line: YAML reads 1e-5 as text.
        parser.set_defaults(**values)
        argv = argv[1:]
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        raise DataError(f"unknown arguments {rest}; --help lists the known ones.")
    values = vars(namespace)
    source, args = (
        kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init})
        for kind in kinds
    )
    return source, args


def main(argv: list[str] | None = None) -> FocusTrainer:
    """Train, evaluate and save; return the trainer.

    Args:
        argv: default `sys.argv[1:]`.

    Raises:
        MetafocusError: for settings or data that cannot be used, before anything slow happens
            where that is possible.
    """
    source, args = parse(sys.argv[1:] if argv is None else argv)
    records = chats.read(source.data)
    heldout = read_chats(source.heldout) if source.heldout else None
    namespace = argparse.Namespace(
        **dataclasses.asdict(source), seed=args.seed, device="cpu", given=set()
    )
    model, tokenizer = model_and_tokenizer(
        namespace, lambda: chats.texts(records), source.max_length
    )
    if records is None:
        records, heldout = chats.standard_library(namespace, tokenizer)
    encoded = [
        encode_chats(
            part,
            tokenizer,
            max_length=source.max_length,
            merge_context=not source.separate_messages,
        )
        for part in (records, heldout or [])
        if part
    ]
    train = encoded[0].samples
    if source.packing:
        train = pack(train, source.max_length)
    trainer = FocusTrainer(
        _with_outer_lora(model, source),
        args,
        train_dataset=train,
        eval_dataset=encoded[1].samples if len(encoded) > 1 else None,
        processing_class=tokenizer,
    )
    if trainer.is_world_process_zero():
        for name, part in zip(("train", "held out"), encoded, strict=False):
            print(f"{name}: {part.summary()}", flush=True)
    resume = args.resume_from_checkpoint
    # As a word of a command line: true, or the path of a checkpoint.
    result = trainer.train(True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if len(encoded) > 1:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    return trainer


def _with_outer_lora(model: Any, source: Source) -> Any:
    if not source.outer_lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    modules: Any = source.outer_lora_modules
    if modules != "all-linear":
        modules = [name.strip() for name in modules.split(",")]
    rank = source.outer_lora_rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


if __name__ == "__main__":
    try:
        main()
    except MetafocusError as _error:
        sys.exit(f"error: {_error}")
