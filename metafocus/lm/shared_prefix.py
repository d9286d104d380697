"""What does not depend on the fast weights, computed once for all inner steps and the outer pass.

The layers below the first fast weight give the same hidden states at every inner step. They are
run once, with a graph, and each loss starts above them: a first-order estimator takes the states
of the inner loop detached, every other one as the explicit tensors that they are.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from metafocus.calls import note
from metafocus.lm.hf import prefix
from metafocus.lm.hf.observers import observed, structure
from metafocus.lm.hf.side_runs import side_run
from metafocus.lm.loss import LMLoss
from metafocus.masks import Batch
from metafocus.rng import Drawn
from metafocus.types import Params


class SharedPrefix:
    """Puts the hidden states below the first fast layer into prepared batches.

    The first call finds the layer to cut at, and checks it: the model must give the same output
    for a few tokens whether it runs in two parts or as a whole, with fast weights that are not
    zero. A model of which a module is replaced is checked again. If the check fails, if layers
    draw random numbers, or if hooks of a user look on, batches are returned as they are.
    """

    def __init__(self, loss: LMLoss):
        self.loss = loss
        self.checked: Any = None
        self.cut: tuple[str, int] | None = None

    def __reduce__(self) -> tuple[type[SharedPrefix], tuple[LMLoss]]:
        # The modules of a copy are others: it checks them itself.
        return SharedPrefix, (self.loss,)

    def __call__(self, slow: Params, batch: Batch) -> Batch:
        """Return the prepared batch with its hidden states, if they can be shared.

        Args:
            slow: the slow weights; `{}` means the model's own.
            batch: what `loss.prepare` returned.

        Warns:
            UserWarning: once, with the class of the model and the reason, if the check fails.
        """
        model = self.loss.model
        if prefix.draws_random_numbers(model) or observed(model):
            return batch
        now = None if torch.compiler.is_compiling() else structure(model)
        if now is not None and now != self.checked:
            self.cut, self.checked = self._find(), now
        if self.cut is None:
            return batch
        path, layer = self.cut
        note("shared layers", f"{path}.0 to {path}.{layer - 1} run once for all inner steps")
        return {**batch, "hidden": self.loss.hidden_before(self.cut, slow, batch)}

    def _find(self) -> tuple[str, int] | None:
        model = self.loss.model
        with side_run(model):
            fast = self.loss.adapter.init(model, torch.Generator().manual_seed(0))
            cut = prefix.fast_layers(model, fast)
            if cut is None or cut[1] == 0 or prefix.has_own_call(model):
                return None
            reason = self._difference(cut, fast)
        if reason is None:
            return cut
        warnings.warn(
            f"{type(model).__name__}: the layers below the fast weights cannot be run once for "
            f"all inner steps ({reason}). They are run in each of them: correct, but slower.",
            stacklevel=4,
        )
        return None

    def _difference(self, cut: tuple[str, int], fast: Params) -> str | None:
        loss, draw = self.loss, torch.Generator().manual_seed(1)
        fast = {name: (torch.rand(x.shape, generator=draw) - 0.5).to(x) for name, x in fast.items()}
        batch = loss.trial_batch()
        try:
            # If an upper layer reads what a lower one returned, the result is not a number.
            hidden = loss.hidden_before(cut, {}, batch)._replace(others=torch.nan)
            before = Drawn(loss.model.parameters())
            whole = loss.final_hidden(fast, batch)
            if not before.equals(Drawn(loss.model.parameters())):
                return "it draws random numbers, of which each pass has its own"
            parts = loss.final_hidden(fast, {**batch, "hidden": hidden})
        except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
            return f"it cannot run in two parts: {error}"
        size = whole.abs().amax()
        # Both ways are the same operations on the same numbers.
        eps = 8 * torch.finfo(whole.dtype).eps
        if size > 0 and torch.allclose(parts / size, whole / size, rtol=0, atol=eps):
            return None
        return "a few tokens come out in two parts otherwise than they come out whole"
