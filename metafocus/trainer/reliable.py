"""What makes a Trainer's run survive: bad steps, signals, kills, full disks, a second run.

Everything goes through methods that the Trainer calls, and through callbacks.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from metafocus.errors import DataError, MetafocusError, NonFiniteError
from metafocus.files import write_json
from metafocus.trainer import staging
from metafocus.trainer.checkpoints import other_ranks, require_complete, resumable
from metafocus.trainer.config import FocusOptions
from metafocus.trainer.contents import misfit
from metafocus.trainer.fingerprint import RUN, compared, fingerprint, read_run
from metafocus.trainer.interrupt import STOPPING, Interrupted, Signals
from metafocus.trainer.keeping import KeepingMixin
from metafocus.trainer.lock import one_run
from metafocus.trainer.nonfinite import (
    HeldSchedule,
    StepGuard,
    bad_weights,
    drop_gradients,
    whole_tensor,
)
from metafocus.trainer.ranks import from_first
from metafocus.trainer.totals import Totals, metrics_of


class ReliableMixin(KeepingMixin):
    """A Trainer of which no step, checkpoint or signal can spoil what was reached.

    Args:
        model: of the Trainer.
        args: of the Trainer.
        focus: the settings `on_nonfinite` and `max_nonfinite` are read here.
        kwargs: of the Trainer.

    Attributes:
        finished: whether the run that `train` was to resume had no step left.
        is_in_train: of the Trainer, whether `train` is running.
    """

    is_in_train: bool

    def __init__(self, model: Any, args: Any, *, focus: FocusOptions, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self.focus: FocusOptions = focus
        self._guard = StepGuard(focus.on_nonfinite, focus.max_nonfinite)
        self._held: HeldSchedule | None = None
        self._last_step = 0.0
        self._signals = Signals()
        self._stop_by = 0
        self._print: dict[str, Any] | None = None
        self._totals = Totals(self.args.device)
        self._resumed_from: Path | None = None
        self.finished: bool = False
        self.add_callback(_Steps(self))

    @property
    def _plain(self) -> nn.Module:
        """The model without its wrappers (with FSDP: as it is sharded)."""
        return cast(nn.Module, self.model)

    def _bad_losses(self) -> Tensor:
        """How many losses of the step were not finite on this rank; asked once a step."""
        return torch.zeros((), device=self.args.device)

    # Steps ----------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called after the scaler's unscale and before the optimiser: the last place where a
        # gradient can be kept from the weights. The loss may be finite where its gradient is not.
        norm: Any = whole_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))
        norm = torch.as_tensor(norm, device=self.args.device)
        stops = [float(self._signals.received == number) for number in STOPPING]
        bad = torch.stack([~norm.isfinite(), self._bad_losses()]).float()
        found = torch.cat([bad, bad.new_tensor(stops)])
        # If ranks decided differently, they would wait for each other for ever.
        bad_norms, bad_losses, *ranks = self._over_ranks(found).tolist()
        stopped = zip(STOPPING, ranks, strict=True)
        self._stop_by = next((int(number) for number, count in stopped if count), 0)
        if not bad_norms and not bad_losses:
            self._guard.good()
            return norm
        scaler = self.accelerator.scaler
        scale = None if scaler is None else scaler.get_scale()
        # Of sharded gradients, the norm may be finite on this rank alone.
        value = float("nan") if bad_norms and norm.isfinite() else float(norm)
        self._guard.bad(value, round(bad_losses), self.state.global_step, scale)
        drop_gradients(model)
        self._held = HeldSchedule(self.optimizer, self.lr_scheduler)
        # NaN is not valid JSON, so the log entry has no norm.
        return None

    def _over_ranks(self, value: Tensor) -> Tensor:
        """Sum a tensor over the ranks."""
        if self.accelerator.num_processes == 1:
            return value
        return cast(Tensor, self.accelerator.reduce(value, "sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training losses with the steps left out so far, the last entry of the whole run."""
        if "train_runtime" in logs and self._resumed_from is not None:
            logs.update(self._whole_run())
        if "loss" in logs:
            logs["skipped_steps"] = float(self._guard.skipped)
            if self.accelerator.scaler is not None:
                logs["scaler_skips"] = float(self._guard.scaler_skips)
        super().log(logs, start_time)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train; `True` resumes the newest complete checkpoint, or begins where there is none.

        Raises:
            DataError: for a checkpoint that is damaged, where no complete one is left; for an
                output directory in which another process trains.
            NonFiniteError: by `on_nonfinite` and `max_nonfinite`, or if no step was finite.
            MetafocusError: for a rank that does not answer within `ddp_timeout`.
            Interrupted: after SIGINT or SIGTERM, when the checkpoint is saved.
        """
        folder = Path(self.args.output_dir or ".")
        # Settings and data may have changed since an earlier call.
        self._print = None
        with one_run(folder), Signals() as self._signals:
            from_first(lambda: staging.clean(folder))
            found = from_first(lambda: self._resumed(resume_from_checkpoint, folder))
            self._begin(None if found is None else Path(found))
            try:
                result = super().train(found, *args, **kwargs)
            except Interrupted as stop:
                self._say(f"metafocus: {stop.line}", sys.stderr)
                raise
            except _Finished:
                return self._nothing_left()
            except RuntimeError as error:
                self._check_stalled(error)
                raise
        self._guard.check_end(self.state.global_step)
        loss = result.metrics.get("train_loss", result.training_loss)
        return result._replace(training_loss=loss)

    def _check_stalled(self, error: RuntimeError) -> None:
        """Raise in plain words if an exchange with the other ranks has run into `ddp_timeout`."""
        waited, limit = time.monotonic() - self._last_step, self.args.ddp_timeout
        if self.accelerator.num_processes > 1 and waited >= limit:
            raise MetafocusError(
                f"rank {self.args.process_index} has waited for the other ranks longer than "
                f"ddp_timeout={limit} s after step {self.state.global_step}: one of them is "
                "stalled or has ended. Look at its log; the checkpoints saved so far are whole. "
                "Raise ddp_timeout if its step only takes long."
            ) from error

    def _resumed(self, wanted: str | bool | None, folder: Path) -> str | None:
        """Return the checkpoint to resume, and say what changed since it was saved."""

        def judge(place: Path) -> str | None:
            return misfit(place, self._plain, self.optimizer)

        how: Any = {"misfit": judge}
        if wanted is True:
            found = resumable(folder, **how)
        else:
            found = require_complete(wanted, **how) if wanted else None
        if found is None:
            return None
        changes = compared(found, self._fingerprint(), allowed=self.focus.allow_changed)
        others = other_ranks(found, self.args.world_size)
        if others is not None:
            warnings.warn(others, stacklevel=3)
        if changes:
            self._say(f"resuming from {found.name}; changed since: {'; '.join(changes)}")
        return str(found)

    def _begin(self, place: Path | None) -> None:
        """Set what is counted to its beginning, or to what a checkpoint holds."""
        before = read_run(place).get("so_far", {}) if place else {}
        self._totals = Totals(self.args.device, before)
        counts = before.get("skipped_steps", 0), before.get("scaler_skips", 0)
        self._guard = StepGuard(self.focus.on_nonfinite, self.focus.max_nonfinite, *counts)
        self._stop_by, self._last_step = 0, time.monotonic()
        self._resumed_from, self.finished = place, False

    def _nothing_left(self) -> TrainOutput:
        self.is_in_train, self.finished = False, True
        self._say(
            f"the run in {self.args.output_dir} has taken all of its {self.state.global_step} "
            "steps: nothing was trained, and nothing is overwritten. For a longer run raise "
            "max_steps or num_train_epochs."
        )
        metrics = self._whole_run()
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _whole_run(self) -> dict[str, Any]:
        """The metrics of all steps, those before this process included."""
        loss = float(self._over_ranks(self._totals.loss)) / self.accelerator.num_processes
        batch = self.get_total_train_batch_size(self.args)
        return metrics_of(self._totals.now(loss), self.state.global_step, batch)

    def _fingerprint(self) -> dict[str, Any]:
        if self._print is None:
            recipe = self._objects()
            data = self.train_dataset
            self._print = fingerprint(self.args, self.focus, self._plain, data, recipe)
        return self._print

    def _objects(self) -> Any:
        """What was given as objects instead of settings."""
        return None

    def _say(self, text: str, file: Any = None) -> None:
        if self.is_world_process_zero():
            print(text, file=file, flush=True)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward and backward pass of a micro-batch; its loss counts for the whole run."""
        loss = super().training_step(*args, **kwargs)
        self._totals.add(loss)
        return loss

    # Checkpoints ----------------------------------------------------------------------------

    def _before_saving(self) -> None:
        """Raise rather than save weights that are not finite."""
        bad = bad_weights(self._plain)
        if float(self._over_ranks(torch.tensor(float(len(bad)), device=self.args.device))):
            more = f" and {len(bad) - 1} more" * (len(bad) > 1)
            names = f"{bad[0]}{more}" if bad else "a parameter of another rank"
            raise NonFiniteError(
                f"NaN or infinity in the weights after step {self.state.global_step}, in {names}: "
                "the checkpoint is not written, and those before it are whole. Lower "
                "learning_rate, and resume."
            )

    def _write_run(self, place: Path) -> None:
        """Note what the run is made of, and what it has counted so far."""
        loss = float(self._over_ranks(self._totals.loss)) / self.accelerator.num_processes
        if self.args.should_save:
            counts = {
                "skipped_steps": self._guard.skipped,
                "scaler_skips": self._guard.scaler_skips,
            }
            place.mkdir(parents=True)
            so_far = {**self._totals.now(loss), **counts}
            write_json(place / RUN, {**self._fingerprint(), "so_far": so_far})


class _Finished(Exception):
    """A run that is resumed has no step left."""


class _Steps(TrainerCallback):
    """What is done before the first step, at the end of every one, and after a checkpoint."""

    def __init__(self, trainer: ReliableMixin):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        place = self._trainer._resumed_from
        if place is not None and state.global_step > state.max_steps:
            raise DataError(
                f"max_steps={state.max_steps} is below the {state.global_step} steps of {place}: "
                "raise max_steps (or num_train_epochs), or name an earlier checkpoint with "
                "resume_from_checkpoint=PATH."
            )
        if place is not None and state.global_step == state.max_steps:
            raise _Finished

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        trainer = self._trainer
        trainer._last_step = time.monotonic()
        if trainer._held is not None:
            trainer._held.put_back()
            trainer._held = None
        if trainer.accelerator.num_processes == 1:
            trainer._stop_by = trainer._signals.received
        # The last step ends the run by itself.
        if trainer._stop_by and state.global_step < state.max_steps:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._trainer._stop_by and state.global_step < state.max_steps:
            raise Interrupted(self._trainer._stop_by, state.global_step)
