"""Laws that hold for all inputs: spans, batches, arithmetic on parameters, estimators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import metafocus as mf
from metafocus import masks
from metafocus import params as pt
from metafocus.data import collate, encode_chat, pack
from metafocus.data.tokenizer import train_tokenizer
from metafocus.masks.spans import Spans, nonempty, windowed

F64 = torch.float64


def law(examples: int) -> Any:
    """The same examples at every run, and no clock: a slow machine is no failure."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


# --- spans -------------------------------------------------------------------------------------


@st.composite
def intervals(draw: Any, count: int = 1) -> list[Spans]:
    """Spans of one shape; some intervals are empty, some are written the wrong way round."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    edge = st.lists(st.integers(0, length), min_size=rows * length, max_size=rows * length)
    made = []
    for _ in range(count):
        start, stop = (torch.tensor(draw(edge)).view(rows, length) for _ in range(2))
        made.append(Spans(start, stop))
    return made


@law(80)
@given(intervals(3))
def test_intersection_is_that_of_sets(three):
    a, b, c = three
    assert torch.equal((a & b).dense(), a.dense() & b.dense())
    assert torch.equal((a & b).stack(), (b & a).stack())
    assert torch.equal(((a & b) & c).stack(), (a & (b & c)).stack())
    assert torch.equal((a & a).stack(), nonempty(*a).stack())
    assert torch.equal(nonempty(*a).dense(), a.dense())


@law(80)
@given(intervals(), st.integers(1, 9))
def test_the_forms_of_a_mask_agree(one, window):
    (spans,) = one
    rows, length = spans.start.shape
    allowed = spans.dense()
    b, q, k = torch.meshgrid(*map(torch.arange, (rows, length, length)), indexing="ij")
    assert torch.equal(spans.mask_mod(b, torch.zeros_like(b), q, k), allowed[:, 0])
    assert torch.equal(spans.dense(torch.float32) == 0, allowed)
    assert torch.equal(Spans.unstack(spans.stack()).dense(), allowed)
    near = (q - k < window)[:, None]
    assert torch.equal(windowed(spans, window).dense(), allowed & near)


@law(40)
@given(intervals(), st.integers(1, 4))
def test_a_block_mask_loses_no_key(one, size):
    (spans,) = one
    length = spans.start.shape[1]
    blocks = spans.block_mask(size)
    visited = blocks.to_dense().bool()
    needed = spans.dense()
    seen = visited.repeat_interleave(size, -1).repeat_interleave(size, -2)[..., :length, :length]
    assert not (needed & ~seen).any()


@law(40)
@given(intervals(), st.integers(0, 2**20))
def test_attention_is_a_softmax_over_the_interval(one, seed):
    (spans,) = one
    rows, length = spans.start.shape
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, 2, length, 4, generator=g, dtype=F64) for _ in range(3))
    weights = (q @ k.mT / 2).masked_fill(~spans.dense(), -torch.inf).softmax(-1)
    expected = weights.nan_to_num(0.0) @ v
    for backend in ("dense", "tiled"):
        found = mf.attention.span_attention(q, k, v, spans, backend=backend)
        # At most seven terms of order one, in float64.
        assert (found - expected).abs().max() < 1e-13


# --- chats -------------------------------------------------------------------------------------

TOKENIZER = train_tokenizer(["hello there, how are you?"], 280)
ROLE = st.sampled_from(["system", "user", "assistant", "tool"])
CONTENT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
CHAT = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, ROLE, CONTENT),
    min_size=1,
    max_size=4,
)


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Undo `collate`: what is not padding, row by row."""
    names = batch.keys() - {"attention_mask"}
    masks_of = batch["attention_mask"].bool()
    return [{k: batch[k][i][valid] for k in names} for i, valid in enumerate(masks_of)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@law(40)
@given(
    st.lists(CHAT, min_size=1, max_size=3), st.sampled_from(["left", "right"]), st.integers(1, 9)
)
def test_encoding_collating_and_packing_lose_nothing(chats, side, multiple):
    samples = [encode_chat(chat, TOKENIZER) for chat in chats]
    for chat, sample in zip(chats, samples, strict=True):
        text = TOKENIZER.apply_chat_template(chat, tokenize=False)
        assert TOKENIZER.decode(sample["input_ids"]) == text
        assert (sample["turn_ids"].diff() >= 0).all()
        assert bool(sample["answer_mask"].any()) == any(m["role"] == "assistant" for m in chat)
    batch = collate(samples, pad_token_id=0, side=side, pad_to_multiple_of=multiple)
    assert batch["input_ids"].shape[1] % multiple == 0
    assert all(map(same, rows_of(batch), samples))

    packed = pack(samples, max(len(sample["input_ids"]) for sample in samples) + multiple)
    found = []
    for row in packed:
        for document in row["document_ids"].unique():
            chosen = row["document_ids"] == document
            found.append({k: v[chosen] for k, v in row.items() if k != "document_ids"})
    assert len(found) == len(samples)
    for sample in samples:
        assert any(same(sample, one) for one in found)


@law(30)
@given(st.lists(CHAT, min_size=2, max_size=3))
def test_packed_documents_see_what_they_see_alone(chats):
    samples = [encode_chat(chat, TOKENIZER) for chat in chats]
    (row,) = pack(samples, sum(len(sample["input_ids"]) for sample in samples))
    for policy in (masks.causal, masks.prefix_lm, masks.context_bidirectional, masks.full):
        together = policy(collate([row], pad_token_id=0)).dense()[0, 0]
        alone = [policy(collate([s], pad_token_id=0)).dense()[0, 0] for s in samples]
        assert torch.equal(together, torch.block_diag(*(a.int() for a in alone)).bool())


# --- arithmetic --------------------------------------------------------------------------------


@st.composite
def vectors(draw: Any, count: int) -> list[dict[str, Tensor]]:
    """Parameters of one shape, whole numbers: the laws hold without rounding."""
    shapes = draw(st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=3))
    made = []
    for _ in range(count):
        entry = {}
        for i, shape in enumerate(shapes):
            size = int(torch.Size(shape).numel())
            values = draw(st.lists(st.integers(-99, 99), min_size=size, max_size=size))
            entry[f"p{i}"] = torch.tensor(values, dtype=F64).view(shape)
        made.append(entry)
    return made


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@law(80)
@given(vectors(3), st.integers(-9, 9), st.integers(-9, 9))
def test_parameters_are_a_vector_space_with_a_product(three, s, t):
    a, b, c = three
    zero = pt.zeros_like(a)
    assert equal(pt.add(a, b), pt.add(b, a))
    assert equal(pt.add(pt.add(a, b), c), pt.add(a, pt.add(b, c)))
    assert equal(pt.add(a, zero), a) and equal(pt.sub(a, a), zero)
    assert equal(pt.sub(a, b), pt.add(a, b, -1.0))
    assert equal(pt.scale(pt.add(a, b), s), pt.add(pt.scale(a, s), pt.scale(b, s)))
    assert equal(pt.scale(pt.scale(a, s), t), pt.scale(a, s * t))
    assert pt.dot(a, b) == pt.dot(b, a)
    assert pt.dot(pt.add(a, c, s), b) == pt.dot(a, b) + s * pt.dot(c, b)
    assert pt.dot(a, a) >= 0
    # Products of whole numbers below 1e5: only the roots round.
    assert pt.norm(pt.add(a, b)) <= (pt.norm(a) + pt.norm(b)) * (1 + 1e-12)


# --- estimators --------------------------------------------------------------------------------


class Quadratic:
    """`inner = 1/2 z'Az + x'Bz`, `outer = 1/2 |z - x - q|^2`, with eigenvalues of A in [0.2, 1]."""

    def __init__(self, seed: int, size: int):
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=F64)

        basis, _ = torch.linalg.qr(randn(size, size))
        self.a = basis @ torch.diag(torch.linspace(0.2, 1.0, size, dtype=F64)) @ basis.T
        self.b, self.x, self.query = randn(size, size), randn(size), randn(size)
        self.problem = mf.Problem(
            lambda fast, slow, _: (
                0.5 * fast["z"] @ self.a @ fast["z"] + slow["z"] @ self.b @ fast["z"]
            ),
            lambda fast, slow, q: 0.5 * ((fast["z"] - slow["z"] - q) ** 2).sum(),
            init=lambda slow, support: {"z": slow["z"]},
        )

    def found(self, solver: Any, estimator: Any) -> Tensor:
        """The hypergradient, by the library."""
        meta = mf.bilevel(self.problem, solver=solver, estimator=estimator)
        episode = mf.Episode(torch.zeros(1, dtype=F64), self.query)
        return mf.hypergrad(meta)({"z": self.x}, episode)[0]["z"]

    def unrolled(self, lr: float, momentum: float, steps: int, last: int | None = None) -> Tensor:
        """The hypergradient, by the recursion of heavy-ball descent written as matrices."""
        size = len(self.x)
        one = torch.eye(size, dtype=F64)
        z, velocity = self.x, torch.zeros(size, dtype=F64)
        dz, dv = one, torch.zeros(size, size, dtype=F64)
        head = 0 if last is None else max(steps - last, 0)
        for step in range(steps):
            if step == head:
                dz, dv = one, torch.zeros_like(dv)
            velocity = momentum * velocity + self.a @ z + self.b.T @ self.x
            dv = momentum * dv + self.a @ dz + self.b.T
            z, dz = z - lr * velocity, dz - lr * dv
        if head >= steps:
            dz = one
        return (dz - one).T @ (z - self.x - self.query)


PROBLEM = st.builds(Quadratic, st.integers(0, 2**20), st.integers(1, 4))
STEPS, LR = st.integers(0, 6), st.floats(0.01, 0.9)
MOMENTUM = st.one_of(st.just(0.0), st.floats(0.1, 0.9))


def close(found: Tensor, expected: Tensor) -> bool:
    # A handful of products of matrices of order one, in float64.
    return bool((found - expected).norm() <= 1e-11 * (1 + expected.norm()))


@law(40)
@given(PROBLEM, STEPS, LR, MOMENTUM)
def test_unrolled_is_the_closed_form(quadratic, steps, lr, momentum):
    solver = mf.SGD(lr, steps, momentum=momentum)
    assert close(quadratic.found(solver, mf.Unrolled()), quadratic.unrolled(lr, momentum, steps))


@law(30)
@given(PROBLEM, STEPS, LR, MOMENTUM, st.integers(0, 7))
def test_truncated_is_the_closed_form(quadratic, steps, lr, momentum, last):
    solver = mf.SGD(lr, steps, momentum=momentum)
    expected = quadratic.unrolled(lr, momentum, steps, last)
    assert close(quadratic.found(solver, mf.Unrolled(last=last)), expected)


CLIP = st.sampled_from([None, mf.clip_global(0.3), mf.clip_per_tensor(0.5)])


@law(30)
@given(PROBLEM, STEPS, LR, MOMENTUM, CLIP, st.integers(1, 7), st.sampled_from([None, 2]))
def test_recompute_is_the_graph(quadratic, steps, lr, momentum, clip, size, last):
    solver = mf.SGD(lr, steps, momentum=momentum, clip=clip)
    graph = quadratic.found(solver, mf.Unrolled(last=last))
    again = quadratic.found(solver, mf.Unrolled(last=last, recompute=size))
    assert close(again, graph)


@law(20)
@given(PROBLEM, st.integers(0, 5), LR, CLIP)
def test_recompute_is_the_graph_of_adam(quadratic, steps, lr, clip):
    solver = mf.Adam(lr, steps, clip=clip)
    graph = quadratic.found(solver, mf.Unrolled())
    assert close(quadratic.found(solver, mf.Unrolled(recompute=True)), graph)


@law(30)
@given(PROBLEM)
def test_implicit_is_the_inverse_at_a_stationary_point(quadratic):
    """The minimum of the inner loss is known: `-A^-1 B'x`."""
    size = len(quadratic.x)
    newton = torch.linalg.solve(quadratic.a, quadratic.b.T)
    solution = mf.Given(lambda outer, support: {"z": -newton @ outer["z"]})
    found = quadratic.found(solution, mf.Implicit(mf.CG(2 * size)))
    residual = -newton @ quadratic.x - quadratic.x - quadratic.query
    expected = (-newton).T @ residual - residual
    # Conjugate gradients on a condition number of 5.
    assert (found - expected).norm() <= 1e-9 * (1 + expected.norm())


@pytest.mark.parametrize("solver", [mf.SGD(0.3, 3), mf.Adam(0.1, 3)], ids=["sgd", "adam"])
def test_the_recursion_is_not_the_librarys_own(solver):
    """The closed form must notice a wrong hypergradient: the first-order one is not it."""
    quadratic = Quadratic(0, 3)
    wrong = quadratic.found(solver, mf.FirstOrder())
    assert not close(wrong, quadratic.unrolled(0.3, 0.0, 3))
