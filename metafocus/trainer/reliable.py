"""What makes a Trainer's run survive: bad steps, signals, kills, full disks, a second run.

Everything goes through methods that the Trainer calls, and through callbacks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from metafocus.errors import NonFiniteError
from metafocus.trainer import staging
from metafocus.trainer.checkpoints import SEAL, require_complete, resumable, saving
from metafocus.trainer.config import FocusOptions
from metafocus.trainer.interrupt import Interrupted, Signals
from metafocus.trainer.lock import one_run
from metafocus.trainer.nonfinite import (
    HeldSchedule,
    StepGuard,
    bad_weights,
    drop_gradients,
    whole_tensor,
)
from metafocus.trainer.ranks import from_first


class ReliableMixin(Trainer):
    """A Trainer of which no step, checkpoint or signal can spoil what was reached.

    Args:
        model: of the Trainer.
        args: of the Trainer.
        focus: the settings `on_nonfinite` and `max_nonfinite` are read here.
        kwargs: of the Trainer.
    """

    def __init__(self, model: Any, args: Any, *, focus: FocusOptions, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self.focus: FocusOptions = focus
        self._guard = StepGuard(focus.on_nonfinite, focus.max_nonfinite)
        self._held: HeldSchedule | None = None
        self._steps_here = 0
        self._signals = Signals()
        self._stop_by = 0
        self._staged = False
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
        signal = norm.new_tensor([self._signals.received, bool(self._signals.received)])
        found = torch.cat([torch.stack([~norm.isfinite(), self._bad_losses()]).float(), signal])
        # Ranks that decided differently would wait for each other for ever.
        bad_norms, bad_losses, signals, ranks = self._over_ranks(found).tolist()
        self._stop_by = round(signals / max(ranks, 1))
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
        # A norm that is not a number is no JSON: the log entry has none.
        return None

    def _over_ranks(self, value: Tensor) -> Tensor:
        """Sum a tensor over the ranks."""
        if self.accelerator.num_processes == 1:
            return value
        return cast(Tensor, self.accelerator.reduce(value, "sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training losses come with how many steps were left out so far."""
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
            Interrupted: after SIGINT or SIGTERM, when the checkpoint is saved.
        """
        folder = Path(self.args.output_dir or ".")
        with one_run(folder), Signals() as self._signals:
            from_first(lambda: staging.clean(folder))
            place = from_first(lambda: self._resumed(resume_from_checkpoint, folder))
            self._steps_here, self._stop_by = 0, 0
            try:
                result = super().train(place, *args, **kwargs)
            except Interrupted as stop:
                if self.is_world_process_zero():
                    print(f"metafocus: {stop.line}", file=sys.stderr, flush=True)
                raise
        self._guard.check_end(self._steps_here)
        return result

    def _resumed(self, wanted: str | bool | None, folder: Path) -> str | None:
        """Return the checkpoint to resume."""
        ranks = self.args.world_size
        if wanted is True:
            found = resumable(folder, ranks=ranks)
            return None if found is None else str(found)
        return str(require_complete(wanted, ranks=ranks)) if wanted else None

    # Checkpoints ----------------------------------------------------------------------------

    def _check_weights(self) -> None:
        """Raise rather than save weights that are not finite.

        Raises:
            NonFiniteError: naming the first parameter.
        """
        bad = bad_weights(self._plain)
        if float(self._over_ranks(torch.tensor(float(len(bad)), device=self.args.device))):
            more = f" and {len(bad) - 1} more" * (len(bad) > 1)
            names = f"{bad[0]}{more}" if bad else "a parameter of another rank"
            raise NonFiniteError(
                f"NaN or infinity in the weights after step {self.state.global_step}, in {names}: "
                "the checkpoint is not written, and those before it are whole. Lower "
                "learning_rate, and resume."
            )

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is saved, the Trainer writes and rotates beside its place.
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, staging.STAGE) if self._staged else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload runs in the background: of the directory that stays.
        if not self._staged:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights()
        folder = Path(self._get_output_dir(trial))
        place = folder / f"checkpoint-{self.state.global_step}"
        with saving(place, "the checkpoint", "What lies there is what was there before"):
            try:
                from_first(lambda: staging.clean(folder))
                self._staged = True
                super()._save_checkpoint(model, trial)
                self._staged = False
                self._name_best(folder, place)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    staging.publish(folder, place.name)
            except BaseException:
                self._staged = False
                if self.args.should_save:
                    # Room for what comes next.
                    staging.clean(folder)
                raise
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {place} | ({Path(best)} if best else set())
            staging.rotate(folder, self.args.save_total_limit, keep)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        self.accelerator.wait_for_everyone()

    def _name_best(self, folder: Path, place: Path) -> None:
        """Note the best checkpoint by the name that it keeps."""
        step = self.state.best_global_step
        best = folder / f"checkpoint-{step}"
        if step and (best == place or best.exists()):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(folder / staging.STAGE / place.name / SEAL))


class _Steps(TrainerCallback):
    """What is done at the end of every step, and after a checkpoint."""

    def __init__(self, trainer: ReliableMixin):
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        trainer = self._trainer
        trainer._steps_here += 1
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
