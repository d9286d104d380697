"""Generation depends on the arguments alone: no setting of a checkpoint shows."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError
from metafocus.evals import babilong, builtin_prose, ruler
from metafocus.evals.agentic import LocalEndpoint, TooLong
from metafocus.evals.positions import positions
from metafocus.evals.prompts import chat_text, encode
from metafocus.evals.run import answers, end_tokens, prompt_counter, prompt_text, sample_tokens
from metafocus.evals.thinking import split_thoughts

CHAT = [{"role": "user", "content": "Say something."}]
# Templates of thinking models: Qwen3's closes the thoughts itself, R1's always opens them.
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
ALWAYS = QWEN.partition("{% if")[0] + "{{ '<think>\n' }}"


def words(text):
    return len(text.split())


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(builtin_prose("train").sentences[:200], 700)
    made.add_tokens(["</think>"])
    return made


def build(tokenizer, **changes):
    torch.manual_seed(0)
    config = Qwen2Config(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **changes,
        }
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(tokenizer)


@pytest.fixture(scope="module")
def items(tokenizer):
    return babilong.generate(prompt_counter(tokenizer), task="qa1", length=0, n=3, seed=2)


@pytest.fixture(scope="module")
def greedy(model, tokenizer, items):
    model.generation_config = GenerationConfig()
    return answers(model, tokenizer, items, batch_size=3)


@pytest.fixture(scope="module")
def sampled(model, tokenizer, items):
    model.generation_config = GenerationConfig()
    return draws(model, tokenizer, items)


def draws(model, tokenizer, items):
    ids = encode(prompt_text(items[0], tokenizer), tokenizer)
    return [
        sample_tokens(model, ids, 12, 1.0, ends=end_tokens(model, tokenizer), seed=s)
        for s in range(6)
    ]


GREEDY = {
    "suppress_tokens": lambda first, text: [first],
    "begin_suppress_tokens": lambda first, text: [first],
    "bad_words_ids": lambda first, text: [[first]],
    "sequence_bias": lambda first, text: [[[first], -50.0]],
    "encoder_repetition_penalty": lambda first, text: 3.0,
    "guidance_scale": lambda first, text: 4.0,
    "forced_eos_token_id": lambda first, text: first,
    "forced_bos_token_id": lambda first, text: 7,
    "min_new_tokens": lambda first, text: 15,
    "min_length": lambda first, text: 2000,
    "max_length": lambda first, text: 3,
    "stop_strings": lambda first, text: [text[2:4]],
    "max_time": lambda first, text: 1e-4,
    "penalty_alpha": lambda first, text: 0.6,
    "num_return_sequences": lambda first, text: 2,
    "num_beams": lambda first, text: 4,
    "use_cache": lambda first, text: False,
    "exponential_decay_length_penalty": lambda first, text: (2, 50.0),
    "no_repeat_ngram_size": lambda first, text: 1,
    "repetition_penalty": lambda first, text: 3.0,
    "renormalize_logits": lambda first, text: True,
    "remove_invalid_values": lambda first, text: True,
    "do_sample": lambda first, text: True,
    "return_dict_in_generate": lambda first, text: True,
    "output_scores": lambda first, text: True,
    "cache_implementation": lambda first, text: "static",
    "prompt_lookup_num_tokens": lambda first, text: 3,
    "bos_token_id": lambda first, text: 5,
    "pad_token_id": lambda first, text: 5,
}


@pytest.mark.parametrize("name", GREEDY)
def test_no_setting_of_a_checkpoint_changes_greedy_answers(model, tokenizer, items, greedy, name):
    first = tokenizer.encode(greedy[0])[0]
    model.generation_config = GenerationConfig()
    # Some do not pass the checks of their constructor, but stand in files.
    setattr(model.generation_config, name, GREEDY[name](first, greedy[0]))
    kept = model.generation_config
    assert answers(model, tokenizer, items, batch_size=3) == greedy
    assert model.generation_config is kept  # as it was before


SAMPLING = {
    "min_p": 0.9,
    "typical_p": 0.05,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.5,
    "top_h": 0.2,
    "top_k": 1,
    "top_p": 0.1,
    "temperature": 0.01,
}


@pytest.mark.parametrize("name", SAMPLING)
def test_no_setting_of_a_checkpoint_changes_samples(model, tokenizer, items, sampled, name):
    model.generation_config = GenerationConfig(do_sample=True, **{name: SAMPLING[name]})
    assert draws(model, tokenizer, items) == sampled
    assert len(set(map(tuple, sampled))) > 1


def test_the_cache_is_used_whatever_the_checkpoint_says(model, tokenizer, items):
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["input_ids"].shape[1])

    model.generation_config = GenerationConfig(use_cache=False)
    model.config.use_cache = False
    hook = model.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        answers(model, tokenizer, items[:1])
    finally:
        hook.remove()
        model.config.use_cache = True
    assert seen[0] > 1 and set(seen[1:]) == {1}


def test_a_base_model_is_asked_in_a_plain_form(model):
    bare = train_tokenizer(builtin_prose("train").sentences[:200], 700)
    bare.chat_template = None
    (item,) = ruler.generate(words, task="vt", length=300, n=1)
    text = prompt_text(item, bare)
    assert text == f"User: {item.prompt}\n\nAssistant: {item.answer_prefix}"
    chat = [*CHAT, {"role": "assistant", "content": "Hm."}, *CHAT]
    assert chat_text(chat, bare) == (
        "User: Say something.\n\nAssistant: Hm.\n\nUser: Say something.\n\nAssistant:"
    )
    found = answers(model, bare, babilong.generate(words, task="qa1", length=0, n=2))
    assert len(found) == 2 and not any("\nUser:" in text for text in found)
    assert isinstance(LocalEndpoint(model, bare, new_tokens=4)(CHAT, seed=0), str)


def test_the_first_token_of_a_base_model_is_the_tokenizers_own():
    from tokenizers.processors import TemplateProcessing

    bare = train_tokenizer(["a text"])
    bare.chat_template = None
    bare.bos_token = "<|im_start|>"
    assert encode("a text", bare) == bare.encode("a text")  # it adds none by itself
    bos = ("<|im_start|>", bare.bos_token_id)
    bare.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [bos])
    assert encode("a text", bare) == [bare.bos_token_id, *bare.encode("a text")[1:]]
    plain = bare.encode("a text")[1:]
    eos = (bare.eos_token, bare.eos_token_id)
    bare.bos_token = "<|a begin|>"
    bare.backend_tokenizer.post_processor = TemplateProcessing(f"$A {eos[0]}", None, [eos])
    assert bare.encode("") == [bare.eos_token_id] and encode("a text", bare) == plain


@pytest.mark.parametrize("template", [QWEN, ALWAYS])
def test_templates_of_thinking_models(tokenizer, template):
    tokenizer = train_tokenizer(["a text"])
    tokenizer.chat_template = template
    off, on = (chat_text(CHAT, tokenizer, thinking=flag) for flag in (False, True))
    assert off.endswith("</think>\n\n") and off.count("<think>") == off.count("</think>") == 1
    assert on.endswith("<think>\n") and "</think>" not in on


def test_reasoning_has_a_budget_and_is_no_part_of_an_answer(model, tokenizer, items):
    """The same tokens as by hand: thoughts up to the budget, the tag, the prefix, the answer."""
    model.generation_config = GenerationConfig()
    (item,) = ruler.generate(words, task="vt", length=200, n=1)
    found = answers(model, tokenizer, [item, *items], thinking=9, batch_size=2)
    text = chat_text([{"role": "user", "content": item.prompt}], tokenizer, thinking=True)
    ids = encode(text, tokenizer)
    ends = [*end_tokens(model, tokenizer), tokenizer.convert_tokens_to_ids("</think>")]
    thought = sample_tokens(model, ids, 9, 0.0, ends=ends)
    tail = tokenizer.encode(f"\n</think>\n\n{item.answer_prefix}", add_special_tokens=False)
    row = [*ids, *thought, *tail]
    said = sample_tokens(model, row, item.new_tokens, 0.0, ends=end_tokens(model, tokenizer))
    assert found[0] == split_thoughts(tokenizer.decode(said, skip_special_tokens=True))[1]
    assert not any("</think>" in text for text in found)
    endpoint = LocalEndpoint(model, tokenizer, temperature=0, new_tokens=5, thinking=9)
    thought, said = split_thoughts(endpoint(CHAT, seed=0))
    assert thought and len(tokenizer.encode(thought)) <= 9 + 2  # it may be split otherwise
    assert endpoint(CHAT, seed=0).startswith("<think>")


def test_a_model_without_the_tag_cannot_think(model):
    plain = train_tokenizer(["a text"])
    with pytest.raises(DataError, match="no token </think>"):
        answers(model, plain, babilong.generate(words, task="qa1", length=0, n=1), thinking=5)


def test_prompts_beyond_the_positions_are_refused_without_noise_too(tokenizer):
    small = build(tokenizer, max_position_embeddings=128)
    items = babilong.generate(words, task="qa1", length=0, n=2)
    with pytest.raises(DataError, match=r"babilong qa1 has \d+ tokens .* the 128 positions"):
        answers(small, tokenizer, items)
    assert len(answers(small, tokenizer, items, max_positions=2048)) == 2
    with pytest.raises(TooLong, match="the model 128 positions"):
        LocalEndpoint(small, tokenizer)([{"role": "user", "content": "word " * 200}], seed=0)


def test_positions_of_extended_models():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    for most, found in ((512, 2048), (2048, 2048)):
        config = Qwen2Config(max_position_embeddings=most, rope_parameters={**yarn})
        assert positions(config) == found
    assert positions(Qwen2Config(max_position_embeddings=77)) == 77
