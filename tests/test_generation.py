"""Prompts read under a mask policy, and what is decoded after them."""

from __future__ import annotations

import architectures
import commands
import pytest
import torch
from models import build

import metafocus as mf
from metafocus.errors import ProblemError
from metafocus.evals import Item
from metafocus.evals.run import answers
from metafocus.lm import prefilled
from metafocus.lm.hf.attention import attending
from metafocus.lm.hf.inputs import model_inputs

POLICIES = (mf.masks.context_bidirectional, mf.masks.causal, mf.masks.prefix_lm)
NEW = 5


def prompts():
    """Two prompts of one context turn; the second is padded on the left."""
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[1, :4] = 0
    return {"input_ids": ids, "attention_mask": real}


def sharp(family, attn, **changes):
    """A random model whose logits differ enough for greedy choices to be clear."""
    model = build(family, attn, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def without_cache(model, batch, policy):
    """Greedy tokens and their logits, from the whole sequence at every step."""
    ids, logits = batch["input_ids"], []
    length = ids.shape[1]
    for _ in range(NEW):
        new = ids.shape[1] - length
        real = torch.cat((batch["attention_mask"], torch.ones(2, new, dtype=torch.int64)), 1)
        whole = {
            "input_ids": ids,
            "attention_mask": real,
            "turn_ids": torch.where(real != 0, (torch.arange(length + new) >= length).long(), -1),
            "answer_mask": (torch.arange(length + new) >= length).expand(2, -1),
        }
        with torch.no_grad(), attending(model):
            inputs = model_inputs(model, ids, mf.masks.positions(whole), policy(whole))
            logits.append(model(**inputs).logits[:, -1])
        ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), 1)
    return ids, torch.stack(logits, 1)


def with_cache(model, read):
    out = model.generate(
        **read, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_logits=True, pad_token_id=0,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize(
    ("family", "attn"),
    [(f, a) for f in ("qwen2", "llama", "mistral", "gemma3") for a in ("sdpa", "eager")],
)
def test_decoding_goes_on_as_if_the_prompt_was_a_context_turn(family, attn, policy):
    model, batch = sharp(family, attn), prompts()
    tokens, logits = without_cache(model, batch, policy)
    got, found = with_cache(model, prefilled(model, batch, policy))
    assert torch.equal(got, tokens)
    # transformers' norms (and eager softmax) are float32: roundings of 6e-8, times the logits.
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()


def test_a_causal_prompt_is_what_generate_itself_reads():
    model, batch = sharp("qwen2", "sdpa"), prompts()
    tokens, logits = with_cache(model, batch)
    got, found = with_cache(model, prefilled(model, batch, mf.masks.causal))
    assert torch.equal(got, tokens)
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()
    _, other = with_cache(model, prefilled(model, batch, mf.masks.context_bidirectional))
    assert (other - logits).abs().max() > 0.01 * logits.abs().max()


def test_a_prompt_of_one_token():
    model, batch = sharp("qwen2", "sdpa"), {"input_ids": torch.tensor([[7]])}
    tokens, logits = with_cache(model, {**batch, "attention_mask": torch.ones(1, 1)})
    for policy in POLICIES:
        got, found = with_cache(model, prefilled(model, batch, policy))
        assert torch.equal(got, tokens) and torch.equal(found, logits)


def test_a_checkpoint_that_says_no_cache():
    """Such as one that was saved after training with use_cache=False."""
    model, batch = sharp("qwen2", "sdpa"), prompts()
    policy = mf.masks.context_bidirectional
    tokens, logits = with_cache(model, prefilled(model, batch, policy))
    model.generation_config.use_cache = False
    got, found = with_cache(model, prefilled(model, batch, policy))
    assert torch.equal(got, tokens) and torch.equal(found, logits)


def test_training_with_checkpointing_keeps_no_cache():
    model, batch = build("qwen2", checkpointing=True), prompts()
    with pytest.raises(ProblemError, match=r"kept no cache of the prompt: call model\.eval\(\)"):
        prefilled(model, batch, mf.masks.context_bidirectional)
    assert "past_key_values" in prefilled(model.eval(), batch, mf.masks.context_bidirectional)


@pytest.mark.parametrize("name", ["qwen3_5", "bloom", "gpt_neo"])
def test_models_with_a_causal_mask_of_their_own(name):
    model, batch = architectures.build(name), prompts()
    # Bloom's rows of padding are NaN in float64, in transformers itself.
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    tokens, logits = with_cache(model, batch)
    got, found = with_cache(model, prefilled(model, batch, mf.masks.causal))
    assert torch.equal(got, tokens) and torch.equal(found, logits)
    with pytest.raises(ProblemError, match="takes no explicit mask"):
        prefilled(model, batch, mf.masks.context_bidirectional)


def test_turns_of_a_longer_chat_are_kept():
    """An earlier answer stays causal: only what the batch says is one turn is bidirectional."""
    model, batch = sharp("qwen2", "sdpa"), prompts()
    turns = torch.where(batch["attention_mask"] != 0, torch.arange(12) // 4, -1)
    chat = {**batch, "turn_ids": turns, "answer_mask": turns == 1}
    policy = mf.masks.context_bidirectional
    first = prefilled(model, batch, policy)["past_key_values"].layers[-1].keys
    second = prefilled(model, chat, policy)["past_key_values"].layers[-1].keys
    assert (first - second).abs().max() > 1e-3


def test_prompts_whose_last_token_does_not_see_them():
    model, batch = build("qwen2"), prompts()
    with pytest.raises(ProblemError, match=r"sliding_window.*must see the whole prompt"):
        prefilled(model, batch, mf.masks.sliding_window(4))
    right = {k: v.flip(1) for k, v in batch.items()}
    with pytest.raises(ProblemError, match="Put padding on the left"):
        prefilled(model, right, mf.masks.causal)


def test_questions_of_evaluations_are_read_under_a_mask():
    """Batches of different lengths answer as one question alone; first words of answers are causal.

    The model is random: that the masks give different answers shows that the mask arrived.
    """
    torch.manual_seed(0)
    model, tokenizer = mf.models.small(["the cat sat on the mat"] * 4, vocab_size=300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.eval().generation_config.eos_token_id = None
    common = {"references": ("x",), "suite": "ruler", "length": 64, "new_tokens": 4}
    common |= {"question": "", "answer": ""}
    items = [
        Item(prompt="the cat " * n, task="niah", answer_prefix=" On", **common) for n in (2, 7, 4)
    ]
    policy = mf.masks.context_bidirectional
    found = answers(model, tokenizer, items, batch_size=3, mask=policy)
    assert found == [answers(model, tokenizer, [item], mask=policy)[0] for item in items]
    assert answers(model, tokenizer, items, mask=mf.masks.causal) == answers(
        model, tokenizer, items
    )
    assert found != answers(model, tokenizer, items)
    for item, text in zip(items, found, strict=True):
        chat = [{"role": "user", "content": item.prompt}]
        question = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        ids = torch.tensor([[*question, *tokenizer.encode(" On")]])
        answer = torch.arange(ids.shape[1])[None] >= len(question)
        batch = {"input_ids": ids, "turn_ids": answer.long(), "answer_mask": answer}
        out = model.generate(
            **prefilled(model, batch, policy), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == text


def test_the_command(tmp_path):
    model, tokenizer = mf.models.small(["the cat sat"], vocab_size=300, hidden_size=64)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ("generate", "--model_name_or_path", tmp_path, "--prompt", "the cat?")
    ran = commands.run(*words, "--mask", "causal, full", "--max_new_tokens", 2, "--system", "be")
    assert ran.code == 0, ran.err
    assert "Qwen2ForCausalLM with" in ran.out
    for name in ("causal", "full"):
        assert f"--- prompt read under the mask {name}:\n" in ran.out
    assert "mask='oval' is unknown" in commands.refused(*words, "--mask", "oval")
    assert "--mask is empty" in commands.refused(*words, "--mask", ",")
