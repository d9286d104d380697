"""What turns a Hugging Face Trainer into a FocuSFT trainer, and nothing else.

What is overridden: the loss of a training batch, and the loss of an evaluation batch and its mean.
`reliable.py` adds what makes a run survive. Everything else is the Trainer's: optimiser, schedule,
accumulation, mixed precision, DDP, FSDP, callbacks, logging, the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from metafocus import rng
from metafocus.engine import MetaLoss
from metafocus.errors import ProblemError
from metafocus.estimators import FirstOrder
from metafocus.lm import Batch, answer_tokens
from metafocus.lm.tokens import predicted
from metafocus.parallel import average_over_groups, sequence_group
from metafocus.recipes._focusft import focusft
from metafocus.sharding import Sharding, sharding_of
from metafocus.trainer import checks
from metafocus.trainer.batch import as_batch, check_length, labels_of, without_repeats
from metafocus.trainer.compilation import compile_below
from metafocus.trainer.config import FocusOptions
from metafocus.trainer.distributed import through
from metafocus.trainer.evaluation import AnswerLoss, Way, configured, score, score_adapted, ways
from metafocus.trainer.inner import Guarded, Stopwatch, start_seed
from metafocus.trainer.journal import Journal
from metafocus.trainer.reliable import ReliableMixin
from metafocus.trainer.shared_batches import check_sequence_parallel, with_shared_batches
from metafocus.types import Episode

MetaLossFactory = Callable[[nn.Module, torch.Generator], MetaLoss]
"""`(model, generator) -> meta_loss`; the generator is seeded anew before every call."""


class FocusMixin(ReliableMixin):
    """What turns a class derived from `transformers.Trainer` into a FocuSFT trainer.

    Args:
        model: a Hugging Face causal language model, or a PEFT model of one.
        args: `FocusArguments`, or any `TrainingArguments`.
        focus: FocuSFT's settings, where `args` does not hold them.
        recipe: keywords of `mf.recipes.focusft` that replace those of the settings: objects,
            such as `{"estimator": mf.Unrolled(recompute=True)}`.
        meta_loss_factory: `(model, generator) -> meta_loss`, instead of the recipe as a whole. The
            guard against NaN and the time of the inner loop are the recipe's.
        kwargs: of the Trainer.

    Raises:
        ProblemError: for arguments that would be ignored or wrong here.
        DataError: for an output directory that cannot be written to, an empty data set, or a
            sample that is longer than the model's positions.

    Example:
        >>> from transformers import Trainer
        >>> class FocusSFTTrainer(FocusMixin, Trainer):  # or trl.SFTTrainer
        ...     pass
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        focus: FocusOptions | None = None,
        recipe: Mapping[str, Any] | None = None,
        meta_loss_factory: MetaLossFactory | None = None,
        **kwargs: Any,
    ):
        if args is not None:
            checks.check_supported(args, kwargs)
            checks.check_writable(args)
        checks.check_router(model)
        own = args if isinstance(args, FocusOptions) else FocusOptions()
        self._recipe, self._factory = dict(recipe or {}), meta_loss_factory
        super().__init__(model, args, focus=focus or own, **kwargs)
        self._sharers = self.focus.sequence_parallel
        check_sequence_parallel(self._sharers, self.args, meta_loss_factory)
        wait = timedelta(seconds=self.args.ddp_timeout)
        self._group = sequence_group(self._sharers, timeout=wait)
        if self.focus.sharding is not None:
            self._parametrise(self._group)
        checks.check_dtypes(self._plain, self.args)
        checks.check_samples("train_dataset", self.train_dataset, self._plain)
        checks.check_samples("eval_dataset", self.eval_dataset, self._plain)
        # compute_loss divides by the token count of the accumulated batches, as such models do.
        self.model_accepts_loss_kwargs = True
        device = self.args.device
        self._journal = Journal(device, self.focus.max_skipped)
        self._generator = torch.Generator(device="cuda" if device.type == "cuda" else "cpu")
        self._built: tuple[Any, MetaLoss] | None = None
        self._way = configured(self.focus)
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._micro_step = 0
        self.add_callback(_FirstMicroStep(self))

    # Training -------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward and backward pass of a micro-batch, and take its time."""
        with self._journal.whole.running():
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the meta-loss of a micro-batch, weighted by its share of the step's tokens."""
        batch = as_batch(inputs)
        check_length(batch, self._plain)
        count = predicted(answer_tokens, batch).sum()
        meta_loss = self._meta_loss()
        self._generator.manual_seed(self._seed())
        inner: list[Tensor] = []

        def run(batch: Batch) -> Tensor:
            # One autocast around both loops: they compute in the same precision.
            with self.accelerator.autocast():
                loss, aux = meta_loss({}, Episode(batch, batch))
            inner.append(aux.inner_losses)
            return loss

        loss = through(model, run, batch)
        self._micro_step += 1
        same = self._factory is None and self._settings()["inner_tokens"] is answer_tokens
        self._journal.micro_batch(loss, inner[0], (count > 0).float(), same_tokens=same)
        if num_items_in_batch is not None:
            total = torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
            loss = loss * count / total
            if self.args.average_tokens_across_devices:
                # Ranks that share sequences all count their tokens, and have equal gradients.
                loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _meta_loss(self) -> MetaLoss:
        if self._built is None or self._built[0] is not self._plain:
            checks.check_wrapper(self._plain)
            if Sharding.FSDP2 in sharding_of(self._plain):
                average_over_groups(self._plain, self._group)
            make = self._factory or self._focusft
            self._built = self._plain, make(self._plain, self._generator)
        return self._built[1]

    def _focusft(self, model: nn.Module, generator: torch.Generator) -> MetaLoss:
        settings = {**self._settings(), "sequence_group": self._group}
        estimator = settings["estimator"] or FirstOrder()
        if self.args.torch_compile:
            compile_below(model, settings["adapter"], estimator, self.args)
        each = bool(settings.get("per_example", False))
        settings["estimator"] = Guarded(estimator, self._journal.add, self._journal.inner, each)
        return focusft(model, generator=generator, **settings)

    def _settings(self) -> dict[str, Any]:
        """The keywords of the recipe: names resolved, then what was given as objects."""
        return {**self.focus.recipe(self._plain), **self._recipe}

    def _seed(self) -> int:
        """The seed of a micro-batch's fast weights.

        Micro-batches of all ranks are counted as one process would meet them, so that the number
        of processes does not change the starts.
        """
        key = self.focus.adaptation_seed, self.state.global_step
        if self.focus.adaptation_start == "step":
            return start_seed(*key)
        ranks = self.accelerator.num_processes // self._sharers
        return start_seed(*key, self._micro_step * ranks + self._data_rank())

    def _data_rank(self) -> int:
        """Which of the groups of ranks that share sequences this one is in."""
        return self.accelerator.process_index // self._sharers

    def _bad_losses(self) -> Tensor:
        return self._journal.take_bad_losses()

    def _objects(self) -> Any:
        return self._recipe, getattr(self._factory, "__qualname__", self._factory)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the window's means of the inner loops beside the training loss."""
        if "loss" in logs:
            reduce = self.accelerator.reduce
            once = 1 / self._sharers
            logs.update(
                self._journal.drain(lambda x: once * reduce(x, "sum"), self.state.global_step)  # pyright: ignore
            )
        super().log(logs, start_time)

    # Data -----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Return the training batches, the same for ranks that share sequences."""
        return self._shared(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the evaluation batches, the same for ranks that share sequences."""
        return self._shared(super().get_eval_dataloader(*args, **kwargs))

    def _shared(self, loader: Any) -> Any:
        state = self.accelerator
        return with_shared_batches(loader, self._sharers, state.num_processes, state.process_index)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the samples of a step, each counted once."""
        return super().get_total_train_batch_size(args) // self._sharers

    # Evaluation -----------------------------------------------------------------------------

    def heldout_losses(self) -> dict[str, float]:
        """Return the mean loss per answer token of the evaluation set, by the way it is measured.

        The ways are "deployed" (causal, no fast weights: what a saved checkpoint does), "training
        mask" and "as evaluated" (the settings `eval_mask` and `evaluate_on`), each named once.
        Nothing is logged, and the random state stays as it is.
        """
        losses, loader = {}, self.get_eval_dataloader()
        try:
            for name, way in ways(self.focus).items():
                self._way = way
                output = self.evaluation_loop(loader, "held-out loss", prediction_loss_only=True)
                losses[name] = output.metrics["eval_loss"]
        finally:
            self._way = configured(self.focus)
        return losses

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the answer loss of a batch as the model is deployed, or adapted on each prompt."""
        batch = as_batch(self._prepare_inputs(inputs))
        check_length(batch, self._plain)
        if self._sharers > 1 and not prediction_loss_only:
            raise ProblemError(
                f"sequence_parallel={self._sharers} evaluates losses only, not logits "
                "(compute_metrics, predict): every rank of a group would return the same rows. Set "
                "prediction_loss_only=True, or evaluate in another process."
            )
        state, rank = self.accelerator.gradient_state, self._data_rank()
        real = without_repeats(batch, state.remainder, rank) if state.end_of_dataloader else batch
        with self.accelerator.autocast():
            found = self._score(real, self._way, logits=not prediction_loss_only)
        self._losses.append((found.total, found.tokens))
        loss = found.total / found.tokens.clamp(min=1)
        return loss, found.logits, None if prediction_loss_only else labels_of(batch)

    def _score(self, batch: Batch, way: Way, logits: bool) -> AnswerLoss:
        if not way.adapt:
            return score(
                self._plain, batch, mask=way.mask, logits=logits, sequence_group=self._group
            )
        settings = self._settings()
        return score_adapted(
            self._plain,
            batch,
            mask=way.mask,
            adapter=settings["adapter"],
            solver=settings["solver"],
            estimator=Guarded(FirstOrder(), lambda _: None, Stopwatch(self.args.device)),
            seed=self.focus.adaptation_seed,
            logits=logits,
            sequence_group=self._group,
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; the loss is the mean over tokens, whatever the batches and the ranks."""
        self._losses = []
        with rng.kept(self._plain.parameters()):
            output = super().evaluation_loop(*args, **kwargs)
        sums = [torch.stack(parts).sum().float() for parts in zip(*self._losses, strict=True)]
        self._losses = []
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if sums and output.metrics and name in output.metrics:
            reduced: Any = self.accelerator.reduce(torch.stack(sums), "sum")
            output.metrics[name] = float(reduced[0] / reduced[1].clamp(min=1))
        return output


class _FirstMicroStep(TrainerCallback):
    """Counts micro-batches from 0 in every optimiser step."""

    def __init__(self, trainer: FocusMixin):
        self._trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._micro_step = 0
