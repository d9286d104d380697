"""What `metafocus train` shows and measures while Hugging Face's Trainer runs."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from metafocus.errors import NonFiniteError
from metafocus.trainer.evaluation import configured, ways
from metafocus.trainer.mixin import FocusMixin


class HeldOut(TrainerCallback):
    """Measures the held-out loss before the first step and after the last one, and logs both.

    In the history they are `eval_<way>_loss` for each way of `trainer.heldout_losses()`, beside
    `eval_loss`. A run that is resumed has the first measurement in its history.
    """

    def __init__(self, trainer: FocusMixin):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Measure the model that training begins with."""
        if state.global_step == 0:
            losses = self._measure()
            if state.is_world_process_zero:
                print(f"held-out loss before: {shown(losses)}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Measure the trained model.

        Raises:
            NonFiniteError: for a model that is not worth saving.
        """
        losses = self._measure()
        if not all(map(math.isfinite, losses.values())):
            raise NonFiniteError(
                f"the held-out loss after training is {shown(losses)}; nothing was saved. Lower "
                "learning_rate, or look at the data."
            )

    def _measure(self) -> dict[str, float]:
        focus, losses = self._trainer.focus, self._trainer.heldout_losses()
        by_way = {way: losses[name] for name, way in ways(focus).items()}
        entry = {key(name): loss for name, loss in losses.items()}
        self._trainer.log({"eval_loss": by_way[configured(focus)], **entry})
        return losses


def key(way: str) -> str:
    """Return the name of a held-out loss in logs.

    Example:
        >>> key("training mask")
        'eval_training_mask_loss'
    """
    return f"eval_{way.replace(' ', '_')}_loss"


def shown(losses: dict[str, float]) -> str:
    """Return held-out losses as a text."""
    return ", ".join(f"{loss:.4f} ({name})" for name, loss in losses.items())


class Bars(TrainerCallback):
    """A progress bar with the last losses, and one that goes away for each evaluation."""

    def __init__(self) -> None:
        self._train: Any = None
        self._evaluation: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Show the bar, from the step that is resumed."""
        self._train = self._bar(state, state.max_steps, "train", "step", initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Move on by one step."""
        self._train.update(state.global_step - self._train.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any
    ) -> None:
        """Show the losses of a log entry."""
        logs = logs or {}
        if self._train is None or "loss" not in logs:
            return
        text = {"loss": f"{logs['loss']:.3f}"}
        if "inner_loss_first" in logs:
            text["inner"] = f"{logs['inner_loss_first']:.3f} > {logs['inner_loss_last']:.3f}"
        self._train.set_postfix(text)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **others: Any
    ) -> None:
        """Move on by one batch of an evaluation."""
        if self._evaluation is None:
            self._evaluation = self._bar(
                state, len(eval_dataloader), "evaluate", "batch", leave=False
            )
        self._evaluation.update(1)
        if self._evaluation.n >= self._evaluation.total:
            self._evaluation.close()
            self._evaluation = None

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Leave the bar on the screen."""
        self._train.close()
        self._train = None

    def _bar(self, state: Any, total: int, name: str, unit: str, **more: Any) -> Any:
        from tqdm.auto import tqdm

        hidden = not state.is_world_process_zero
        return tqdm(total=total, desc=name, unit=unit, disable=hidden, dynamic_ncols=True, **more)


@contextlib.contextmanager
def decisions_printed() -> Iterator[None]:
    """Print whether inner loops checkpoint, and why, inside a `with` block."""
    log = logging.getLogger("metafocus.checkpointing")
    handler, level = logging.StreamHandler(sys.stdout), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
