"""What makes a Trainer's run survive: steps that are not finite, and what comes later here.

Everything goes through methods that the Trainer calls and callbacks; nothing of it is replaced.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from metafocus.errors import NonFiniteError
from metafocus.trainer.config import FocusOptions
from metafocus.trainer.nonfinite import (
    HeldSchedule,
    StepGuard,
    bad_weights,
    drop_gradients,
    whole_tensor,
)


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
        found = torch.stack([(~norm.isfinite()).float(), self._bad_losses().float()])
        # Ranks that decided differently would wait for each other for ever.
        bad_norms, bad_losses = self._over_ranks(found).tolist()
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Raises:
            NonFiniteError: by `on_nonfinite` and `max_nonfinite`, or if no step was finite.
        """
        self._steps_here = 0
        result = super().train(*args, **kwargs)
        self._guard.check_end(self._steps_here)
        return result

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights()
        super()._save_checkpoint(model, trial)


class _Steps(TrainerCallback):
    """What is done at the end of every step."""

    def __init__(self, trainer: ReliableMixin):
        self._trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer._steps_here += 1
        if trainer._held is not None:
            trainer._held.put_back()
            trainer._held = None
