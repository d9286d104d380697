"""How a Trainer keeps its checkpoints: beside their place first, whole, by step; and reads them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from metafocus.trainer import staging
from metafocus.trainer.checkpoints import SEAL, saving
from metafocus.trainer.contents import tied
from metafocus.trainer.ranks import from_first
from metafocus.trainer.shards import ShardedMixin


class KeepingMixin(ShardedMixin):
    """A Trainer whose checkpoints are whole, in whatever moment its process ends."""

    _staged = False

    def _before_saving(self) -> None:
        """Raise for a model that must not be saved."""

    def _write_run(self, place: Path) -> None:
        """Write to a checkpoint what is known of the run."""

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is saved, the Trainer writes and rotates beside its place.
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, staging.STAGE) if self._staged else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload runs in the background: of the directory that stays.
        if not self._staged:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._before_saving()
        folder = Path(self._get_output_dir(trial))
        place = folder / f"checkpoint-{self.state.global_step}"
        try:
            with saving(place, "the checkpoint", "What lies there is what was there before"):
                from_first(lambda: staging.clean(folder))
                self._write_run(folder / staging.STAGE / place.name)
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

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule, and note the rates that it begins with in the optimiser's state."""
        made = super().create_scheduler(num_training_steps, optimizer)
        for group in self._groups():
            # Most schedules have done so; those that follow a metric have not.
            group.setdefault("initial_lr", group["lr"])
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The state of an optimiser has its settings in it: those that are given count.
        given = [{k: v for k, v in g.items() if k != "params"} for g in self._groups()]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, new in zip(self._groups(), given, strict=True):
            then, rate = group.get("initial_lr"), group["lr"]
            group.update(new)
            if then:
                # What the schedule has made of the rate so far.
                group["lr"] = rate if then == new["initial_lr"] else rate * new["initial_lr"] / then
        scheduler: Any = self.lr_scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group["initial_lr"] for group in self._groups()]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied head has no entry of its own in a file, and lacks nothing.
        model: Any = self.model
        present = set(model.state_dict()) - set(load_result.missing_keys)
        missing = set(load_result.missing_keys) - tied(model, present)
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key in missing]
        super()._issue_warnings_after_load(load_result)

    def _groups(self) -> list[dict[str, Any]]:
        optimizer: Any = self.optimizer
        return optimizer.param_groups
