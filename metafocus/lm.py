"""The loss of a causal language model, as a function of fast weights, slow weights and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafocus import masks
from metafocus.checkpointing import exact_checkpointing
from metafocus.errors import ProblemError
from metafocus.masks import MaskPolicy
from metafocus.spans import Spans
from metafocus.types import Params

Batch = dict[str, Any]
"""`input_ids`, `attention_mask`, `answer_mask`, `turn_ids`: each `[B, S]`; see `data.collate`."""

TokenPolicy = Callable[[Batch], Tensor]
"""`batch -> [B, S]` boolean: which tokens are predicted and scored."""


class Adapter(Protocol):
    """What fast weights are and how a model sees them: `LoRA` is one."""

    def init(self, model: nn.Module, generator: torch.Generator | None = None) -> Params:
        """Return fresh fast weights."""
        ...

    def bind(self, model: nn.Module, fast: Mapping[str, Tensor]) -> Any:
        """Return a context manager inside which the model sees the fast weights."""
        ...


def answer_tokens(batch: Batch) -> Tensor:
    """Score the tokens of trained answers: the official FocuSFT, and plain fine-tuning."""
    if "answer_mask" not in batch:
        raise ProblemError(
            "answer_tokens needs batch['answer_mask'] ([B, S] bool); the batch has "
            f"{sorted(batch)}. metafocus.data.collate makes it."
        )
    return batch["answer_mask"].bool()


def context_tokens(batch: Batch) -> Tensor:
    """Score the tokens that are no answers: adaptation on the context alone."""
    return all_tokens(batch) & ~answer_tokens(batch)


def all_tokens(batch: Batch) -> Tensor:
    """Score every token that is not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


@dataclass(frozen=True)
class LMLoss:
    """Mean next-token cross entropy over the chosen tokens; made by `lm_loss`."""

    model: nn.Module
    adapter: Adapter
    mask: MaskPolicy
    tokens: TokenPolicy

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with attention mask and positions in the form the model wants.

        Optional: a batch that is not prepared is prepared on the fly, at every call.
        """
        if "model_inputs" in batch:
            return batch
        return {**batch, "model_inputs": self._model_inputs(batch)}

    def __call__(self, fast: Params, slow: Params, batch: Batch) -> Tensor:
        """Return the loss; with `slow={}` the model's own parameters are the slow weights."""
        inputs = self.prepare(batch)["model_inputs"]
        with exact_checkpointing(self.model), self.adapter.bind(self.model, fast):
            if slow:
                out = torch.func.functional_call(self.model, slow, (), inputs)
            else:
                out = self.model(**inputs)
        return self._cross_entropy(out.logits, batch)

    def _cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        position = masks.positions(batch)
        # A token is predicted from the one before it, which must be of the same document.
        scored = (self.tokens(batch) & (position > 0))[:, 1:]
        targets = torch.where(scored, batch["input_ids"][:, 1:], -100)
        logits = logits[:, :-1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        total = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum")
        return total / scored.sum().clamp(min=1)

    def _model_inputs(self, batch: Batch) -> dict[str, Any]:
        if "input_ids" not in batch:
            raise ProblemError(f"a batch needs input_ids [B, S]; this one has {sorted(batch)}.")
        spans = self.mask(batch)
        return {
            "input_ids": batch["input_ids"],
            "position_ids": masks.positions(batch),
            "attention_mask": self._attention_mask(spans),
            "use_cache": False,
        }

    def _attention_mask(self, spans: Spans) -> Tensor | dict[str, Tensor]:
        config = self.model.config.get_text_config()  # pyright: ignore
        dtype = self._mask_dtype(config._attn_implementation)
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        unknown = kinds - {"full_attention", "sliding_attention"}
        if unknown:
            raise ProblemError(
                f"{type(self.model).__name__} has layers of type {sorted(unknown)}; only "
                "full_attention and sliding_attention take an explicit mask."
            )
        if window is None or (kinds and "sliding_attention" not in kinds):
            return spans.dense(dtype)
        narrow = windowed(spans, window).dense(dtype)
        if not kinds:
            return narrow
        return {"full_attention": spans.dense(dtype), "sliding_attention": narrow}

    def _mask_dtype(self, implementation: str) -> torch.dtype | None:
        # Eager attention adds its mask, so a boolean one would mask nothing, without an error.
        if implementation == "eager":
            return self.model.dtype  # pyright: ignore
        if implementation == "sdpa":
            return None
        raise ProblemError(
            f"attn_implementation={implementation!r} takes no explicit mask. Load the model with "
            "attn_implementation='sdpa' or 'eager', or call "
            "model.set_attn_implementation('sdpa')."
        )


def windowed(spans: Spans, window: int) -> Spans:
    """Return the spans without the keys `window` or more positions before their query."""
    query = torch.arange(spans.start.shape[-1], device=spans.start.device)
    reach = Spans((query - window + 1).clamp(min=0).expand_as(spans.start), spans.stop)
    return spans & reach


def lm_loss(
    model: nn.Module,
    *,
    adapter: Adapter,
    mask: MaskPolicy,
    tokens: TokenPolicy = answer_tokens,
) -> LMLoss:
    """Return `loss(fast, slow, batch)`: mean cross entropy of the next token.

    `loss = - sum_t [t scored] log p(x_t | x_<t) / #scored`, computed in float32 or wider. A batch
    in which no token is scored has the loss 0 and the gradient 0.

    Args:
        model: a Hugging Face causal language model with `attn_implementation` "eager" or "sdpa".
            `gradient_checkpointing_enable()` is honoured, exactly.
        adapter: what the fast weights are, such as `mf.LoRA(...)`.
        mask: which keys each query may see, such as `mf.masks.context_bidirectional`. Sliding
            windows of single layers are intersected with it.
        tokens: which tokens are scored: `answer_tokens`, `context_tokens`, `all_tokens` or any
            `batch -> [B, S]` boolean function.

    Returns:
        An `LMLoss`; its `prepare(batch)` computes the masks once for several calls.

    Raises:
        ProblemError: at the first call, for an attention implementation that takes no explicit
            mask, or a batch without what the policies need.
    """
    if not hasattr(model, "config") or not hasattr(model.config, "get_text_config"):
        raise ProblemError(
            f"model must be a Hugging Face model, got {type(model).__name__} without a config."
        )
    return LMLoss(model, adapter, mask, tokens)
