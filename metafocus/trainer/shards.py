"""A Trainer on sharded weights: `--sharding parametrised`, and plain files of any sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import Trainer

from metafocus.calls import changed
from metafocus.errors import ProblemError
from metafocus.parallel.collectives import Group
from metafocus.trainer.contents import tensors_of, weight_files
from metafocus.trainer.parametrised import like, load_whole, parametrise, whole_state


class ShardedMixin(Trainer):
    """A Trainer whose weights may be parametrised shards.

    Checkpoints hold whole tensors under plain names, so that any number of processes resumes them,
    sharded or not, and the last save is a folder that `from_pretrained` loads.
    """

    _own_shards = False

    def _parametrise(self, sequence_group: Group) -> None:
        """Shard the model's weights over all processes; one process has nothing to shard.

        Args:
            sequence_group: the processes that share each sequence with this one.
        """
        if self.args.world_size == 1:
            return
        if self.args.fsdp or self.args.torch_compile:
            name = "fsdp" if self.args.fsdp else "torch_compile"
            raise ProblemError(
                f"sharding='parametrised' and {name} are both given: it takes the place of fsdp, "
                "and is not compiled. Leave one of them out."
            )
        model: Any = self.model
        mesh = init_device_mesh(self.args.device.type, (dist.get_world_size(),))
        parametrise(model, mesh, sequence_group=sequence_group)
        # As with a model that transformers has sharded, accelerate is not to wrap it.
        self.is_distributed_loading_by_transformers = True
        self._own_shards = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save; of a sharded state dict too, the last save is a model that can be loaded."""
        super().save_model(output_dir, _internal_call)
        if _internal_call or not self.is_fsdp_enabled:
            return
        plugin: Any = self.accelerator.state.fsdp_plugin
        if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            state = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=state)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._own_shards and state_dict is None:
            state_dict = whole_state(self.model)  # pyright: ignore
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._own_shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer: Any = self.optimizer
        found = optimizer.state_dict()
        state = {
            i: {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in entry.items()}
            for i, entry in found["state"].items()
        }
        with changed((self, "optimizer", _Saved({**found, "state": state}))):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self._own_shards:
            return
        optimizer: Any = self.optimizer
        for parameter, entry in optimizer.state.items():
            for name, value in entry.items():
                if not isinstance(value, DTensor) and value.shape == parameter.shape:
                    entry[name] = like(parameter, value)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._own_shards:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        files = weight_files(Path(resume_from_checkpoint))
        load_whole(self.model, dict(x for file in files for x in tensors_of(file)))  # pyright: ignore

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._own_shards and best:
            self._load_from_checkpoint(best)
            return
        super()._load_best_model()


class _Saved:
    """An optimiser as far as saving asks for one."""

    def __init__(self, state: dict[str, Any]):
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state
