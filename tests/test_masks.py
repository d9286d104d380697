from __future__ import annotations

import pickle
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metafocus import masks
from metafocus.errors import DataError, ProblemError
from metafocus.masks import Spans, entries
from metafocus.masks.spans import windowed

POLICIES = {
    "causal": masks.causal,
    "full": masks.full,
    "prefix_lm": masks.prefix_lm,
    "context_bidirectional": masks.context_bidirectional,
    "sliding_window_1": masks.sliding_window(1),
    "sliding_window_3": masks.sliding_window(3),
}


def test_a_check_on_cuda_is_queued():
    """`refuse` asks a tensor of a GPU nothing; here the condition is one of the CPU."""

    class OnCuda:
        is_meta, is_cuda = False, True

        def __init__(self, *rows: bool):
            self.any = torch.tensor(rows).any

    entries.refuse(cast(Tensor, OnCuda(False, False)), "a row is wrong")
    with pytest.raises(RuntimeError, match="a row is wrong"):
        entries.refuse(cast(Tensor, OnCuda(False, True)), "a row is wrong")


def allowed(name: str, row: dict[str, list[int]], i: int, j: int) -> bool:
    """May token i see token j? Written from the definitions, one pair at a time."""
    valid, document = row["attention_mask"], row["document_ids"]
    answer, turn = row["answer_mask"], row["turn_ids"]
    if not valid[i] or not valid[j] or document[i] != document[j]:
        return False
    if name == "causal":
        return j <= i
    if name == "full":
        return True
    if name.startswith("sliding_window"):
        return i - int(name[-1]) < j <= i
    members = [t for t in range(len(valid)) if valid[t] and document[t] == document[i]]
    if name == "prefix_lm":
        answers = [t for t in members if answer[t]]
        first = answers[0] if answers else len(valid)
        return j <= i or max(i, j) < first
    assert name == "context_bidirectional"
    if j <= i:
        return True
    return all(t in members and not answer[t] and turn[t] == turn[i] for t in range(i, j + 1))


def reference(name: str, batch: dict[str, Tensor]) -> Tensor:
    rows = [{k: v[b].tolist() for k, v in batch.items()} for b in range(len(batch["input_ids"]))]
    size = range(batch["input_ids"].shape[1])
    return torch.tensor([[[[allowed(name, r, i, j) for j in size] for i in size]] for r in rows])


# One message: (context tokens, answer tokens, whether the answer lies inside the turn of its
# context, as where part of a message is trained on, with a token of context after it). An assistant
# turn without answer tokens only moves the turn number.
message = st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans())
document = st.lists(message, max_size=4)
row_plan = st.tuples(
    st.lists(document, max_size=3), st.integers(0, 3), st.integers(0, 3), st.permutations(range(3))
)


def render(plans: list[Any]) -> dict[str, Tensor]:
    rows = []
    for documents, left, right, names in plans:
        tokens: list[tuple[int, bool, int, int]] = []  # valid, answer, turn, document
        for number, messages in enumerate(documents):
            turn = 0
            for context, answers, inside in messages:
                tokens += [(1, False, turn, 10 * names[number])] * context
                tokens += [(1, True, turn + 1 - inside, 10 * names[number])] * answers
                tokens += [(1, False, turn, 10 * names[number])] * inside
                turn += 2
        rows.append([(0, False, -1, -1)] * left + tokens + [(0, True, -1, 7)] * right)
    length = max(1, *(len(row) for row in rows))
    rows = [row + [(0, False, -1, -1)] * (length - len(row)) for row in rows]
    valid, answer, turns, ids = (
        torch.tensor([[t[k] for t in row] for row in rows]) for k in range(4)
    )
    return {
        "input_ids": torch.zeros_like(valid),
        "attention_mask": valid,
        "answer_mask": answer,
        "turn_ids": turns,
        "document_ids": ids,
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(row_plan, min_size=2, max_size=3))
def test_policies_equal_the_definitions(plans: list[Any]) -> None:
    batch = render(plans)
    for name, policy in POLICIES.items():
        spans = policy(batch)
        expected = reference(name, batch)
        assert spans.start.dtype == spans.stop.dtype == torch.int64
        assert torch.equal(spans.dense(), expected), name
        empty = spans.stop <= spans.start
        assert not spans.start[empty].any() and not spans.stop[empty].any()
        assert torch.equal(empty, batch["attention_mask"] == 0)

    place = torch.zeros_like(batch["input_ids"])
    causal = reference("causal", batch)[:, 0]
    place = torch.where(batch["attention_mask"] != 0, causal.sum(-1) - 1, place)
    assert torch.equal(masks.positions(batch), place)


BATCH = render(
    [
        ([[(3, 2, False), (2, 1, False)], [(2, 3, False)]], 0, 2, (0, 1, 2)),
        ([[(2, 0, False), (2, 2, True), (1, 0, False)]], 3, 0, (0, 1, 2)),
        ([], 4, 0, (0, 1, 2)),
        ([[(4, 0, False)], [(0, 4, False)], [(1, 1, False)]], 1, 0, (2, 0, 1)),
    ]
)


def test_a_context_never_sees_the_answer_inside_its_own_turn() -> None:
    """Every border between context and answer ends a block, whatever the turn ids say."""
    batch = {
        "input_ids": torch.zeros(2, 6),
        "turn_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]),
        "answer_mask": torch.tensor([[0, 0, 1, 0, 1, 1], [1, 1, 0, 0, 1, 0]], dtype=torch.bool),
    }
    stops = masks.context_bidirectional(batch).stop.tolist()
    assert stops == [[2, 2, 3, 4, 5, 6], [1, 2, 4, 4, 5, 6]]
    assert masks.prefix_lm(batch).stop.tolist() == [[2, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]


def test_an_empty_assistant_turn_does_not_merge_two_contexts() -> None:
    batch = {
        "input_ids": torch.zeros(1, 4),
        "answer_mask": torch.zeros(1, 4, dtype=torch.bool),
        "turn_ids": torch.tensor([[0, 0, 2, 2]]),
    }
    assert masks.context_bidirectional(batch).stop.tolist() == [[2, 2, 4, 4]]


def test_answer_mask_may_be_integer_and_keys_that_are_not_needed_may_be_missing() -> None:
    ids = torch.zeros(1, 3)
    answers = {"input_ids": ids, "answer_mask": torch.tensor([[0, 0, 1]])}
    assert masks.prefix_lm(answers).stop.tolist() == [[2, 2, 3]]
    assert masks.causal({"input_ids": ids}).stop.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("name", POLICIES)
def test_forms_agree(name: str) -> None:
    spans = POLICIES[name](BATCH)
    size, length = BATCH["input_ids"].shape
    dense = spans.dense()
    b, q, k = torch.arange(size), torch.arange(length), torch.arange(length)
    by_mod = spans.mask_mod(
        b[:, None, None, None], torch.zeros(1), q[:, None], k[None, :].view(1, 1, 1, -1)
    )
    assert torch.equal(by_mod, dense)
    assert torch.equal(spans.dense(torch.float32) == 0, dense)
    assert all(map(torch.equal, Spans.unstack(spans.stack()), spans))
    assert spans.stack().shape == (size, 1, length, 2)
    assert all(map(torch.equal, pickle.loads(pickle.dumps(spans)), spans))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_additive_masks_stay_finite_in_a_float32_softmax(dtype: torch.dtype) -> None:
    mask = masks.context_bidirectional(BATCH).dense(dtype)
    assert mask.dtype == dtype
    assert mask.isfinite().all() and mask.float().isfinite().all()
    for working in (torch.float32, torch.float64):
        assert (mask.to(working)).softmax(-1).isfinite().all()
    if dtype in (torch.float32, torch.float64):
        assert mask.min() == torch.finfo(torch.float32).min


def test_dense_refuses_integers() -> None:
    with pytest.raises(ProblemError, match=r"int64.*floating-point"):
        masks.causal(BATCH).dense(torch.int64)


@pytest.mark.parametrize("name", POLICIES)
def test_vmap_equals_the_batch(name: str) -> None:
    policy = POLICIES[name]
    tasks = {key: torch.stack((value, value.flip(0))) for key, value in BATCH.items()}
    got = torch.func.vmap(policy)(tasks)
    assert isinstance(got, Spans)
    for task in range(2):
        expected = policy({key: value[task] for key, value in tasks.items()})
        assert torch.equal(got.start[task], expected.start)
        assert torch.equal(got.stop[task], expected.stop)
    dense = torch.func.vmap(lambda batch: policy(batch).dense(torch.float32))(tasks)
    assert torch.equal(dense[0], policy(BATCH).dense(torch.float32))
    # Spans cross the border of vmap as arguments, too.
    assert torch.equal(torch.func.vmap(lambda spans: spans.dense())(got)[0], policy(BATCH).dense())
    places = torch.func.vmap(masks.positions)(tasks)
    assert torch.equal(places[0], masks.positions(BATCH))


@pytest.mark.parametrize("name", POLICIES)
def test_intersection(name: str) -> None:
    spans, window = POLICIES[name](BATCH), masks.sliding_window(2)(BATCH)
    both = spans & window
    assert torch.equal(both.dense(), spans.dense() & window.dense())
    empty = both.stop <= both.start
    assert not both.start[empty].any() and not both.stop[empty].any()
    assert torch.equal((both & both).stack(), both.stack())


@pytest.mark.parametrize("name", POLICIES)
def test_block_mask(name: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (2, 300), generator=generator).cumsum(-1) // 200
    batch = {
        "input_ids": ids,
        "document_ids": ids,
        "turn_ids": torch.arange(300).expand(2, -1) // 37,
        "answer_mask": torch.rand(2, 300, generator=generator) < 0.01,
        "attention_mask": (torch.arange(300) < torch.tensor([[300], [140]])).int(),
    }
    spans = POLICIES[name](batch)
    blocks = spans.block_mask(32)
    by_torch = create_block_mask(spans.mask_mod, 2, None, 300, 300, device="cpu", BLOCK_SIZE=32)
    visited, needed = blocks.to_dense(), by_torch.to_dense()
    assert blocks.shape == by_torch.shape
    assert (visited >= needed).all()  # nothing is skipped that is allowed
    assert torch.equal(blocks.full_kv_num_blocks, by_torch.full_kv_num_blocks)
    assert visited.sum() <= 1.2 * needed.sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_mask_drives_flex_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    spans = masks.context_bidirectional(BATCH)
    size, length = spans.start.shape
    q, k, v = torch.randn(3, size, 2, length, 8, generator=torch.Generator().manual_seed(0))
    got = flex_attention(q, k, v, block_mask=spans.block_mask())
    assert isinstance(got, Tensor)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=spans.dense())
    torch.testing.assert_close(got, expected)


def test_holes_and_interleaved_documents_are_refused_outside_transforms() -> None:
    ids = torch.zeros(2, 4)
    holes = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])}
    with pytest.raises(DataError, match=r"row 1: attention_mask.*ends"):
        masks.causal(holes)
    mixed = {"input_ids": ids, "document_ids": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])}
    with pytest.raises(DataError, match=r"row 0: document_ids.*together"):
        masks.positions(mixed)
    for valid, documents in (
        ([1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 7, 7]),
        ([0, 1, 1, 1, 1, 0], [7, 0, 1, 0, 0, 8]),
        ([0, 0, 1, 1, 1, 1], [7, 8, 0, 1, 1, 0]),
    ):
        # Ids of padding do not count as documents, which would hide the one that comes back.
        padding = {
            "input_ids": torch.zeros(1, 6),
            "attention_mask": torch.tensor([valid]),
            "document_ids": torch.tensor([documents]),
        }
        with pytest.raises(DataError, match=r"row 0: document_ids.*together"):
            masks.causal(padding)
    for valid, documents in (
        ([1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 7]),
        ([0, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 0]),
    ):
        again = {
            "input_ids": torch.zeros(1, 6),
            "attention_mask": torch.tensor([valid]),
            "document_ids": torch.tensor([documents]),
        }
        masks.causal(again)  # padding may repeat the id of a document
    padded = dict(mixed, attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    masks.causal(padded)  # what a document id says on padding does not matter
    torch.func.vmap(masks.causal)({key: value[None] for key, value in holes.items()})


def test_errors_name_the_key_and_the_fix() -> None:
    ids = torch.zeros(1, 4)
    with pytest.raises(ProblemError, match=r"context_bidirectional needs batch\['turn_ids'\]"):
        masks.context_bidirectional({"input_ids": ids, "answer_mask": ids.bool()})
    with pytest.raises(ProblemError, match=r"prefix_lm needs batch\['answer_mask'\].*add it"):
        masks.prefix_lm({"input_ids": ids})
    with pytest.raises(ProblemError, match="input_ids"):
        masks.causal({})
    with pytest.raises(DataError, match=r"attention_mask.*\[1, 3\].*\[1, 4\]"):
        masks.causal({"input_ids": ids, "attention_mask": torch.ones(1, 3)})
    with pytest.raises(DataError, match="batch, sequence"):
        masks.causal({"input_ids": ids[0]})
    for width in (0, -1, 2.0, True):
        with pytest.raises(ProblemError, match="width"):
            masks.sliding_window(width)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=r"\[B, 1, S, 2\]"):
        Spans.unstack(torch.zeros(1, 1, 4, 4, dtype=torch.int64))
    with pytest.raises(ProblemError, match="integer"):
        Spans.unstack(torch.zeros(1, 1, 4, 2))


def test_policies_compile_without_graph_breaks() -> None:
    for policy in (masks.context_bidirectional, masks.prefix_lm):
        compiled = torch.compile(policy, backend="eager", fullgraph=True)
        assert torch.equal(compiled(BATCH).stack(), policy(BATCH).stack())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_cuda_does_not_synchronise() -> None:
    batch = {key: value.cuda() for key, value in BATCH.items()}
    try:
        torch.cuda.set_sync_debug_mode("error")
        spans = [policy(batch) for policy in POLICIES.values()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, policy in zip(spans, POLICIES.values(), strict=True):
        assert torch.equal(got.stack().cpu(), policy(BATCH).stack())


def test_windowed_keeps_so_many_keys() -> None:
    for window in (1, 2, 5, 9):
        got = windowed(masks.causal(BATCH), window)
        assert torch.equal(got.stack(), masks.sliding_window(window)(BATCH).stack())
    with pytest.raises(ProblemError, match="window"):
        windowed(masks.causal(BATCH), 0)
