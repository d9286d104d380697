"""A forward pass that runs as usual, while the attention of each layer is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.adapters import NoAdapter
from metafocus.attention.hugging_face import attend, make_mask, register
from metafocus.attention.kernels.kernel import Scaling
from metafocus.calls import evaluating, running, using
from metafocus.diagnostics.measures import QUERIES, Measures, stack, summarise
from metafocus.diagnostics.profile import AttentionProfile
from metafocus.diagnostics.roles import Tokens, block_size
from metafocus.diagnostics.sums import attention_sums
from metafocus.errors import ProblemError
from metafocus.lm import Adapter, Batch, all_tokens, lm_loss
from metafocus.lm.hf import heads
from metafocus.lm.hf.attention import attention_as, replaceable
from metafocus.lm.prepared import ADDED
from metafocus.masks import MaskPolicy
from metafocus.masks.spans import Spans, windowed
from metafocus.precision import no_autocast

NAME = "metafocus_recorded"


def attention_profile(
    model: nn.Module,
    batch: Batch,
    *,
    mask: MaskPolicy,
    adapter: Adapter | None = None,
    fast: Mapping[str, Tensor] | None = None,
) -> AttentionProfile:
    """Return where each layer and head attends, from one forward pass without gradients.

    `AttentionProfile` describes the measures. The probabilities are computed again from the
    queries and keys of each layer, one block of queries at a time. They use the spans of the mask,
    narrowed by the layer's sliding window, and the model's own scale, soft cap and learned sinks.
    The probabilities of all pairs of tokens are never in memory together. The model runs in
    evaluation mode, with the attention of `mf.attention` for any `attn_implementation`.

    Args:
        model: A Hugging Face causal language model that accepts attention functions of other
            libraries.
        batch: `input_ids` and `answer_mask` `[B, S]`, the tensors that the mask needs, and
            optionally `needle_mask`, True on the evidence for the answers.
            `metafocus.data.collate` makes batches.
        mask: Which keys each query sees, such as the mask that the model was trained with.
        adapter: The adapter that `fast` belongs to.
        fast: The fast weights that the model uses, such as `Aux.params`.

    Returns:
        The profile; its tensors are on the CPU.

    Raises:
        ProblemError: If only one of `adapter` and `fast` is given, the batch has no `answer_mask`,
            or the model's attention cannot be replaced.

    Example:
        >>> import metafocus as mf
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> model = Qwen2ForCausalLM(Qwen2Config(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16))
        >>> batch = {
        ...     "input_ids": torch.tensor([[1, 2, 3, 4]]),
        ...     "answer_mask": torch.tensor([[False, False, True, True]])}
        >>> profile = mf.diagnostics.attention_profile(model, batch, mask=mf.masks.causal)
        >>> profile.sink_mass.shape, profile.by_head.entropy.shape
        (torch.Size([2]), torch.Size([2, 2]))
    """
    if (adapter is None) != (fast is None):
        given, missing = ("adapter", "fast") if fast is None else ("fast", "adapter")
        raise ProblemError(
            f"{given} is given without {missing}: give both, for a profile with fast weights, or "
            "neither."
        )
    config = replaceable(model)
    adapter, fast = adapter or NoAdapter(), dict(fast or {})
    device = next(model.parameters()).device
    raw = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    raw = {k: v for k, v in raw.items() if k not in ADDED}
    tokens = Tokens.of(raw)
    recorder = Recorder(tokens)
    _register()
    with using(model), torch.no_grad(), evaluating(model):
        with attention_as(config, "metafocus"):
            loss = lm_loss(model, adapter=adapter, mask=mask, tokens=all_tokens)
            inputs = loss.prepare(raw)["model_inputs"]
        with running(model), adapter.bind(model, fast), attention_as(config, NAME):
            # The model runs up to its head only. The logits of a long context would take more
            # memory than everything else.
            heads.read_hidden(
                heads.output_head(model),
                lambda: model(**inputs, attention_recorder=recorder),
                lambda head, hidden: hidden[:, :1],
            )
    if not recorder.layers:
        raise ProblemError(
            f"{type(model).__name__} does not hand keywords on to its attention, so nothing was "
            "recorded; profiles need a model that does, as those of transformers 5 do."
        )
    return recorder.profile()


class Recorder:
    """Measures the layers that call it, in the order of their calls; each profile has its own."""

    def __init__(self, tokens: Tokens):
        self.tokens = tokens
        self.layers: list[list[tuple[Measures, Measures]]] = []
        self.cells: list[Tensor] = []

    def __call__(
        self, q: Tensor, k: Tensor, spans: Spans, scaling: Scaling, sinks: Tensor | None
    ) -> None:
        """Measure one layer; see `attention_sums`."""
        spans = Spans(*(x.expand(len(q), -1) for x in spans))
        with torch.no_grad(), no_autocast(q.device):
            sums = attention_sums(q, k, spans, scaling, sinks, self.tokens)
            found = [summarise(sums, self.tokens, i) for i in range(len(QUERIES))]
        self.layers.append(found)
        self.cells.append(sums.cells.float().cpu())

    def profile(self) -> AttentionProfile:
        """Return the profile of all measured layers."""
        both = {
            name: [stack([layer[i][part] for layer in self.layers]).cpu() for part in (0, 1)]
            for i, name in enumerate(QUERIES)
        }
        length = self.tokens.valid.shape[-1]
        return AttentionProfile(
            layers={name: means for name, (means, _) in both.items()},
            heads={name: by_head for name, (_, by_head) in both.items()},
            cells=torch.stack(self.cells),
            answers=self.tokens.queries[:, 0].cpu(),
            length=length,
            block=block_size(length),
        )


def recorded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_recorder: Recorder,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend in one layer as `attend` does, and pass its inputs to the recorder.

    Args:
        module: The layer.
        query: `[B, H, S, D]`.
        key: `[B, Hkv, S, D]`.
        value: `[B, Hkv, S, Dv]`.
        attention_mask: Stacked spans `[B, 1, S, 2]`.
        attention_recorder: The recorder, which measures the layer.
        settings: The settings of the layer, as transformers passes them to `attend`.
    """
    # `attend` refuses what spans cannot express, so everything that passes can be measured.
    out = attend(module, query, key, value, attention_mask, backend="auto", **settings)
    assert attention_mask is not None
    spans, window = Spans.unstack(attention_mask), settings.get("sliding_window")
    if window is not None:
        spans = windowed(spans, window)
    scaling = settings.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    scaling = Scaling(scale, settings.get("softcap"))
    attention_recorder(query, key, spans, scaling, settings.get("s_aux"))
    return out


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    register()
    AttentionInterface.register(NAME, recorded)
    AttentionMaskInterface.register(NAME, make_mask)
