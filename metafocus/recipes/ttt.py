"""Test-time training as inner objectives, and how adapted fast weights are saved to files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metafocus import masks
from metafocus.adapters import FullWeights, LoRA, one_of, top_layers
from metafocus.engine import MetaLoss
from metafocus.estimators import Estimator, Unrolled
from metafocus.factories import picklable
from metafocus.lm import Adapter, TokenPolicy, all_tokens, context_tokens
from metafocus.masks import MaskPolicy
from metafocus.problem import trainable
from metafocus.recipes._focusft import focusft, focusft_problem
from metafocus.recipes.streaming import InChunk, stream
from metafocus.solvers import SGD, clip_global, clip_per_tensor
from metafocus.types import Params, Solver

QUERIES = LoRA(top_layers(1.0, ("q_proj",)), rank=32, alpha=64.0)
QUERY_SOLVER = SGD(0.1, steps=8, clip=clip_per_tensor(1.0))
TOP_MLPS = FullWeights(top_layers(0.25, ("mlp",)))
CHUNK_SOLVER = SGD(1.0, steps=1, clip=clip_global(1.0))
EXACT = Unrolled(recompute=True)


def qttt(
    model: nn.Module,
    *,
    adapter: Adapter = QUERIES,
    mask: MaskPolicy = masks.causal,
    solver: Solver = QUERY_SOLVER,
    estimator: Estimator | None = None,
    inner_tokens: TokenPolicy = context_tokens,
    generator: torch.Generator | None = None,
    per_example: bool = True,
) -> MetaLoss:
    """Return the answer loss after adapting the query projections to the context: qTTT.

    The fast weights of each example take a few steps on the next-token loss of its own context.
    The paper keeps the keys and values of the context from before the first step, and takes each
    step on random short spans. Here every step sees the whole context with its current keys and
    values. The number of steps and the rate are not the paper's.

    Args:
        model: a Hugging Face causal language model, as for `focusft`.
        adapter: default LoRA on every `q_proj`. The paper's form is
            `mf.FullWeights(mf.top_layers(1.0, ("q_proj",)))` with one example in a batch and
            `per_example=False`.
        mask: default causal. A bidirectional mask would show the inner loss the tokens that it
            predicts.
        solver: the inner optimiser.
        estimator: default `FirstOrder()`; it matters only if the loss is trained.
        inner_tokens: the tokens that the inner loss scores. Default: the context, never an answer.
        generator: draws the start.
        per_example: gives each row of a batch fast weights of its own.

    Returns:
        `meta_loss(outer, Episode(batch, batch)) -> (loss, Aux)`; `Aux.params` holds the adapted
        fast weights.

    References:
        Bansal et al., arXiv 2512.13898.
    """
    return focusft(
        model,
        adapter=adapter,
        mask=mask,
        solver=solver,
        estimator=estimator,
        inner_tokens=inner_tokens,
        generator=generator,
        per_example=per_example,
    )


@picklable
def ttt_e2e(
    model: nn.Module,
    *,
    chunk: int = 1024,
    window: int = 8192,
    adapter: Adapter = TOP_MLPS,
    mask: MaskPolicy = masks.causal,
    solver: Solver = CHUNK_SOLVER,
    estimator: Estimator = EXACT,
    inner_tokens: TokenPolicy = all_tokens,
    outer_tokens: TokenPolicy = all_tokens,
    generator: torch.Generator | None = None,
) -> MetaLoss:
    """Return the next-token loss of a model that continues to learn while it reads: TTT-E2E.

    The MLPs of the last quarter of the layers are fast, and start as the model's own. Each chunk
    of tokens is scored with the fast weights that the earlier chunks left, and then SGD takes one
    step on it. The mean of these losses is differentiated through all steps.

    A chunk sees the `window` tokens before it. (Through its layers, a model with sliding windows
    of its own would see further.) The keys and values of the window are computed with the fast
    weights of the chunk. The paper caches them, and keeps a second, slow MLP next to each fast
    one.

    Args:
        model: a Hugging Face causal language model. Its parameters that require grad are trained.
        chunk: the number of tokens for one step.
        window: the number of tokens before a chunk that it sees.
        adapter: default `FullWeights` on the modules called `mlp` of the last quarter of layers.
        mask: which keys a query sees within chunk and window.
        solver: the inner optimiser, without a state.
        estimator: default exact. Its memory grows by the fast weights of each chunk.
        inner_tokens: the tokens that the inner loss scores.
        outer_tokens: the tokens that the outer loss scores. Default: every token. Use
            `answer_tokens` for fine-tuning.
        generator: draws the start, if the adapter draws one.

    Returns:
        `meta_loss(outer, Episode(batch, batch)) -> (loss, Aux)` for a batch of one sequence;
        `Aux.params` holds the fast weights after the last chunk.

    Raises:
        ProblemError: as for `stream`.

    References:
        Tandon et al., arXiv 2512.23675.
    """
    problem = focusft_problem(
        model,
        adapter=adapter,
        mask=mask,
        inner_tokens=InChunk(inner_tokens),
        outer_tokens=InChunk(outer_tokens),
        generator=generator,
    )
    meta = stream(problem, solver=solver, estimator=estimator, chunk=chunk, window=window)
    return lambda outer, episode: meta(outer or trainable(model), episode)


class Saved(Adapter, Protocol):
    """An adapter whose fast weights can be written to a directory."""

    def save(self, model: nn.Module, fast: Mapping[str, Tensor], directory: str | Path) -> Any:
        """Write the fast weights of one example."""
        ...


def export(model: nn.Module, adapter: Saved, fast: Params, directory: str | Path) -> list[Path]:
    """Write adapted fast weights as files: LoRA as PEFT adapters, FullWeights as safetensors.

    Fast weights that a batch shares are written to `directory`. Those of B examples are written to
    `directory/0`, ..., `directory/B-1`, each as a whole adapter.

    Args:
        model: the model that the fast weights belong to.
        adapter: the adapter that made the fast weights.
        fast: the fast weights, such as `Aux.params`.
        directory: it is created if it does not exist.

    Returns:
        The directories that were written.

    Raises:
        ProblemError: as for `adapter.save`.

    Example:
        >>> import tempfile
        >>> from metafocus.adapters import LoRA, all_linear, for_each
        >>> model, lora = nn.Sequential(nn.Linear(2, 2)), LoRA(all_linear, rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in export(model, lora, for_each(lora.init(model), 2), folder)]
        ['0', '1']
    """
    count = getattr(adapter, "examples", None)
    number = count(model, fast) if callable(count) else None
    if number is None:
        adapter.save(model, fast, directory)
        return [Path(directory)]
    paths = [Path(directory) / str(i) for i in range(int(number))]  # pyright: ignore
    for i, path in enumerate(paths):
        adapter.save(model, one_of(fast, i), path)
    return paths
