"""One cell: fine-tune the model in one way, then measure what came of it, as plain numbers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from loop import fine_tune
from protocol import ESTIMATORS, MASKS, TOKENS, Cell, Scale
from tasks import sample, samples
from torch import Tensor

import metafocus as mf
from metafocus.data import Collator
from metafocus.recipes import focusft, focusft_problem

Batch = dict[str, Tensor]
Way = Callable[[Batch], tuple[list[bool], list[float]]]


class Bench:
    """The chats that every cell is asked about, encoded once, each a batch of one row.

    Attributes:
        asked: by task and length, chats with several questions.
        shown: by task, chats of the trained length with one question and its evidence.
    """

    def __init__(self, scale: Scale, tokenizer: Any, device: Any):
        pad = Collator(tokenizer.pad_token_id)

        def batches(task: str, name: str, n: int, length: int, turns: int) -> list[Batch]:
            made = (
                sample(task, f"{name} {i}", "heldout", length, tokenizer, turns) for i in range(n)
            )
            return [{k: v.to(device) for k, v in pad([chat]).items()} for chat in made]

        self.asked = {
            task: {
                length: batches(task, "asked", n, length, scale.turns)
                for length, n in scale.chats.items()
            }
            for task in scale.tasks
        }
        # Two at least: the control takes another one's fast weights.
        shown = max(scale.profiled, 2)
        self.shown = {task: batches(task, "shown", shown, scale.length, 1) for task in scale.tasks}


def computing(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in bfloat16, as in the paper; weights and optimiser stay in float32."""
    return torch.autocast(device.type, torch.bfloat16)


def train(
    model: Any, tokenizer: Any, scale: Scale, cell: Cell, seed: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Fine-tune `model`; the seed fixes the chats, their order and the fast weights' start."""
    started = time.process_time()
    chats = samples(
        scale.trained, scale.steps, f"seed {seed}", "train", scale.length, tokenizer, scale.turns
    )
    pad = Collator(tokenizer.pad_token_id)
    batches = [{k: v.to(model.device) for k, v in pad([chat]).items()} for chat in chats]
    # Tasks take turns, so the sample that many places earlier is of the same task.
    shift = len(scale.trained) if cell.support == "another" else 0
    episodes = [mf.Episode(batches[i - shift], batch) for i, batch in enumerate(batches)]
    meta = focusft(
        model,
        adapter=cell.adapter,
        mask=MASKS[cell.mask],
        solver=cell.solver,
        estimator=ESTIMATORS[cell.estimator],
        inner_tokens=TOKENS[cell.tokens],
        generator=torch.Generator().manual_seed(seed),
    )
    history = fine_tune(
        model,
        meta,
        episodes,
        lr=scale.lr,
        computing=lambda: computing(model.device),
        progress=progress,
    )
    return {**history._asdict(), "cpu_seconds": time.process_time() - started}


def measure(model: Any, bench: Bench, scale: Scale, cell: Cell, seed: int = 0) -> dict[str, Any]:
    """Return answers and losses by task and length, the fast weights' control, and attention."""
    started = time.process_time()
    model.eval()
    # The deployed model has the plain causal mask and no fast weights. The other ways say what
    # part of a result comes from the mask or the adaptation being there at test time.
    ways: dict[str, tuple[Way, tuple[int, ...]]] = {
        "deployed": (lambda batch: answers(model, Cell("causal"), batch, {}), tuple(scale.chats))
    }
    if cell.mask != "causal":
        ways["training mask"] = (lambda batch: answers(model, cell, batch, {}), scale.as_trained)
    if cell.steps and cell.tokens == "context":
        ways["adapted to the context"] = (
            lambda batch: answers(model, cell, batch, adapted(model, cell, batch, seed)),
            (scale.length,),
        )
    with computing(model.device):
        found = {
            "scores": {
                name: {
                    task: {str(n): score(way, bench.asked[task][n]) for n in lengths}
                    for task in scale.tasks
                }
                for name, (way, lengths) in ways.items()
            },
            "control": control(model, cell, bench, scale, seed) if cell.steps else None,
            "attention": attention(model, cell, bench, scale.profiled, seed),
        }
    return {**found, "measuring_cpu_seconds": time.process_time() - started}


def score(way: Way, batches: list[Batch]) -> dict[str, list[Any]]:
    """Return what a way says to each question of each chat."""
    said = [way(batch) for batch in batches]
    return {"right": [right for right, _ in said], "loss": [loss for _, loss in said]}


@torch.no_grad()
def answers(
    model: Any, cell: Cell, batch: Batch, fast: mf.Params
) -> tuple[list[bool], list[float]]:
    """Return of each answer of a chat whether greedy decoding gives it exactly, and its loss.

    Greedy decoding yields the answer if and only if each of its tokens is the likeliest one after
    those before it, so one pass over prompt and answer tells. Earlier answers stand in the chat as
    they should be.
    """
    adapter = cell.adapter if fast else Cell(cell.mask).adapter
    loss = mf.lm_loss(model, adapter=adapter, mask=MASKS[cell.mask])
    hidden = loss.final_hidden(fast, loss.prepare(batch))
    place = batch["answer_mask"][0].nonzero().flatten()
    logits = model.get_output_embeddings()(hidden[0, place - 1]).float()
    targets, turn = batch["input_ids"][0, place], batch["turn_ids"][0, place]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    correct = logits.argmax(-1) == targets
    turns = turn.unique().tolist()
    return (
        [bool(correct[turn == t].all()) for t in turns],
        [float(losses[turn == t].mean()) for t in turns],
    )


def adapted(model: Any, cell: Cell, batch: Batch, seed: int) -> mf.Params:
    """Return fast weights after the cell's inner loop on a batch."""
    problem = focusft_problem(
        model,
        adapter=cell.adapter,
        mask=MASKS[cell.mask],
        inner_tokens=TOKENS[cell.tokens],
        generator=torch.Generator().manual_seed(seed),
    )
    slow = {k: v.detach() for k, v in model.named_parameters()}
    return mf.adapt(problem, slow, batch, solver=cell.solver).params


def control(
    model: Any, cell: Cell, bench: Bench, scale: Scale, seed: int
) -> dict[str, list[float]]:
    """Return the answer losses with no fast weights, with own ones, and with another sample's.

    If another sample's fast weights help as much as own ones, the inner loop has not adapted to
    the content. Where it scores answers, own ones have seen the labels.
    """
    losses: dict[str, list[float]] = {"none": [], "own": [], "another's": []}
    for batches in (bench.shown[task] for task in scale.trained):
        fast = [adapted(model, cell, batch, seed) for batch in batches]
        for i, batch in enumerate(batches):
            for name, weights in (("none", {}), ("own", fast[i]), ("another's", fast[i - 1])):
                losses[name] += answers(model, cell, batch, weights)[1]
    return losses


def attention(model: Any, cell: Cell, bench: Bench, profiled: int, seed: int) -> dict[str, Any]:
    """Return attention masses as deployed, with the training mask, and with fast weights too."""
    settings: dict[str, tuple[Cell, bool]] = {"deployed": (Cell("causal"), False)}
    if cell.mask != "causal":
        settings["training mask"] = (Cell(cell.mask), False)
    if cell.steps:
        settings["with fast weights"] = (cell, True)
    found: dict[str, Any] = {}
    for name, (way, moving) in settings.items():
        profiles = []
        for batch in (b for batches in bench.shown.values() for b in batches[:profiled]):
            extra: dict[str, Any] = {}
            if moving:
                extra = {"adapter": cell.adapter, "fast": adapted(model, cell, batch, seed)}
            profiles.append(
                mf.diagnostics.attention_profile(model, batch, mask=MASKS[way.mask], **extra)
            )
        means = [p.summary() for p in profiles]
        found[name] = {
            # One number a chat: the intervals draw chats.
            **{key: [m[key] for m in means] for key in means[0]},
            "sink_by_layer": torch.stack([p.sink_mass for p in profiles]).mean(0).tolist(),
            "column_by_layer": torch.stack([p.max_column_mass for p in profiles]).mean(0).tolist(),
            "column_index": [p.max_column_index.tolist() for p in profiles],
        }
    return found
