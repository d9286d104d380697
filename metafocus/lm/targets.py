"""What a loss scores in a batch: which positions are read, and what is predicted there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metafocus.lm.cross_entropy import IGNORED
from metafocus.lm.hf.heads import scored_rows
from metafocus.lm.tokens import TokenPolicy, predicted
from metafocus.masks import Batch
from metafocus.parallel.collectives import Group
from metafocus.parallel.sequence import share


class Targets(NamedTuple):
    """What a loss needs to know of a batch besides the model's inputs."""

    policy: TokenPolicy
    """Which tokens are scored."""
    rows: Tensor | None
    """Flat indices of the positions from which they are predicted, `[n]`; None: all of them."""
    targets: Tensor
    """What is predicted there, `[n]`; or `[B * S]`, -100 where nothing is."""
    number: Tensor
    """Number of scored tokens, at least 1."""
    mask: Tensor | None = None
    """The spans of the last layer, in which only the rows' queries attend; None: those of all."""

    def select(self, hidden: Tensor) -> Tensor:
        """Return the rows of `[B, S, D]` hidden states to which the targets belong."""
        flat = hidden.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)


def next_tokens(tokens: TokenPolicy, batch: Batch) -> Tensor:
    """Return what is predicted at each position, `[B, S]`: the next token, -100 where not scored.

    Example:
        >>> from metafocus.lm.tokens import all_tokens
        >>> next_tokens(all_tokens, {"input_ids": torch.tensor([[5, 6, 7]])}).tolist()
        [[6, 7, -100]]
    """
    scored = predicted(tokens, batch)[:, 1:]
    targets = torch.where(scored, batch["input_ids"][:, 1:], IGNORED)
    return F.pad(targets, (0, 1), value=IGNORED)


def targets_of(tokens: TokenPolicy, batch: Batch, group: Group = None) -> Targets:
    """Return the targets of a batch, without a mask.

    Args:
        tokens: Which tokens are scored.
        batch: A batch of tokens.
        group: The ranks that share each sequence; the rows are then this rank's.
    """
    whole = next_tokens(tokens, batch)
    count = (whole != IGNORED).sum().clamp(min=1)
    targets = share(whole, group, IGNORED).flatten()
    rows = scored_rows(targets)
    if rows is not None:
        targets = targets.index_select(0, rows)
    return Targets(tokens, rows, targets, count)
