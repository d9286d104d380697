"""The settings of `metafocus train`: dataclasses whose fields are flags, and keys of a file."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import HfArgumentParser, TrainingArguments

from metafocus.cli import config_file, options
from metafocus.cli.parsing import Parser
from metafocus.data.chat import TURNS
from metafocus.errors import DataError
from metafocus.trainer.config import FocusArguments, FocusOptions, described

Kind = TypeVar("Kind")

STDLIB_SAMPLES = 400
_FILES = (".yaml", ".yml", ".json")


@dataclass
class ModelArguments:
    """Which model is trained.

    Raises:
        DataError: for a size or a name that cannot be used.
    """

    _argument_group_name = "model"

    model_name_or_path: str | None = described(
        None, "directory, hub id, GGUF file or smollm2; default: a small Qwen2 made from scratch"
    )
    attn_implementation: str = described("sdpa", ", ".join(options.ATTENTION))
    vocab_size: int = described(2048, "vocabulary of the small model")
    hidden_size: int = described(128, "hidden size of the small model")
    num_hidden_layers: int = described(4, "number of layers of the small model")
    outer_lora_rank: int = described(0, "train a PEFT LoRA of this rank, not the whole model")
    outer_lora_modules: str = described("all-linear", "modules of the PEFT LoRA")

    def __post_init__(self) -> None:
        _at_least(self, vocab_size=259, hidden_size=64, num_hidden_layers=1, outer_lora_rank=0)
        if self.attn_implementation not in options.ATTENTION:
            raise DataError(
                f"attn_implementation={self.attn_implementation!r} is unknown: use one of "
                f"{', '.join(options.ATTENTION)}."
            )


@dataclass
class DataArguments:
    """What it is trained on.

    Raises:
        DataError: for numbers out of range, or two sources of data.
    """

    _argument_group_name = "data"

    train_file: str | None = described(
        None,
        "file of chats (.jsonl, .json, .parquet), or stdlib: questions about the documentation of "
        "the Python standard library on this machine",
    )
    dataset_name: str | None = described(
        None, "data set of chats, by hub id or directory (needs the package datasets)"
    )
    dataset_config_name: str | None = described(None, "which configuration of dataset_name")
    dataset_train_split: str = described("train", "which split of dataset_name to train on")
    dataset_test_split: str | None = described(
        None, "which split of dataset_name is held out; default: validation, or else test"
    )
    dataset_streaming: bool = described(
        False, "read dataset_name record by record, up to max_train_samples, without a copy on disk"
    )
    dataset_num_proc: int = described(1, "number of processes that encode chats")
    encoding_cache: str | None = described(
        None, "directory that keeps encoded chats, under a hash of all they depend on"
    )
    chat_template: str | None = described(
        None, "file with a chat template (Jinja) instead of the tokenizer's own"
    )
    chat_template_kwargs: str | None = described(
        None, "variables of the chat template as JSON, such as '{\"enable_thinking\": false}'"
    )
    turns: str = described(
        "as_rendered",
        "which answers are trained: all as_rendered in the whole chat; only the last; or each, as "
        "the last message of a sample of its own",
    )
    strict: bool = described(False, "stop at a chat that cannot be encoded, instead of skipping it")
    validation_file: str | None = described(None, "file of held-out chats")
    validation_split_percentage: float = described(
        10.0, "percentage of the chats that is held out if no held-out chats are given; 0: none"
    )
    max_train_samples: int | None = described(
        None,
        "largest number of chats to train on; of stdlib this many are made, by default "
        f"{STDLIB_SAMPLES}",
    )
    max_eval_samples: int | None = described(
        None, "largest number of held-out chats; of stdlib this many are made, by default a tenth"
    )
    max_length: int = described(512, "largest number of tokens of a sample")
    packing: bool = described(False, "join training samples into rows of max_length tokens")
    separate_messages: bool = described(
        False,
        "make every message a context turn of its own, instead of joining neighbours to one turn",
    )
    stdlib_turns: int = described(1, "number of questions in a chat of stdlib")
    dry_run: bool = described(
        False, "take three steps, print the memory and time that a step needs, and write nothing"
    )
    overwrite_output_dir: bool = described(
        False, "replace the run in output_dir; its checkpoints are deleted"
    )

    def __post_init__(self) -> None:
        _at_least(self, max_train_samples=1, max_eval_samples=1, max_length=2, stdlib_turns=1)
        _at_least(self, dataset_num_proc=1)
        if self.turns not in TURNS:
            raise DataError(f"turns={self.turns!r} is unknown: use one of {', '.join(TURNS)}.")
        self.template_variables()
        if not 0 <= self.validation_split_percentage < 100:
            raise DataError(
                "validation_split_percentage must be at least 0 and below 100, got "
                f"{self.validation_split_percentage}."
            )
        if self.train_file is not None and self.dataset_name is not None:
            raise DataError("train_file and dataset_name are both given: name one of them.")
        if self.train_file is None and self.dataset_name is None:
            raise DataError(
                "--train_file is missing: name a file of chats, or stdlib; or a data set with "
                "--dataset_name."
            )

    def template_variables(self) -> dict[str, Any]:
        """Return `chat_template_kwargs` as names and values.

        Raises:
            DataError: if they are no JSON object.
        """
        if self.chat_template_kwargs is None:
            return {}
        try:
            found = json.loads(self.chat_template_kwargs)
        except ValueError as error:
            raise DataError(
                f"chat_template_kwargs={self.chat_template_kwargs!r} is not JSON ({error})."
            ) from error
        if not isinstance(found, dict):
            raise DataError(
                f"chat_template_kwargs={self.chat_template_kwargs!r} is not a JSON object of names "
                "and values."
            )
        return found


class Settings(NamedTuple):
    """What a file and flags say, and the names of the settings that they gave."""

    model: ModelArguments
    data: DataArguments
    args: FocusArguments
    given: set[str]


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        known = action.default not in (None, argparse.SUPPRESS)
        return (action.help or "") + " (default: %(default)s)" * known


class _Parser(Parser, HfArgumentParser):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Flags of dataclasses, under their own names only: `--inner_lr`, and no `--inner-lr`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for flag in [flag for flag in self._option_string_actions if "-" in flag[2:]]:
            action = self._option_string_actions.pop(flag)
            action.option_strings = [other for other in action.option_strings if other != flag]
        # In the help ours come first: transformers has more than a hundred.
        self._optionals.title = "settings of transformers.TrainingArguments"
        self._action_groups.remove(self._optionals)
        self._action_groups.append(self._optionals)


def parse(argv: list[str]) -> Settings:
    """Return the settings that a configuration file and the flags after it describe.

    Raises:
        DataError: for a file that cannot be read, a name or a value that is unknown.

    Example:
        >>> flags = "--train_file chats.jsonl --output_dir run --lora_rank 4"
        >>> parse(flags.split()).args.lora_rank
        4
    """
    if "--config" in argv:
        raise DataError("a configuration file comes first, without a flag: metafocus train FILE.")
    kinds: Any = (ModelArguments, DataArguments, FocusOptions, TrainingArguments)
    parser = _Parser(
        kinds,
        prog="metafocus train",
        usage="metafocus train [CONFIG.yaml | CONFIG.json] [--NAME VALUE ...]",
        description=_DESCRIPTION,
        formatter_class=_Help,
    )
    # Where a default of ours differs from transformers', ours counts.
    theirs = {f.name: f.default for f in fields(TrainingArguments)}
    ours = {f.name: f.default for f in fields(FocusArguments) if f.name in theirs}
    parser.set_defaults(**{k: v for k, v in ours.items() if v != theirs[k]})
    values: dict[str, Any] = {}
    if argv and argv[0].endswith(_FILES):
        values = config_file.read(Path(argv[0]), (ModelArguments, DataArguments, FocusArguments))
        # As defaults, texts become numbers as they do on a command line: YAML reads 1e-5 as text.
        parser.set_defaults(**values)
        argv = argv[1:]
    found = vars(parser.parse_args(argv))
    given = found["given"] | values.keys()
    if "output_dir" not in given:
        raise DataError("--output_dir is missing: name a directory for the checkpoint.")
    model, data = _made(ModelArguments, found), _made(DataArguments, found)
    return Settings(model, data, _made(FocusArguments, found), given)


def _made(kind: type[Kind], values: dict[str, Any]) -> Kind:
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.init})  # pyright: ignore


_DESCRIPTION = """\
Fine-tune a causal language model on chats, plainly or with FocuSFT.

  metafocus train --train_file chats.jsonl --model_name_or_path DIR_OR_ID --output_dir out
  metafocus train CONFIG.yaml [flags]      the same names in YAML or JSON; flags win

This is Hugging Face's Trainer: every setting of transformers.TrainingArguments is a flag too.
They follow the settings of the model, of the data and of FocuSFT. The command is also the
script of every process: torchrun --nproc-per-node=8 -m metafocus train CONFIG.yaml
"""


def _at_least(settings: Any, **least: int) -> None:
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise DataError(f"{name} must be >= {low}, got {value}.")
