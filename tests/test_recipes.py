"""Inner objectives: query-only test-time training, learning while reading, and export."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from models import NAMES, build, chat_batch, grads, relative
from test_per_example import alone, plain_norms
from torch.func import functional_call

import metafocus as mf
from metafocus.adapters import for_each, one_of
from metafocus.errors import ProblemError
from metafocus.recipes import export, focusft, qttt, ttt_e2e
from metafocus.recipes.streaming import chunks

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
# PEFT reads a property that transformers has renamed.
peft_warnings = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LR, CLIP, SIZE = 0.5, 0.7, 7


def model_of(**options):
    return plain_norms(build(**options))


def sequence(length=24):
    return alone(chat_batch(length), 0)


def entropy(logits, ids, scored):
    """Mean cross entropy of the tokens in `scored` (True at their own place), and their number."""
    chosen = scored[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    count = chosen.sum()
    return (losses * chosen.flatten()).sum() / count.clamp(min=1), count


# TTT-E2E ------------------------------------------------------------------------------------


def reading_by_hand(model, batch, *, window, inner, outer, order, frozen=False):
    """Chunk by chunk: score, then one clipped step; all derivatives by the tape."""
    slow = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    fast = {k: slow[k] for k in slow if "layers.3.mlp" in k}
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    total, count, inner_losses = 0.0, 0, []
    for start in range(0, length, SIZE):
        first, stop = max(0, start - window), min(start + SIZE, length)
        own = torch.arange(first, stop)[None] >= start
        part = ids[:, first:stop]

        def loss(fast, mask, first=first, stop=stop, own=own, part=part):
            logits = functional_call(model, {**slow, **fast}, (part,), {"use_cache": False}).logits
            return entropy(logits, part, mask[:, first:stop] & own)

        value, number = loss(fast, outer)
        total, count = total + value * number, count + number
        value, _ = loss(fast, inner)
        inner_losses.append(value.item())
        found = torch.autograd.grad(value, list(fast.values()), create_graph=order > 1)
        norm = torch.sqrt(sum((g * g).sum() for g in found))
        if norm > CLIP:
            found = [g * CLIP / norm for g in found]
        fast = {k: p - LR * g for (k, p), g in zip(fast.items(), found, strict=True)}
    mean = total / count
    got = torch.autograd.grad(mean, list(slow.values()))
    return mean.item(), inner_losses, fast, torch.cat([g.flatten() for g in got])


@pytest.mark.parametrize("window", [5, 100])
@pytest.mark.parametrize("outer", ["all", "answer"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "estimator", [mf.FirstOrder(), mf.Unrolled(), mf.Unrolled(recompute=True)], ids=str
)
def test_ttt_e2e_is_a_loop_written_by_hand(estimator, checkpointing, outer, window):
    batch = sequence()
    order = 1 if estimator == mf.FirstOrder() else 2
    masks = {"all": torch.ones_like(batch["answer_mask"]), "answer": batch["answer_mask"]}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected, inner, fast, gradient = reading_by_hand(
            model_of(), batch, window=window, inner=masks["all"], outer=masks[outer], order=order
        )
    model = model_of(checkpointing=checkpointing)
    meta = ttt_e2e(
        model,
        chunk=SIZE,
        window=window,
        solver=mf.SGD(LR, steps=1, clip=mf.clip_global(CLIP)),
        estimator=estimator,
        outer_tokens=mf.all_tokens if outer == "all" else mf.answer_tokens,
    )
    loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    # float64: 24 tokens, four chunks, the same operations.
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert aux.inner_losses.tolist() == pytest.approx(inner, rel=1e-12)
    assert set(aux.params) == set(fast)
    for name, value in aux.params.items():
        torch.testing.assert_close(value, fast[name].detach(), rtol=1e-12, atol=1e-12)
    assert relative(grads(model), gradient) < 1e-11


def test_ttt_e2e_is_the_derivative_and_first_order_is_not():
    batch, model = sequence(), model_of()
    outer = {k: v.detach() for k, v in model.named_parameters()}
    episode = mf.Episode(batch, batch)
    options = {"chunk": SIZE, "solver": mf.SGD(LR, 1, clip=mf.clip_global(CLIP))}
    exact, first = (
        mf.hypergrad(ttt_e2e(model, estimator=e, **options))(outer, episode)[0]
        for e in (mf.Unrolled(recompute=True), mf.FirstOrder())
    )
    norm = sum((v * v).sum() for v in exact.values()).sqrt()
    step = {k: 1e-4 * v / norm for k, v in exact.items()}
    meta = ttt_e2e(model, estimator=mf.FirstOrder(), **options)
    up, down = (
        meta({k: v + s * step[k] for k, v in outer.items()}, episode)[0].item() for s in (1, -1)
    )
    slope = sum((exact[k] * step[k]).sum() for k in step).item()
    # Error step^2 times the third derivative, and 1e-16 / 1e-4 of rounding.
    assert (up - down) / 2 == pytest.approx(slope, rel=1e-5)
    one, two = (torch.cat([g[k].flatten() for k in exact]) for g in (first, exact))
    assert relative(one, two) > 1e-3


def test_reading_lowers_the_loss_of_what_comes_later():
    """A text that repeats itself after more than a window: only weights can remember."""
    ids = torch.randint(1, 64, (1, 16), generator=torch.Generator().manual_seed(0)).repeat(1, 8)
    batch = {"input_ids": ids}
    model = build(dtype=torch.float32, max_position_embeddings=256)
    options = {"chunk": 16, "window": 4}
    reading = ttt_e2e(model, solver=mf.SGD(1.0, steps=1, clip=mf.clip_global(1.0)), **options)
    deaf = ttt_e2e(model, solver=mf.SGD(0.0, steps=1), **options)
    one, two = (meta({}, mf.Episode(batch, batch)) for meta in (reading, deaf))
    assert one[0] < two[0] - 0.1
    assert one[1].inner_losses[0] == two[1].inner_losses[0]


def test_rates_go_on_from_chunk_to_chunk():
    batch, seen = sequence(), []

    def rate(outer, step):
        seen.append(step)
        return 0.1

    meta = ttt_e2e(
        model_of(),
        chunk=SIZE,
        solver=mf.SGD(mf.per_step(rate), steps=2),
        estimator=mf.FirstOrder(),
    )
    meta({}, mf.Episode(batch, batch))
    # The trial step of the first call comes before.
    assert seen == [0, *range(8)]


def test_several_sequences_by_over_tasks():
    episodes = [alone(chat_batch(seed=s), 0) for s in (0, 1)]
    stacked = {k: torch.stack([e[k] for e in episodes]) for k in episodes[0]}
    model = model_of()
    meta = ttt_e2e(model, chunk=SIZE, estimator=mf.Unrolled())
    outer = {k: v.detach() for k, v in model.named_parameters()}
    got, (loss, _) = mf.hypergrad(mf.over_tasks(meta))(outer, mf.Episode(stacked, stacked))
    each = [mf.hypergrad(meta)(outer, mf.Episode(e, e)) for e in episodes]
    torch.testing.assert_close(loss, torch.stack([x[1][0] for x in each]).mean())
    for name, value in got.items():
        mean = torch.stack([x[0][name] for x in each]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-9, atol=1e-12)


def test_lora_can_read_too():
    batch = sequence()
    adapter = mf.LoRA(mf.top_layers(0.5, NAMES), rank=2)
    _, aux = ttt_e2e(model_of(), chunk=SIZE, adapter=adapter)({}, mf.Episode(batch, batch))
    assert all(v.abs().sum() > 0 for v in aux.params.values())


def test_chunks_cover_every_token_once():
    batch = {"input_ids": torch.arange(23).expand(2, 23)}
    seen = []
    for part in chunks(batch, 5, 3):
        assert part["input_ids"].shape == part["chunk"].shape
        seen += part["input_ids"][0][part["chunk"][0]].tolist()
    assert seen == list(range(23))


def test_a_name_is_no_model():
    with pytest.raises(ProblemError, match=r"model must be .*mf\.models\.load.*got 'smollm2'"):
        mf.recipes.focusft("smollm2")  # pyright: ignore[reportArgumentType]


def test_what_ttt_e2e_refuses():
    batch, both = sequence(), chat_batch()
    with pytest.raises(ProblemError, match=r"chunk must be an integer >= 1, got 0"):
        ttt_e2e(model_of(), chunk=0, window=1)
    with pytest.raises(ProblemError, match="2 sequences"):
        ttt_e2e(model_of())({}, mf.Episode(both, both))
    with pytest.raises(ProblemError, match="lost between chunks"):
        ttt_e2e(model_of(), solver=mf.Adam(0.1, 1))({}, mf.Episode(batch, batch))
    model = model_of()
    part = {"model.embed_tokens.weight": model.model.embed_tokens.weight}
    with pytest.raises(ProblemError, match="closes over"):
        ttt_e2e(model, chunk=SIZE)(part, mf.Episode(batch, batch))


# qTTT ---------------------------------------------------------------------------------------


def test_qttt_learns_from_the_context_and_never_from_answers():
    batch, model = chat_batch(), model_of()
    _, aux = qttt(model)({}, mf.Episode(batch, batch))
    assert {k.split(".")[-2] for k in aux.params} == {"q_proj"}
    assert len({k.split(".")[2] for k in aux.params}) == 4
    assert all(len(v) == 2 for v in aux.params.values())
    assert aux.inner_losses[-1] < aux.inner_losses[0]
    # The last answer can be anything: nothing comes after it.
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 18:] = 5
    again = qttt(model_of())({}, mf.Episode(other, other))[1].params
    for name, value in aux.params.items():
        torch.testing.assert_close(value[0], again[name][0], rtol=1e-12, atol=1e-14)


def test_qttt_by_hand():
    """The paper's weights, W_Q itself, on one example."""
    batch, model = sequence(), model_of()
    adapter = mf.FullWeights(mf.top_layers(1.0, ("q_proj",)))
    solver = mf.SGD(LR, steps=3)
    meta = qttt(model, adapter=adapter, solver=solver, per_example=False)
    loss, aux = meta({}, mf.Episode(batch, batch))
    slow = {k: v.detach() for k, v in model_of().named_parameters()}
    fast = {k: slow[k] for k in slow if ".q_proj." in k}
    plain, ids = model_of(), batch["input_ids"]

    def logits(fast):
        return functional_call(plain, {**slow, **fast}, (ids,), {"use_cache": False}).logits

    for _ in range(3):
        fast = {k: v.detach().requires_grad_() for k, v in fast.items()}
        value, _ = entropy(logits(fast), ids, ~batch["answer_mask"])
        found = torch.autograd.grad(value, list(fast.values()))
        fast = {k: v - LR * g for (k, v), g in zip(fast.items(), found, strict=True)}
    for name, value in aux.params.items():
        torch.testing.assert_close(value, fast[name].detach(), rtol=1e-12, atol=1e-12)
    expected, _ = entropy(logits(fast), ids, batch["answer_mask"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_prompt_without_answers_and_generation():
    batch, model = chat_batch(), build(dtype=torch.float32).eval()
    prompt = {**batch, "answer_mask": torch.zeros_like(batch["answer_mask"])}
    with torch.no_grad():
        loss, aux = qttt(model)({}, mf.Episode(prompt, prompt))
    assert loss == 0 and not any(v.requires_grad for v in aux.params.values())
    from metafocus.recipes.ttt import QUERIES

    inputs = {"input_ids": batch["input_ids"][:, :8], "attention_mask": torch.ones(2, 8).long()}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with QUERIES.bind(model, aux.params):
        both = model.generate(**inputs, **options)
    for row in range(2):
        with QUERIES.bind(model, one_of(aux.params, row)):
            own = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **options)
        assert torch.equal(both[row], own[0])


# The recipes themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [qttt, ttt_e2e], ids=lambda f: f.__name__)
def test_recipes_are_short(recipe):
    source = inspect.getsource(recipe)
    body = source[source.rindex('"""') + 3 :].strip().splitlines()
    assert len(body) <= 20
    assert "arXiv" in recipe.__doc__


@pytest.mark.parametrize("tokens", [mf.answer_tokens, mf.context_tokens, mf.all_tokens])
@pytest.mark.parametrize("per_example", [False, True], ids=["shared", "per example"])
def test_token_policies(tokens, per_example):
    batch = chat_batch()
    adapter = mf.LoRA(mf.top_layers(0.5, NAMES), rank=2)
    model = model_of()
    meta = focusft(
        model, adapter=adapter, inner_tokens=tokens, mask=mf.masks.causal, per_example=per_example
    )
    loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    assert aux.inner_losses[1] < aux.inner_losses[0] and grads(model).norm() > 0


@peft_warnings
def test_export_lora_to_peft(tmp_path):
    """A directory for each example, whose PEFT model has the logits of its row."""
    peft = pytest.importorskip("peft")
    adapter = mf.LoRA(mf.top_layers(0.5, ("q_proj",)), rank=2, alpha=4.0)
    batch, model = chat_batch(), build(dtype=torch.float64).eval()
    solver = mf.SGD(1.0, steps=2)
    fast = qttt(model, adapter=adapter, solver=solver)({}, mf.Episode(batch, batch))[1].params
    with adapter.bind(model, fast):
        expected = model(batch["input_ids"]).logits
    paths = export(model, adapter, fast, tmp_path / "each")
    assert paths == [tmp_path / "each" / "0", tmp_path / "each" / "1"]
    for row, path in enumerate(paths):
        loaded = peft.PeftModel.from_pretrained(
            build(dtype=torch.float64).eval(), path, autocast_adapter_dtype=False
        )
        got = loaded(batch["input_ids"][row : row + 1]).logits[0]
        torch.testing.assert_close(got, expected[row], rtol=0, atol=1e-12)
    shared = one_of(fast, 0)
    assert export(model, adapter, shared, tmp_path / "one") == [tmp_path / "one"]
    with pytest.raises(ProblemError, match=r"2 examples are 2 adapters.*recipes\.export"):
        adapter.save(model, fast, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_export_full_weights(tmp_path):
    model = build()
    adapter = mf.FullWeights(mf.top_layers(0.5, ("q_proj",)))
    fast = adapter.init(model)
    assert export(model, adapter, fast, tmp_path) == [tmp_path]
    assert set(adapter.load(model, tmp_path)) == set(fast)
    with pytest.raises(ProblemError, match=r"for each example are LoRA's"):
        export(model, adapter, for_each(fast, 2), tmp_path)
