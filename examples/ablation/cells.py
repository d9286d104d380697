"""One cell: fine-tune the base in one way, then measure what came of it, as plain numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from base import held_out_samples
from loop import fine_tune
from scale import MASKS, TOKENS, Cell, Scale
from tasks import prose, samples
from torch import Tensor

import metafocus as mf
from metafocus.data import Collator
from metafocus.recipes import focusft, focusft_problem

Samples = Sequence[dict[str, Tensor]]
Pad = Callable[[Samples], dict[str, Tensor]]
BATCH_TOKENS = 8192


def run_cell(model: Any, tokenizer: Any, scale: Scale, cell: Cell, seed: int) -> dict[str, Any]:
    """Fine-tune `model` and return its measurements; the seed fixes data, order and start."""
    noise = prose("train")
    started = time.process_time()
    chats = samples(
        scale.trained, scale.samples, f"train {seed}", noise, scale.length, tokenizer, turns=3
    )
    collate = on_device(Collator(tokenizer.pad_token_id), model.device)
    estimators = {"first-order": mf.FirstOrder(), "unrolled": mf.Unrolled(recompute=True)}
    meta = focusft(
        model,
        adapter=cell.adapter,
        mask=MASKS[cell.mask],
        solver=cell.solver,
        estimator=estimators[cell.estimator],
        inner_tokens=TOKENS[cell.tokens],
        generator=torch.Generator().manual_seed(seed),
    )
    size = {"steps": scale.steps, "rows": scale.rows, "lr": scale.lr}
    history = fine_tune(model, meta, chats, collate, **size, seed=seed)
    last = max(len(history.loss) // 10, 1)
    return {
        "training": {
            "loss": history.loss,
            "last_loss": sum(history.loss[-last:]) / last,
            "inner_first": history.inner_first,
            "inner_last": history.inner_last,
            "cpu_seconds": time.process_time() - started,
        },
        **measure(model, tokenizer, scale, cell, seed),
    }


def measure(model: Any, tokenizer: Any, scale: Scale, cell: Cell, seed: int = 0) -> dict[str, Any]:
    """Return accuracy and loss by task and length, the control, and attention."""
    model.eval()
    pad = on_device(Collator(tokenizer.pad_token_id), model.device)
    questions = held_out_samples(scale, tokenizer)
    # The deployed model has the plain causal mask and no fast weights; the others say what part of
    # a result comes from the mask or the adaptation being there at test time.
    ways: dict[str, Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]] = {
        "deployed": lambda batch: answers(model, Cell("causal"), batch, {}),
        "training mask": lambda batch: answers(model, cell, batch, {}),
    }
    if cell.inner and cell.tokens == "context":
        ways["adapted to the context"] = lambda batch: answers(
            model, cell, batch, adapted(model, cell, batch, seed)
        )
    if cell.mask == "causal":
        ways["training mask"] = ways["deployed"]
    scores: dict[str, Any] = {}
    for way, look in ways.items():
        scores[way] = {}
        for task, by_length in questions.items():
            scores[way][task] = {}
            for length, chats in by_length.items():
                known = scores.get("deployed", {}).get(task, {}).get(length)
                if way == "training mask" and cell.mask == "causal":
                    scores[way][task][length] = known
                    continue
                # Fast weights that adapt to a sample adapt to it alone.
                rows = 1 if way.startswith("adapted") else max(BATCH_TOKENS // length, 1)
                found = [look(pad(chats[i : i + rows])) for i in range(0, len(chats), rows)]
                right, loss = (torch.cat(part) for part in zip(*found, strict=True))
                scores[way][task][length] = {
                    "right": right.int().tolist(),
                    "accuracy": right.double().mean().item(),
                    "loss": loss.double().mean().item(),
                }
    shown = {
        task: [by_length[scale.length][i] for i in range(min(scale.profiled, scale.questions))]
        for task, by_length in questions.items()
    }
    return {
        "scores": scores,
        "control": control(model, cell, shown, pad, seed) if cell.inner else None,
        "attention": attention(model, cell, shown, pad, seed),
    }


def on_device(collator: Collator, device: torch.device) -> Pad:
    """Return what makes a batch of samples where the model is."""
    return lambda chats: {k: v.to(device) for k, v in collator(chats).items()}


@torch.no_grad()
def answers(
    model: Any, cell: Cell, batch: dict[str, Tensor], fast: mf.Params
) -> tuple[Tensor, Tensor]:
    """Return of each row whether greedy decoding gives its answer exactly, and the mean loss.

    Greedy decoding yields the answer if and only if each of its tokens is the likeliest one after
    those before it, so one pass over prompt and answer tells.
    """
    adapter = cell.adapter if fast else Cell(cell.mask).adapter
    loss = mf.lm_loss(model, adapter=adapter, mask=MASKS[cell.mask])
    hidden = loss.final_hidden(fast, loss.prepare(batch))
    row, place = batch["answer_mask"].nonzero(as_tuple=True)
    logits = model.get_output_embeddings()(hidden[row, place - 1]).float()
    targets = batch["input_ids"][row, place]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    wrong = (logits.argmax(-1) != targets).float()
    sums = losses.new_zeros(3, len(batch["input_ids"]))
    sums.index_add_(1, row, torch.stack([torch.ones_like(losses), losses, wrong]))
    return (sums[2] == 0).cpu(), (sums[1] / sums[0]).cpu()


def adapted(model: Any, cell: Cell, batch: dict[str, Tensor], seed: int) -> mf.Params:
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
    model: Any, cell: Cell, shown: dict[str, Samples], pad: Pad, seed: int
) -> dict[str, float]:
    """Return the answer loss with no fast weights, with own ones, and with another sample's.

    If another sample's fast weights help as much as own ones, the inner loop has not adapted to
    the content. Where it scores answers, own ones have seen the labels.
    """
    losses: dict[str, list[float]] = {"none": [], "own": [], "another's": []}
    for chats in shown.values():
        batches = [pad([chat]) for chat in chats]
        fast = [adapted(model, cell, batch, seed) for batch in batches]
        for i, batch in enumerate(batches):
            for name, weights in (("none", {}), ("own", fast[i]), ("another's", fast[i - 1])):
                losses[name].append(answers(model, cell, batch, weights)[1].item())
    return {name: sum(values) / len(values) for name, values in losses.items()}


def attention(
    model: Any, cell: Cell, shown: dict[str, Samples], pad: Pad, seed: int
) -> dict[str, Any]:
    """Return attention masses as deployed, with the training mask, and with fast weights too."""
    settings: dict[str, tuple[Cell, bool]] = {
        "deployed": (Cell("causal"), False),
        "training mask": (Cell(cell.mask), False),
    }
    if cell.inner:
        settings["with fast weights"] = (cell, True)
    found: dict[str, Any] = {}
    for name, (way, moving) in settings.items():
        profiles = []
        for chats in shown.values():
            for chat in chats:
                batch = pad([chat])
                extra: dict[str, Any] = {}
                if moving:
                    fast = adapted(model, cell, batch, seed)
                    extra = {"adapter": cell.adapter, "fast": fast}
                profiles.append(
                    mf.diagnostics.attention_profile(model, batch, mask=MASKS[way.mask], **extra)
                )
        means = [p.summary() for p in profiles]
        context = [float(p.sink(1, "context").mean()) for p in profiles]
        found[name] = {
            **{key: sum(m[key] for m in means) / len(means) for key in means[0]},
            "sink_mass_of_context": sum(context) / len(context),
            "sink_by_layer": torch.stack([p.sink_mass for p in profiles]).mean(0).tolist(),
            "engagement_by_layer": torch.stack([p.context_engagement for p in profiles])
            .mean(0)
            .tolist(),
            "max_column_index": [p.max_column_index.tolist() for p in profiles],
        }
    return found
