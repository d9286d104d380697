"""Test-time training at toy scale: what TTT-E2E and qTTT claim about their inner loops.

Orderings and exact statements only. The published numbers, of models of billions of tokens, are out
of reach here; each docstring says what the toy can show.
"""

from __future__ import annotations

import pytest
import torch
from models import build, chat_batch, relative
from test_per_example import alone, plain_norms
from transformers import Qwen2Config, Qwen2ForCausalLM

import metafocus as mf
from metafocus.recipes import qttt, ttt_e2e

pytestmark = pytest.mark.repro

# --- TTT-E2E -------------------------------------------------------------------------------------

LETTERS, CHUNK, LENGTH = 6, 16, 96
CONFIG = Qwen2Config(
    vocab_size=2 * LETTERS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def ciphers(texts: int, generator: torch.Generator) -> mf.Episode:
    """Texts of a letter, its cipher, a letter, ...; each text has a cipher of its own."""
    ids = []
    for _ in range(texts):
        cipher = LETTERS + torch.randperm(LETTERS, generator=generator)
        letters = torch.randint(LETTERS, (LENGTH // 2,), generator=generator)
        ids.append(torch.stack([letters, cipher[letters]], 1).reshape(1, LENGTH))
    known = (torch.arange(LENGTH) % 2 == 1).expand(texts, 1, LENGTH)
    batch = {"input_ids": torch.stack(ids), "answer_mask": known}
    return mf.Episode(batch, batch)


def reader(model, rate: float, estimator: mf.Estimator, tokens=mf.answer_tokens):
    """TTT-E2E on the MLP of the upper layer, over stacked texts, with a window of one chunk."""
    meta = ttt_e2e(
        model,
        chunk=CHUNK,
        window=CHUNK,
        adapter=mf.FullWeights(mf.top_layers(0.5, ("mlp",))),
        solver=mf.SGD(rate, steps=1),
        estimator=estimator,
        inner_tokens=mf.answer_tokens,
        outer_tokens=tokens,
    )
    return mf.over_tasks(meta)


def trained(rate: float, estimator: mf.Estimator, seed: int, steps: int):
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(CONFIG)
    meta, generator = reader(model, rate, estimator), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        meta({}, ciphers(4, generator))[0].backward()
        optimizer.step()
    return model


def late(batch):
    """The answers in the last third of a text."""
    length = batch["input_ids"].shape[-1]
    place = batch.get("place")
    assert place is not None, length
    return batch["answer_mask"].bool() & (place >= 2 * LENGTH // 3)


def score(model, rate: float) -> float:
    """The loss in the last third of new texts, of a model that learns at `rate` while it reads."""
    episode = ciphers(32, torch.Generator().manual_seed(99))
    batch = {**episode.query, "place": torch.arange(LENGTH).expand(32, 1, LENGTH)}
    meta = reader(model, rate, mf.FirstOrder(), late)
    return meta({}, mf.Episode(batch, batch))[0].item()


@pytest.mark.claim(
    "TTT-E2E",
    paper="Tandon et al., arXiv 2512.23675",
    says="weights trained through the inner loop go on learning while they read; weights trained "
    "without it do not",
    published="loss at 128K: 2.275 (TTT-E2E), 2.316 (sliding window)",
    note="ciphers of six letters, two layers: the ordering only",
)
def test_learning_while_reading_must_be_trained_for(claim):
    """TTT-E2E, arXiv 2512.23675: end to end at training time, not only at test time.

    Claim: with the same architecture and window, a model whose start was trained through the
    inner loop has the lower loss late in a text; taking the same inner steps with a model that
    was not trained for them gains little.
    Setting: a text is a cipher of its own; a chunk of 16 tokens sees 16 before it, the rest must be
    in the weights. 120 outer steps of 4 texts, one seed (full: 300, two). Measured: loss in the
    last third of 32 new texts. What a toy can show is the ordering at an equal number of outer
    steps, not its size on language: the model with a window alone is still at chance, log 6 = 1.79.
    Tolerance: an ordering for each seed, by 5 % of the loss.
    Ours: 1.797 with the window, 1.797 with steps at test time only, end to end 0.70, 0.043 and
    0.029 in three runs: rounding, which depends on where tensors lie, is enough to change it.
    """
    found: dict[str, list[float]] = {"window": [], "window, then steps": [], "end to end": []}
    steps, seeds = (300, (0, 1)) if claim.full else (120, (0,))
    for seed in seeds:
        fixed = trained(0.0, mf.FirstOrder(), seed, steps)
        found["window"].append(score(fixed, 0.0))
        found["window, then steps"].append(score(fixed, 1.0))
        found["end to end"].append(score(trained(1.0, mf.Unrolled(), seed, steps), 1.0))
    claim({name: [round(x, 4) for x in values] for name, values in found.items()})
    for window, later, whole in zip(*found.values(), strict=True):
        assert whole < 0.95 * window
        assert whole < 0.95 * later


# --- qTTT ----------------------------------------------------------------------------------------

QUERIES = mf.FullWeights(mf.top_layers(1.0, ("q_proj",)))
TOP = mf.FullWeights(mf.top_layers(0.25, ("q_proj",)))


def adapted(batch, adapter, steps: int, cached: bool):
    """Fast weights and inner losses of qTTT; `cached`: keys and values of before the first step."""
    model = plain_norms(build())
    if cached:
        kept: dict[str, torch.Tensor] = {}
        handles = []
        for name, module in model.named_modules():
            if name.endswith(("k_proj", "v_proj")):

                def keep(module, args, output, name=name):
                    kept[name] = output.detach()

                handles.append(module.register_forward_hook(keep))
        with torch.no_grad():
            model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for handle in handles:
            handle.remove()
        for name in kept:

            def reuse(module, args, output, name=name):
                # The head is tried on a single position first.
                return kept[name] if output.shape == kept[name].shape else output

            model.get_submodule(name).register_forward_hook(reuse)
    meta = qttt(model, adapter=adapter, solver=mf.SGD(0.5, steps), per_example=False)
    _, aux = meta({}, mf.Episode(batch, batch))
    return aux.params, aux.inner_losses


@pytest.mark.claim(
    "qTTT",
    paper="Bansal et al., arXiv 2512.13898",
    says="steps on the query projections alone lower the loss of the context, with keys and values "
    "computed once",
    published="one pass for keys and values, then steps on W_Q alone; +12.6 and +14.1 points",
    note="inner loop only, a random model; the recipe computes keys anew, the paper keeps them",
)
def test_queries_alone_and_keys_computed_once(claim):
    """qTTT, arXiv 2512.13898: W_Q adapts to the context, keys and values stay in the cache.

    Claim: each step lowers the next-token loss of the context; nothing but W_Q moves; where only
    the uppermost layer's queries adapt, keys and values do not depend on them and one pass serves
    all steps exactly.
    Setting: four layers, hidden 32, eight steps, the context of one chat. The paper keeps all keys
    of before the first step; here they are put in by hooks. The recipe computes them anew, which
    below the top layer is another method: the difference is reported.
    Tolerance: 1e-12 for the top layer (float64, the same operations on stored tensors); strict
    falls for the losses; none for what moves.
    Ours: 2e-15 for the top layer; with all layers the two methods differ by 0.27.
    Out of reach here: the gain on LongBench-v2 and ZeroScrolls, and that it beats thinking longer.
    """
    batch = alone(chat_batch(), 0)
    top = {cached: adapted(batch, TOP, 8, cached) for cached in (False, True)}
    every = {cached: adapted(batch, QUERIES, 8, cached) for cached in (False, True)}
    start = {k: v.detach() for k, v in plain_norms(build()).named_parameters()}

    def moved(params):
        return torch.cat([(params[k] - start[k]).flatten() for k in sorted(params)])

    exact = relative(moved(top[True][0]), moved(top[False][0]))
    drift = relative(moved(every[True][0]), moved(every[False][0]))
    losses = {
        name: both[1].tolist() for name, both in (("cached", every[True]), ("anew", every[False]))
    }
    claim(
        {
            "top layer, cached against anew": exact,
            "all layers, cached against anew": drift,
            "context loss, first and last": {k: [v[0], v[-1]] for k, v in losses.items()},
            "adapted": sorted({k.split(".")[-2] for k in every[True][0]}),
        }
    )
    assert {k.split(".")[-2] for k in every[True][0]} == {"q_proj"}
    assert len({k.split(".")[2] for k in top[True][0]}) == 1
    assert len({k.split(".")[2] for k in every[True][0]}) == 4
    assert exact < 1e-12
    assert drift > 1e-9, "below the top layer keys do depend on adapted queries"
    for values in losses.values():
        assert values == sorted(values, reverse=True) and len(set(values)) == 8
