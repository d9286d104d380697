"""The loss of a causal language model, as a function of fast weights, slow weights and a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafocus import masks
from metafocus.adapters.protocol import Adapter
from metafocus.calls import holding, running
from metafocus.errors import ProblemError
from metafocus.lm.accepted import check_parts, checked_spans
from metafocus.lm.cross_entropy import IGNORED
from metafocus.lm.hf import heads, prefix
from metafocus.lm.hf.attention import attending, own_mask, read_spans
from metafocus.lm.hf.checkpointing import exact_checkpointing, is_checkpointing
from metafocus.lm.hf.inputs import check_ids, model_inputs, own_inputs
from metafocus.lm.hf.last_layer import at_scored, last_mask, restriction
from metafocus.lm.hf.logit_head import logit_head_of
from metafocus.lm.hf.restricted import Restriction, restricted
from metafocus.lm.hf.shared_sequence import check_shared_sequence
from metafocus.lm.hf.side_runs import few_tokens
from metafocus.lm.prepared import Source, current
from metafocus.lm.targets import Targets, next_tokens, targets_of
from metafocus.lm.tokens import TokenPolicy, answer_tokens
from metafocus.masks import Batch, MaskPolicy
from metafocus.parallel.collectives import Group, replicated, summed
from metafocus.parallel.sequence import refuse_other_batches
from metafocus.precision import wide
from metafocus.problem import trainable
from metafocus.sharding import HOOKED, plain_names, sharding_of
from metafocus.types import Params


@dataclass(frozen=True)
class LMLoss:
    """Mean next-token cross entropy over the chosen tokens; made by `lm_loss`."""

    model: nn.Module
    adapter: Adapter
    mask: MaskPolicy
    tokens: TokenPolicy
    sequence_group: Group = None
    checkpointing: Callable[[nn.Module, Batch], bool] | None = None
    """Whether a call honours `gradient_checkpointing_enable()`; None: it does."""

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with what the model and the loss want: masks, positions, scored rows.

        Optional: a batch that is not prepared is prepared on the fly, at every call (on a GPU
        with one host synchronisation, to count the scored tokens). A batch that a loss with
        other `tokens` prepared keeps its masks and gets its own rows. One that was prepared for
        another mask, or whose tensors were replaced or written to since, is prepared anew.
        """
        batch = current(self.mask, batch)
        scored = batch.get("scored")
        if scored is not None and scored.policy == self.tokens:
            return batch
        known = batch.get("model_inputs")
        batch = self._with_inputs(batch)
        logit_head_of(self.model)
        scored = targets_of(self.tokens, batch, self.sequence_group)
        mask = last_mask(self.model, batch["model_inputs"]["attention_mask"])
        # Queries that this rank does not score may be scored by another rank of the sequence.
        alone = self.sequence_group is None
        if alone and mask is not None and scored.rows is not None:
            read = next_tokens(self.tokens, batch) != IGNORED
            scored = scored._replace(mask=at_scored(mask, read))
        masks_of_all = None if known else batch["model_inputs"]["attention_mask"]
        read_spans(self.model, masks_of_all, scored.mask)
        return {**batch, "scored": scored}

    def __call__(self, fast: Params, slow: Params, batch: Batch) -> Tensor:
        """Return the loss; with `slow={}` the model's own parameters are the slow weights."""
        batch = self.prepare(batch)
        return summed(self._of_this_rank(self._entering(fast), slow, batch), self.sequence_group)

    def _of_this_rank(self, fast: Params, slow: Params, batch: Batch) -> Tensor:
        """Return what this rank's tokens add to the loss of a prepared batch."""
        logit_head = logit_head_of(self.model)
        with self._running(batch), self.adapter.bind(self.model, fast):
            if logit_head is None:
                return self._mean(batch, self._own_logits(slow, batch))

            def reader(head: nn.Module, hidden: Tensor) -> Tensor:
                def total(scored: Targets) -> Tensor:
                    rows = scored.select(hidden)
                    return heads.head_loss(head, rows, scored.targets, logit_head)

                return self._mean(batch, total)

            with restricted(self._restriction(batch)):
                return self._read(slow, batch, reader)

    def _own_logits(self, slow: Params, batch: Batch) -> Callable[[Targets], Tensor]:
        """Return the summed loss of scored positions by logits that the model itself makes."""
        rows = self._rows(batch)
        sharded = not torch.compiler.is_compiling() and bool(sharding_of(self.model) & HOOKED)
        if rows is None or not sharded or not heads.keeps_positions_apart(self.model):
            logits = self._run(slow, batch).logits
            return lambda scored: _full_loss(scored.select(logits), scored.targets)
        head = heads.output_head(self.model)
        few = heads.logits_of_rows(head, lambda: self._run(slow, batch).logits, rows)
        place = rows.new_zeros(batch["model_inputs"]["input_ids"].numel())
        place[rows] = torch.arange(len(rows), device=rows.device)
        return lambda scored: _full_loss(few[place[scored.rows]], scored.targets)

    def _rows(self, batch: Batch) -> Tensor | None:
        """Return all scored positions of a prepared batch, where they can be asked."""
        return batch["scored"].rows

    def _mean(self, batch: Batch, total: Callable[[Targets], Tensor]) -> Tensor:
        """Return the loss of a prepared batch, given the summed loss of scored positions."""
        scored = batch["scored"]
        return total(scored) / scored.number

    def _restriction(self, batch: Batch) -> Restriction | None:
        """Return which positions of the last layer the loss of a prepared batch reads."""
        if self.sequence_group is not None:
            return None
        scored = batch["scored"]
        return restriction(self.model, scored.rows, scored.mask)

    def hidden_before(self, cut: tuple[str, int], slow: Params, batch: Batch) -> prefix.Hidden:
        """Return the hidden states before a layer, of a prepared batch.

        Args:
            cut: path of the list of layers and index of the layer; no fast weight lies below it.
            slow: the slow weights; `{}` means the model's own.
            batch: what `prepare` returned.
        """
        with self._running():
            return prefix.hidden_before(self.model, *cut, lambda: self._read(slow, batch))

    def final_hidden(self, fast: Params, batch: Batch) -> Tensor:
        """Return what the model's head would see, `[B, S, D]`, of a prepared batch."""
        with self._running(), self.adapter.bind(self.model, fast):
            return self._read({}, batch)

    def logits(self, fast: Params, batch: Batch) -> Tensor:
        """Return all logits under the mask, `[B, S, V]`, of a prepared batch.

        With a `sequence_group` they are those of this rank's tokens.
        """
        with self.adapter.bind(self.model, fast), self._running():
            return self._run({}, batch).logits

    def trial_batch(self) -> Batch:
        """Return two tokens as a prepared batch, for a check of the model."""
        return {"model_inputs": few_tokens(self.model)}

    @contextlib.contextmanager
    def _running(self, batch: Batch | None = None) -> Iterator[None]:
        enabled, choice = True, self.checkpointing
        if batch is not None and choice is not None and is_checkpointing(self.model):
            enabled = choice(self.model, batch)
        with running(self.model), attending(self.model), exact_checkpointing(self.model, enabled):
            yield

    def _entering(self, params: Params) -> Params:
        """Return parameters as they enter the computation that the ranks of a sequence share."""
        group = self.sequence_group
        # A parametrised weight enters as a whole, not as this rank's part of it.
        parts = plain_names(self.model)
        return {k: x if k in parts else replicated(x, group) for k, x in params.items()}

    def _slow(self, slow: Params) -> Params:
        if self.sequence_group is None:
            return slow
        if not slow and not sharding_of(self.model):
            slow = trainable(self.model)
        return self._entering(slow)

    def _read(
        self, slow: Params, batch: Batch, reader: heads.Reader = lambda head, hidden: hidden
    ) -> Tensor:
        return heads.read_hidden(
            heads.output_head(self.model), lambda: self._run(slow, batch), reader
        )

    def _run(self, slow: Params, batch: Batch) -> Any:
        inputs = batch["model_inputs"]
        with (
            prefix.resumed(self.model, batch.get("hidden")),
            holding(self.model, self._slow(slow), tie_weights=True),
        ):
            return self.model(**inputs)

    def _with_inputs(self, batch: Batch) -> Batch:
        """Return the batch with what the model is called with."""
        if "model_inputs" in batch:
            return batch
        inputs = self._model_inputs(batch)
        return {**batch, "model_inputs": inputs, "source": Source.of(self.mask, batch)}

    def _model_inputs(self, batch: Batch) -> dict[str, Any]:
        if "input_ids" not in batch:
            raise ProblemError(f"a batch needs input_ids [B, S]; this one has {sorted(batch)}.")
        group = self.sequence_group
        check_ids(self.model, batch["input_ids"])
        if group is not None:
            check_shared_sequence(self.model, group)
            refuse_other_batches(batch, group)
        if self.mask is masks.causal and "document_ids" not in batch and own_mask(self.model):
            return own_inputs(batch["input_ids"], batch.get("attention_mask"))
        positions, spans = masks.positions(batch), checked_spans(self.mask(batch))
        return model_inputs(self.model, batch["input_ids"], positions, spans, group)


def _full_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(wide(logits), targets, reduction="sum", ignore_index=IGNORED)


def lm_loss(
    model: nn.Module,
    *,
    adapter: Adapter,
    mask: MaskPolicy,
    tokens: TokenPolicy = answer_tokens,
    sequence_group: Group = None,
) -> LMLoss:
    """Return `loss(fast, slow, batch)`: mean cross entropy of the next token.

    `loss = - sum_t [t scored] log p(x_t | x_<t) / #scored`, computed in float32 or wider. A batch
    in which no token is scored has the loss 0 and the gradient 0. The head of the model is applied
    at scored positions only, a chunk at a time (inside `vmap` and in a compiled function: at all
    positions, a chunk at a time). Whether the model's logits are no more than its head, a scale
    and a cap is checked at the first call by a forward pass of two tokens; if they are more, or
    if a compiler comes before that call, they are taken from the model for all positions.

    Args:
        model: a Hugging Face causal language model. It attends to spans, in memory linear in the
            length (`metafocus.attention`), unless its `attn_implementation` is "eager".
            `gradient_checkpointing_enable()` is honoured, exactly.
        adapter: what the fast weights are, such as `mf.LoRA(...)`.
        mask: which keys each query may see, such as `mf.masks.context_bidirectional`. Sliding
            windows of single layers are intersected with it.
        tokens: which tokens are scored: `answer_tokens`, `context_tokens`, `all_tokens` or any
            `batch -> [B, S]` boolean function.
        sequence_group: the ranks that share each sequence (`mf.parallel.sequence_group`). Each is
            given the whole batch and runs the model on its share of the tokens; the loss is that
            of the whole batch on every rank, and so are its derivatives by `fast` and `slow`, of
            any order. None: this rank runs all tokens.

    Returns:
        An `LMLoss`; its `prepare(batch)` computes masks and scored rows once for several calls.

    Warns:
        UserWarning: at the first call, if the head of this model cannot be split off.

    Raises:
        ProblemError: for an argument that is not a model, adapter, mask or token policy; at the
            first call, for an attention implementation that takes no explicit mask, or a batch
            without what the policies need.
        DataError: at the call, for tokens that the model has no embeddings for.

    Example:
        >>> import metafocus as mf
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> model = Qwen2ForCausalLM(Qwen2Config(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16))
        >>> lora = mf.LoRA(mf.all_linear, rank=2)
        >>> loss = lm_loss(model, adapter=lora, mask=mf.masks.causal, tokens=mf.all_tokens)
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
        >>> loss(lora.init(model), {}, batch).shape
        torch.Size([])
    """
    check_parts(model, adapter, mask, tokens)
    return LMLoss(model, adapter, mask, tokens, sequence_group)
