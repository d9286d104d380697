"""`FocusTrainer`: Hugging Face's Trainer with the meta-loss in place of the loss."""

from __future__ import annotations

from typing import Any

from metafocus.data import Collator
from metafocus.trainer import checks
from metafocus.trainer.batch import Labelled
from metafocus.trainer.config import FocusArguments
from metafocus.trainer.mixin import FocusMixin


class FocusTrainer(FocusMixin):
    """`transformers.Trainer` that trains with FocuSFT.

    Args:
        model: a Hugging Face causal language model, or a PEFT model of one.
        args: `FocusArguments`.
        data_collator: default `metafocus.data.Collator` with the padding token of
            `processing_class` or of the model's configuration.
        kwargs: of `FocusMixin` and of the Trainer.

    Example:
        >>> import contextlib, tempfile
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> model = Qwen2ForCausalLM(Qwen2Config(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        ...     pad_token_id=0))
        >>> sample = {
        ...     "input_ids": torch.tensor([1, 2, 3, 4]), "turn_ids": torch.tensor([0, 0, 1, 1]),
        ...     "answer_mask": torch.tensor([False, False, True, True])}
        >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        ...     args = FocusArguments(folder, max_steps=1, use_cpu=True, report_to="none",
        ...         disable_tqdm=True, save_strategy="no", logging_strategy="no")
        ...     trainer = FocusTrainer(model, args, train_dataset=[sample] * 8)
        ...     _ = trainer.train()
        >>> trainer.state.global_step
        1
    """

    def __init__(
        self,
        model: Any = None,
        args: FocusArguments | None = None,
        *,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        if args is not None:
            checks.check_columns(args, data_collator)
        if data_collator is None:
            data_collator = Collator(checks.pad_token_id(model, kwargs.get("processing_class")))
        super().__init__(model, args, data_collator=Labelled(data_collator), **kwargs)
