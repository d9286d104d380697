from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metafocus import masks
from metafocus.attention.kernels import flash_cpu, flash_cuda, query_runs
from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.attention.kernels.query_runs import QueryRun, find_query_runs
from metafocus.attention.kernels.varlen import Lengths
from metafocus.masks import Spans
from metafocus.masks.spans import nonempty
from metafocus.masks.spans import windowed as narrow_by

BLOCK, CAUSAL, TAIL, WINDOW, EMPTY = range(5)
LENGTH = 24


@st.composite
def rows(draw: Any) -> list[tuple[int, int]]:
    """Intervals of one row, made of runs of every kind one after another."""
    row: list[tuple[int, int]] = []
    while len(row) < LENGTH:
        kind, n = draw(st.integers(BLOCK, EMPTY)), draw(st.integers(1, 8))
        n = min(n, LENGTH - len(row))
        moves_start, moves_stop = kind in (TAIL, WINDOW), kind in (CAUSAL, WINDOW)
        first = draw(st.integers(0, LENGTH - n))
        last = first + (n - 1) * (moves_start and not moves_stop)
        stop = draw(st.integers(last + 1, LENGTH - (n - 1) * moves_stop))
        for i in range(n):
            span = (first + i * moves_start, stop + i * moves_stop)
            row.append((0, 0) if kind == EMPTY else span)
    return row


@st.composite
def wild_rows(draw: Any) -> list[tuple[int, int]]:
    ends = st.tuples(st.integers(0, 4), st.integers(0, 4))
    return draw(st.lists(ends, min_size=LENGTH, max_size=LENGTH))


def spans_of(drawn: list[list[tuple[int, int]]]) -> Spans:
    return nonempty(*torch.tensor(drawn).unbind(-1))


batches = st.lists(rows() | wild_rows(), min_size=1, max_size=3).map(spans_of)


def attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scaling: Scaling
) -> tuple[Tensor, Tensor]:
    """From the definition, with a mask: the output and the logsumexp, 0 in rows without keys."""
    groups = q.shape[1] // k.shape[1]
    z = scaling.scale * q @ k.repeat_interleave(groups, 1).mT
    if scaling.softcap is not None:
        z = scaling.softcap * torch.tanh(z / scaling.softcap)
    allowed = spans.dense()
    some = allowed.any(-1)
    z = torch.where(some.unsqueeze(-1), z.masked_fill(~allowed, -math.inf), 0.0)
    p = torch.where(some.unsqueeze(-1), z.softmax(-1), 0.0)
    return p @ v.repeat_interleave(groups, 1), torch.where(some, z.logsumexp(-1), 0.0)


def gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scaling: Scaling
) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention(*inputs, spans, scaling)[0], inputs, do)


def tensors(batch: int, length: int, heads: int = 4, kv: int = 2, size: int = 8) -> list[Tensor]:
    """Cotangent, queries, keys, values."""
    shapes = [(batch, h, length, size) for h in (heads, heads, kv, kv)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


class Reference:
    """The contract of variable-length kernels, one sequence at a time, in any type."""

    def __init__(self) -> None:
        self.calls: list[Lengths] = []

    def _sequences(self, lengths: Lengths) -> list[tuple[slice, slice, Spans]]:
        found = []
        ends = zip(lengths.queries.tolist(), lengths.keys.tolist(), strict=True)
        q0, k0 = next(ends)
        for q1, k1 in ends:
            n, m = q1 - q0, k1 - k0
            assert 0 < n <= lengths.longest_queries and 0 < m <= lengths.longest_keys
            # Aligned at the bottom right: the last query stands on the last key.
            place = torch.arange(n) + m - n
            start = place - lengths.left if lengths.left >= 0 else torch.zeros(n)
            stop = place + lengths.right + 1 if lengths.right >= 0 else torch.full((n,), m)
            found.append((slice(q0, q1), slice(k0, k1), (start.clamp(min=0), stop.clamp(max=m))))
            q0, k0 = q1, k1
        return found

    @staticmethod
    def _one(q: Tensor, k: Tensor, v: Tensor, ends: Any, scaling: Scaling) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        z = scaling.scale * q @ k.mT
        if scaling.softcap is not None:
            z = scaling.softcap * torch.tanh(z / scaling.softcap)
        place = torch.arange(k.shape[1])
        allowed = (ends[0][:, None] <= place) & (place < ends[1][:, None])
        z = z.masked_fill(~allowed, -math.inf)
        return (z.softmax(-1) @ v).transpose(0, 1), z.logsumexp(-1)

    def forward(self, inputs: QKV, lengths: Lengths, scaling: Scaling) -> Attended:
        q, k, v = inputs
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert lengths.queries.dtype == lengths.keys.dtype == torch.int32
        assert int(lengths.queries[-1]) == len(q) and int(lengths.keys[-1]) == len(k) == len(v)
        self.calls.append(lengths)
        parts = [
            self._one(q[i], k[j], v[j], ends, scaling) for i, j, ends in self._sequences(lengths)
        ]
        lse = torch.cat([lse for _, lse in parts], dim=1)
        return Attended(torch.cat([o for o, _ in parts]), lse)

    def backward(
        self,
        do: Tensor,
        inputs: QKV,
        found: Attended,
        lengths: Lengths,
        scaling: Scaling,
    ) -> tuple[Tensor, ...]:
        o, lse = found
        # Kernels rebuild the probabilities from the saved logsumexp; here they must agree.
        with torch.enable_grad():
            inputs = QKV(*(x.detach().clone().requires_grad_() for x in inputs))
            again, again_lse = self.forward(inputs, lengths, scaling)
            grads = torch.autograd.grad(again, inputs, do)
        torch.testing.assert_close(again.detach(), o)
        assert lse.is_contiguous() and lse.shape == again_lse.shape
        torch.testing.assert_close(again_lse.detach(), lse)
        return grads


def seen(runs: tuple[QueryRun, ...], spans: Spans) -> Spans:
    """The intervals that the runs stand for, from the definition of `QueryRun`."""
    start, stop = (torch.zeros_like(x) for x in spans)
    for t in runs:
        for i in range(t.queries):
            place = i + t.keys - t.queries
            low = 0 if t.left < 0 else max(0, place - t.left)
            high = t.keys if t.right < 0 else min(t.keys, place + t.right + 1)
            assert start[t.row, t.query + i] == stop[t.row, t.query + i] == 0, "served twice"
            start[t.row, t.query + i], stop[t.row, t.query + i] = t.key + low, t.key + high
    return Spans(start, stop)


def fewest(spans: Spans) -> int:
    """The least number of runs, by trying: for each prefix of a row, the best last run."""
    total = 0
    for start, stop in zip(*(x.tolist() for x in spans), strict=True):
        best = [0]
        for end in range(1, len(start) + 1):
            if stop[end - 1] == 0:
                best.append(best[-1])
                continue
            options = [best[end - 1] + 1]
            steps = set()
            for i in range(end - 2, -1, -1):
                steps.add((start[i + 1] - start[i], stop[i + 1] - stop[i]))
                if stop[i] == 0 or len(steps) > 1 or steps - {(0, 0), (0, 1), (1, 0), (1, 1)}:
                    break
                options.append(best[i] + 1)
            best.append(min(options))
        total += best[-1]
    return total


@settings(deadline=None, max_examples=200)
@given(batches)
def test_turns_stand_for_the_spans_and_are_the_fewest(spans):
    runs = find_query_runs(spans)
    assert all(map(torch.equal, seen(runs, spans), spans))
    assert len(runs) == fewest(spans)
    assert list(runs) == sorted(runs)


@settings(deadline=None, max_examples=60)
@given(batches)
def test_the_limit_is_sharp(spans):
    runs = find_query_runs(spans)
    assert find_query_runs(spans, len(runs)) == runs
    if runs:
        assert find_query_runs(spans, len(runs) - 1) is None


@settings(deadline=None, max_examples=60)
@given(batches, st.integers(1, 3))
def test_both_planners_equal_dense_attention(spans, repeated):
    batch = len(spans.start)
    do, q, k, v = tensors(batch, LENGTH)
    scaling = Scaling(0.4)
    runs = find_query_runs(spans)
    exact, exact_lse = attention(q, k, v, spans, scaling)
    exact_grads = gradients(do, q, k, v, spans, scaling)
    results = (
        (flash_cpu.forward, flash_cpu.backward, (runs, scaling.scale)),
        (flash_cuda.forward, flash_cuda.backward, (runs, scaling, Reference(), repeated)),
    )
    for forward, backward, rest in results:
        o, lse = forward(QKV(q, k, v), *rest)
        # Sums of at most 24 terms of order one, in float64.
        torch.testing.assert_close(o, exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-12)
        for got, want in zip(
            backward(do, QKV(q, k, v), Attended(o, lse), *rest), exact_grads, strict=True
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def chat(padding: str = "none", packed: bool = False) -> dict[str, Tensor]:
    """Two rows of runs of different lengths, with answers of one token and of many."""
    runs, answer = [], []
    for lengths in ([5, 3, 1, 1, 6, 8], [9, 1, 2, 4, 7, 1]):
        runs.append([i for i, n in enumerate(lengths) for _ in range(n)])
        answer.append([i % 2 == 1 for i, n in enumerate(lengths) for _ in range(n)])
    valid = torch.ones(2, LENGTH, dtype=torch.long)
    if padding == "right":
        valid[0, -4:] = 0
    if padding == "left":
        valid[1, :3] = 0
    if padding == "a row":
        valid[0] = 0
    batch = {
        "input_ids": torch.zeros(2, LENGTH, dtype=torch.long),
        "attention_mask": valid,
        "turn_ids": torch.tensor(runs).masked_fill(valid == 0, -1),
        "answer_mask": torch.tensor(answer) & (valid != 0),
    }
    if packed:
        batch["document_ids"] = (torch.arange(LENGTH) // 10).expand(2, -1)
    return batch


def windowed(batch: dict[str, Tensor]) -> Spans:
    """Bidirectional blocks seen through a window that leaves their ends open."""
    start = (torch.arange(LENGTH) - 6).clamp(min=0).expand(2, -1)
    return masks.context_bidirectional(batch) & Spans(start, torch.full_like(start, LENGTH))


POLICIES = {
    "causal": masks.causal,
    "full": masks.full,
    "prefix_lm": masks.prefix_lm,
    "context_bidirectional": masks.context_bidirectional,
    "sliding_window_1": masks.sliding_window(1),
    "sliding_window_2": masks.sliding_window(2),
    "sliding_window_5": masks.sliding_window(5),
    "sliding_window_100": masks.sliding_window(100),
    "windowed": windowed,
}
PADDINGS = ("none", "left", "right", "a row")


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_through_varlen_calls(policy, padding, packed):
    spans = POLICIES[policy](chat(padding, packed))
    runs = find_query_runs(spans)
    assert all(map(torch.equal, seen(runs, spans), spans))
    do, q, k, v = tensors(2, LENGTH)
    scaling, varlen = Scaling(0.4, softcap=2.0), Reference()
    o, lse = flash_cuda.forward(QKV(q, k, v), runs, scaling, varlen)
    exact, exact_lse = attention(q, k, v, spans, scaling)
    torch.testing.assert_close(o, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-12)
    grads = flash_cuda.backward(do, QKV(q, k, v), Attended(o, lse), runs, scaling, varlen)
    for got, want in zip(grads, gradients(do, q, k, v, spans, scaling), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "policy, runs",
    [
        # No run for the answers of one token: they are blocks that see all before them.
        ("causal", [(0, 24, 0, 24, -1, 0)]),
        ("full", [(0, 24, 0, 24, -1, -1)]),
        ("prefix_lm", [(0, 5, 0, 5, -1, -1), (5, 24, 0, 24, -1, 0)]),
        (
            "context_bidirectional",
            [
                (0, 5, 0, 5, -1, -1),
                # Turns of one token see what an answer in their place would see.
                (5, 10, 0, 10, -1, 0),
                (10, 16, 0, 16, -1, -1),
                (16, 24, 0, 24, -1, 0),
            ],
        ),
        ("sliding_window_5", [(0, 5, 0, 5, -1, 0), (5, 24, 1, 24, 4, 0)]),
    ],
)
def test_turns_of_policies(policy, runs):
    found = find_query_runs(POLICIES[policy](chat()))
    assert [run[1:] for run in found if run.row == 0] == runs


def test_spans_changed_in_place_are_other_spans():
    spans = masks.causal({"input_ids": torch.ones(1, 8, dtype=torch.long)})
    (before,) = find_query_runs(spans)
    # Without a trace in the version counter.
    spans.stop.data.fill_(8)
    assert find_query_runs(spans) == (before._replace(right=-1),)
    assert find_query_runs(Spans(*(x.int() for x in spans))) == find_query_runs(spans)


def test_spans_without_keys_make_no_turn():
    empty = torch.zeros(2, 5, dtype=torch.long)
    assert find_query_runs(Spans(empty, empty)) == ()
    assert find_query_runs(Spans(empty, empty), limit=0) == ()
    _, q, k, v = tensors(2, 5)
    o, lse = flash_cuda.forward(QKV(q, k, v), (), Scaling(1.0), Reference())
    assert not o.any() and not lse.any()


def test_a_single_token():
    assert find_query_runs(Spans(torch.tensor([[0]]), torch.tensor([[1]]))) == (
        QueryRun(0, 0, 1, 0, 1, -1, -1),
    )


def focus_turns() -> tuple[QueryRun, ...]:
    """Eight context runs and eight answers of 100 tokens."""
    turn_ids = torch.arange(1600).div(100, rounding_mode="floor").unsqueeze(0)
    batch = {"input_ids": turn_ids, "turn_ids": turn_ids, "answer_mask": turn_ids % 2 == 1}
    found = find_query_runs(masks.context_bidirectional(batch))
    assert len(found) == 16
    return found


def test_context_turns_are_one_call_and_answers_another():
    cpu = torch.device("cpu")
    calls = list(flash_cuda.varlen_calls(focus_turns(), 1, 1600, cpu, repeated=9))
    assert [(call.lengths.left, call.lengths.right) for call in calls] == [(-1, -1), (-1, 0)]
    for call, keys in zip(calls, (range(100, 1600, 200), range(200, 1601, 200)), strict=True):
        assert call.lengths.queries.tolist() == list(range(0, 801, 100))
        assert call.lengths.keys.diff().tolist() == list(keys)
        assert isinstance(call.queries, Tensor) and isinstance(call.keys, Tensor)
        assert call.keys.tolist() == [k for end in keys for k in range(end)]


@pytest.mark.parametrize("repeated", [1, 2, 3])
def test_a_call_repeats_a_bounded_number_of_keys(repeated):
    runs = focus_turns()
    calls = list(flash_cuda.varlen_calls(runs, 1, 1600, torch.device("cpu"), repeated))
    sizes = [int(call.lengths.keys[-1]) for call in calls]
    assert max(sizes) <= repeated * 1600
    assert sum(sizes) == sum(run.keys for run in runs) == 13600
    assert len(calls) <= 2 * (1 + 13600 // (repeated * 800))
    taken = torch.cat(
        [torch.arange(1600)[c.queries] for c in calls]  # slices and indices alike
    )
    assert taken.sort().values.tolist() == list(range(1600))


def test_nothing_is_copied_where_turns_lie_together():
    packed = {
        "input_ids": torch.zeros(2, 6),
        "document_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2),
    }
    for policy in (masks.causal, masks.full):
        (call,) = flash_cuda.varlen_calls(
            find_query_runs(policy(packed)), 2, 6, torch.device("cpu")
        )
        assert call.queries == call.keys == slice(0, 12)
        assert call.lengths.keys.tolist() == [0, 3, 6, 9, 12]


def test_remembered_spans_are_read_again_only_where_they_were_written_to(monkeypatch):
    reads, content = [], query_runs._content
    monkeypatch.setattr(query_runs, "_content", lambda x: reads.append(1) or content(x))
    stacked = masks.causal({"input_ids": torch.zeros(1, 8)}).stack()
    query_runs.remember((None, Spans.unstack(stacked)))
    assert len(reads) == 1
    # Other views of the same memory, as each layer of a model makes them.
    assert find_query_runs(Spans.unstack(stacked)) == (QueryRun(0, 0, 8, 0, 8, -1, 0),)
    assert len(reads) == 1
    stacked[..., 1] = 8
    assert find_query_runs(Spans.unstack(stacked)) == (QueryRun(0, 0, 8, 0, 8, -1, -1),)
    # A copy is other memory.
    assert len(find_query_runs(Spans.unstack(stacked.clone()))) == 1
    assert len(reads) == 3


def test_layers_with_a_window_take_remembered_spans_as_they_are():
    causal = masks.causal({"input_ids": torch.zeros(1, 8)})
    narrow = narrow_by(causal, 3)
    query_runs.remember((None, causal), (3, narrow))
    assert query_runs.narrowed(narrow, 3) is narrow
    for spans, window in ((causal, 3), (narrow, 2)):
        assert query_runs.narrowed(spans, window).start.tolist() == (
            narrow_by(causal, window).start.tolist()
        )
