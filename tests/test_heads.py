"""The head on scored positions only: the split, its check, and when it is not made."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import build, chat_batch, relative
from torch import nn

import metafocus as mf
from metafocus import masks
from metafocus.lm.cross_entropy import LogitHead
from metafocus.lm.hf import heads
from metafocus.lm.hf.logit_head import logit_head_of

NOTHING = mf.LoRA(lambda model: ())


def loss_of(model, tokens=mf.answer_tokens, adapter=NOTHING):
    return mf.lm_loss(model, adapter=adapter, mask=masks.causal, tokens=tokens)


def full(model, batch):
    """The loss from all logits that the model itself returns, under its own causal mask."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = torch.where(batch["answer_mask"], batch["input_ids"], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def agrees(model, batch=None):
    batch = chat_batch() if batch is None else batch
    parameters = list(model.parameters())
    got, expected = loss_of(model)({}, {}, batch), full(model, batch)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def hook_of(model):
    return heads.install(model.get_output_embeddings())


def other(name, **changes):
    import transformers as t

    torch.manual_seed(0)
    config = getattr(t, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, attn_implementation="sdpa", **changes,
    )  # fmt: skip
    return getattr(t, f"{name}ForCausalLM")(config).double()


@pytest.mark.parametrize(
    ("model", "logit_head"),
    [
        (lambda: other("Cohere", logit_scale=0.25), LogitHead(0.25)),
        (lambda: other("Granite", logits_scaling=8.0), LogitHead(0.125)),
        (lambda: build("gemma2", "eager"), LogitHead(1.0, 30.0)),
        (lambda: build("gemma2", "eager", final_logit_softcapping=0.1), LogitHead(1.0, 0.1)),
        (lambda: build("gpt2"), LogitHead()),
    ],
    ids=["cohere", "granite", "gemma2", "gemma2-tight", "gpt2"],
)
def test_scaled_and_capped_logits(model, logit_head):
    model = model()
    agrees(model)
    assert list(hook_of(model).logit_heads.values()) == [logit_head]


class Doubled(nn.Module):
    """A head with a bias and a nonlinearity: no plain linear layer."""

    def __init__(self, size, vocabulary):
        super().__init__()
        self.inner = nn.Linear(size, vocabulary)

    def forward(self, x):
        return 2 * torch.sin(self.inner(x))


@pytest.mark.parametrize(
    "head", [lambda: nn.Linear(32, 64), lambda: Doubled(32, 64)], ids=["bias", "module"]
)
def test_other_heads(head, monkeypatch):
    monkeypatch.setattr(heads, "_ROWS", 5)
    model = build(tied=False)
    model.set_output_embeddings(head().double())
    agrees(model)
    assert list(hook_of(model).logit_heads.values()) == [LogitHead()]


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output.tanh())


def hooked_before(model):
    model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def replaced(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x).cos()


def parametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


@pytest.mark.parametrize("change", [hooked, hooked_before, replaced, parametrised])
def test_a_head_that_was_changed_is_called(change):
    model = build(tied=False)
    change(model)
    agrees(model)
    assert list(hook_of(model).logit_heads.values()) == [LogitHead()]


def test_unknown_logits_fall_back_with_one_warning():
    """A model that does more to its logits than its configuration says."""
    from transformers import Qwen2ForCausalLM

    class Shifted(Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 3 * out.logits
            return out

    model = build()
    model.__class__ = Shifted
    loss = loss_of(model)
    with pytest.warns(UserWarning, match=r"Shifted: its logits are neither LogitHead\(scale=1.0"):
        got = loss({}, {}, chat_batch())
    assert got.item() == pytest.approx(full(model, chat_batch()).item(), rel=1e-12)
    loss({}, {}, chat_batch())  # warnings are errors here
    agrees(model)


def test_a_head_that_is_never_the_same_falls_back():
    """A hook before the tap, and dropout: calling the head again gives something else."""
    doubled = build(tied=False)
    heads.install(doubled.lm_head)
    doubled.lm_head.register_forward_pre_hook(lambda m, args: (2 * args[0],), prepend=True)
    random = build(tied=False)
    random.set_output_embeddings(
        nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 64, bias=False).double())
    )
    for model in (doubled, random):
        with pytest.warns(UserWarning, match="something else when it is called again"):
            got = loss_of(model.train())({}, {}, chat_batch())
        if model is doubled:
            assert got.item() == pytest.approx(full(model, chat_batch()).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda logits: logits + torch.zeros(1, 24, 1).double(), "another shape than the output"),
        (lambda logits: logits.index_select(1, torch.arange(2)), "cannot run with one position"),
    ],
    ids=["shape", "error"],
)
def test_a_model_that_needs_all_its_logits_falls_back(change, reason):
    model = build()
    forward = model.forward

    def picky(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = picky
    with pytest.warns(UserWarning, match=reason):
        assert logit_head_of(model) is None
    model.forward = forward
    got = loss_of(model)({}, {}, chat_batch())
    assert got.item() == pytest.approx(full(model, chat_batch()).item(), rel=1e-12)


def test_a_model_without_a_head_falls_back():
    model = build()
    model.get_output_embeddings = lambda: None
    with pytest.warns(UserWarning, match=r"get_output_embeddings\(\) returns None"):
        got = loss_of(model)({}, {}, chat_batch())
    assert got.item() == pytest.approx(full(model, chat_batch()).item(), rel=1e-12)


def test_wrong_configuration_is_found_out():
    """A scale that the model does not apply, and one that is changed later."""
    model = build()
    model.config.logit_scale = 7.0
    agrees(model)
    assert list(hook_of(model).logit_heads.items()) == [
        ((type(model), LogitHead(7.0)), LogitHead())
    ]
    model.config.logit_scale = 3.0
    agrees(model)
    assert len(hook_of(model).logit_heads) == 2


def test_checked_once_for_a_model():
    model = build()
    calls = []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: calls.append(1))
    loss_of(model)({}, {}, chat_batch())
    # One check of the head, three passes for that of the last layer.
    assert len(calls) == 5
    loss_of(model, mf.all_tokens)({}, {}, chat_batch())
    assert len(calls) == 6
    model.set_output_embeddings(nn.Linear(32, 64, bias=False).double())
    loss_of(model)({}, {}, chat_batch())
    assert len(calls) == 11


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_check_disturbs_nothing(checkpointing):
    """With dropout, under vmap and grad: the random state, the modes and the hooks stay."""
    model = build(attention_dropout=0.5, checkpointing=checkpointing)
    batch = chat_batch()
    adapter = mf.LoRA(mf.top_layers(0.5, ("up_proj",)), 2, 4.0)
    loss = loss_of(model, adapter=adapter)
    fast = {k: torch.stack([v, 2 * v]) for k, v in adapter.init(model).items()}
    hooks = dict(model.lm_head._forward_hooks)
    state = torch.get_rng_state()

    def each(f):
        logit_head_of(loss.model)
        return torch.func.grad(lambda f: sum((v * v).sum() for v in f.values()))(f)

    torch.func.vmap(each)(fast)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(m.training for m in model.modules())
    assert dict(model.lm_head._forward_hooks) == hooks
    assert list(hook_of(model).logit_heads.values()) == [LogitHead()]
    assert loss.prepare(batch)["scored"].rows is not None


def test_wrappers_of_the_model_are_kept():
    """Mixed precision as accelerate does it: the head computes under the model's own autocast."""
    model = build(dtype=torch.float32)
    forward = model.forward

    def wrapped(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_of(model)({}, {}, chat_batch())
    plain = loss_of(model)({}, {}, chat_batch())
    model.forward = wrapped
    got = loss_of(model)({}, {}, chat_batch())
    assert got.item() == expected.item() != plain.item()


def test_copies_and_pickles_are_idle():
    model = build()
    loss_of(model)({}, {}, chat_batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        hook = hook_of(twin)
        assert hook is not hook_of(model) and hook.reader is None and not hook.logit_heads
        agrees(twin)


def test_an_error_inside_leaves_the_head_whole():
    model = build()
    logits = model(chat_batch()["input_ids"]).logits

    def fails(head, hidden):
        raise RuntimeError("reader")

    with pytest.raises(RuntimeError, match="reader"):
        heads.read_hidden(model.lm_head, lambda: model(chat_batch()["input_ids"]), fails)
    with pytest.raises(mf.errors.ProblemError, match="did not call its head"):
        heads.read_hidden(model.lm_head, lambda: None, lambda head, hidden: hidden)
    assert torch.equal(model(chat_batch()["input_ids"]).logits, logits)


def test_rows_are_selected_where_values_can_be_asked():
    targets = torch.tensor([[-100, 3], [5, -100]])
    assert heads.scored_rows(targets).tolist() == [1, 2]
    assert torch.func.grad(lambda x: heads.scored_rows(targets).sum() * x)(torch.ones(())) == 3
    found = []
    torch.func.vmap(lambda t: found.append(heads.scored_rows(t)) or t)(targets)
    torch.func.vmap(
        lambda t: torch.func.jvp(
            lambda x: found.append(heads.scored_rows(t)) or x, (torch.ones(1),), (torch.ones(1),)
        )[0]
    )(targets)
    assert found == [None, None]


def test_gradient_reaches_only_scored_rows():
    head = nn.Linear(3, 5).double()
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    value = heads.head_loss(head, hidden, torch.tensor([-100, 2, -100, 0]), LogitHead())
    (found,) = torch.autograd.grad(value, hidden)
    assert found[[0, 2]].abs().sum() == 0 and relative(found[[1, 3]], found[[1, 3]]) == 0
    assert found[[1, 3]].abs().sum() > 0
