"""The four steps, at the recorded sizes, with the kernels that they have on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import metafocus as mf
from benchmarks import focusft_step
from benchmarks.roofline.record import Recorder
from benchmarks.roofline.scale import FEATURES, RANK, RECORDED, Scale
from metafocus.attention.kernels import flash, flash_cpu, flash_cuda, query_runs
from metafocus.attention.kernels.kernel import QKV, Attended
from metafocus.lm import token_loss

OURS, PLAIN, TRANSFORMERS, OFFICIAL = "metafocus", "plain", "transformers", "official"
NAMES = (OFFICIAL, OURS, PLAIN, TRANSFORMERS)


def record(name: str, length: int, checkout: str = "", slices: bool = False) -> Recorder:
    """Return what one step does after a first one.

    Args:
        name: One of `NAMES`.
        length: Tokens of the row that the step stands for.
        checkout: The official code; for `OFFICIAL` only.
        slices: Whether cuDNN serves slices, and not variable-length kernels all turns together.
    """
    recorder = Recorder(Scale(length))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with _as_on_a_gpu(recorder, slices) if name in (OURS, PLAIN) else contextlib.nullcontext():
            step = _step(name, checkout)
            step()
            recorder.ops.clear()
            recorder.layouts = 0
            with recorder:
                step()
    finally:
        torch.set_default_dtype(before)
    return recorder


def _step(name: str, checkout: str) -> Callable[[], Tensor]:
    if name == PLAIN:
        return focusft_step.plain(RECORDED, True)
    if name == TRANSFORMERS:
        return focusft_step.transformers_sft(RECORDED, True)
    model = focusft_step.build(RECORDED, False)
    where = mf.top_layers(focusft_step.FRACTION, focusft_step.NAMES)
    start = mf.LoRA(where, RANK, 2.0 * RANK).init(model)
    if name == OURS:
        return focusft_step.ours(RECORDED, True, start, rank=RANK)
    return focusft_step.official(RECORDED, True, checkout, start, rank=RANK)


@contextlib.contextmanager
def _as_on_a_gpu(recorder: Recorder, slices: bool) -> Iterator[None]:
    """Let attention and head take the path of a GPU."""
    kernels, dense = _Varlen(recorder), _Dense(recorder)

    def forward(inputs: QKV, runs: Any, scaling: Any) -> Attended:
        if slices:
            return flash_cpu.forward(inputs, runs, scaling.scale, dense)
        return flash_cuda.forward(inputs, runs, scaling, kernels)

    def backward(do: Tensor, inputs: QKV, found: Attended, runs: Any, scaling: Any) -> QKV:
        if slices:
            return flash_cpu.backward(do, inputs, found, runs, scaling.scale, dense)
        return flash_cuda.backward(do, inputs, found, runs, scaling, kernels)

    read, rows = query_runs._content, token_loss._rows
    shape = FEATURES[RECORDED.vocabulary], FEATURES[RECORDED.hidden]
    with (
        mock.patch.object(flash, "_forward", forward),
        mock.patch.object(flash, "_backward", backward),
        mock.patch.object(query_runs, "_content", partial(recorder.on_host, read)),
        mock.patch.object(
            token_loss, "_rows", lambda *_: rows(*shape, True) // recorder.scale.tokens
        ),
    ):
        yield


@dataclasses.dataclass(frozen=True)
class _Varlen:
    """Stands for the fused kernels: right shapes, no numbers; records what they would do."""

    recorder: Recorder

    def forward(self, inputs: QKV, lengths: Any, scaling: Any) -> Attended:
        """Return zeros of the right shapes."""
        q = inputs.q
        with _disable_current_modes():
            o, lse = torch.zeros_like(q), q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)
            flops = 4 * self._products(q, lengths)
        self.recorder.kernel("flash", (*inputs, o), flops)
        return Attended(o, lse)

    def backward(self, do: Tensor, inputs: QKV, found: Attended, lengths: Any, scaling: Any) -> QKV:
        """Return zeros of the right shapes."""
        with _disable_current_modes():
            grads = QKV(*map(torch.zeros_like, inputs))
            flops = 10 * self._products(inputs.q, lengths)
        self.recorder.kernel("flash_backward", (do, *inputs, found.o, *grads), flops)
        return grads

    def _products(self, q: Tensor, lengths: Any) -> float:
        """Return pairs of a query and a key that sees it, times heads and their width."""
        scale = self.recorder.scale
        pairs = 0.0
        ends = zip(lengths.queries.diff().tolist(), lengths.keys.diff().tolist(), strict=True)
        for queries, keys in ends:
            n, m = queries * scale.tokens, keys * scale.tokens
            pairs += n * (m - n) + n * n / 2 if lengths.causal else n * m
        return pairs * scale.size(q.shape[1]) * scale.size(q.shape[2])


@dataclasses.dataclass(frozen=True)
class _Dense:
    """Stands for cuDNN's kernels in the same way."""

    recorder: Recorder

    def forward(self, inputs: QKV, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return zeros of the right shapes."""
        q = inputs.q
        with _disable_current_modes():
            o, lse = torch.zeros_like(q), q.new_zeros(q.shape[:-1], dtype=torch.float32)
        self.recorder.kernel("cudnn", (*inputs, o), 4 * self._products(inputs, causal))
        return o, lse

    def backward(
        self, do: Tensor, inputs: QKV, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> QKV:
        """Return zeros of the right shapes."""
        with _disable_current_modes():
            grads = QKV(*map(torch.zeros_like, inputs))
        flops = 10 * self._products(inputs, causal)
        self.recorder.kernel("cudnn_backward", (do, *inputs, o, *grads), flops)
        return grads

    def _products(self, inputs: QKV, causal: bool) -> float:
        batch, heads, queries, width = self.recorder.scale.shape(inputs.q)
        keys = self.recorder.scale.size(inputs.k.shape[2])
        return batch * heads * queries * keys * width / (2 if causal else 1)
