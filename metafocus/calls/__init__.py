"""Calls: who changes a model for a while, and how everything is put back, whatever happens.

A call of this package changes what is not its own: it binds fast weights, replaces the attention
and the checkpointing of a model, and swaps parameters. Every such change is made by `changed` or
guarded by `undone`: it is recorded before it is made, and the record is dropped after it is undone.
What an interrupted exit leaves is therefore known, and the next call undoes it.

A `Call` owns the models that it uses until it is over. It is a token and not a thread: a graph
carries it, because CUDA runs a backward pass in another thread. An `attempt` is a call that puts
random generators and modes back when it fails.
"""

from metafocus.calls.attempts import attempt, attempted, draws_from
from metafocus.calls.blocks import Scoped, settle, undone
from metafocus.calls.changes import ABSENT, changed, evaluating, holding
from metafocus.calls.notes import note, noting, noting_into
from metafocus.calls.owners import Call, current, inside, refuse_nested, running, using

__all__ = [
    "ABSENT",
    "Call",
    "Scoped",
    "attempt",
    "attempted",
    "changed",
    "current",
    "draws_from",
    "evaluating",
    "holding",
    "inside",
    "note",
    "noting",
    "noting_into",
    "refuse_nested",
    "running",
    "settle",
    "undone",
    "using",
]
