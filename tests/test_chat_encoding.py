"""Encoding many chats: cost, processes, the cache on disk, limits of rendering, turns."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from chat_shapes import FAMILIES, PAIRS, SYSTEM, answer, user

from metafocus.data import encode_chat, encode_chats
from metafocus.data.limits import OutOfTimeError, limited
from metafocus.data.rendering import Renderer
from metafocus.data.tokenizer import CHATML, train_tokenizer
from metafocus.errors import DataError


@pytest.fixture
def small():
    return train_tokenizer(["hello there"], 270)


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def renderings(monkeypatch, run):
    """The number of messages that a template renders while `run` runs."""
    counts = []
    text = Renderer.text

    def counted(self, messages, *args, **options):
        counts.append(len(messages))
        return text(self, messages, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Renderer, "text", counted)
        run()
    return sum(counts)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "glm4moe", "gptoss", "phi3", "deepseekv3"])
def test_encoding_is_linear_in_the_turns(monkeypatch, name):
    tokenizer = FAMILIES[name].tokenizer(name)
    costs = [
        renderings(monkeypatch, lambda n=n: encode_chat(PAIRS * n, tokenizer)) for n in (20, 80)
    ]
    # Each message is rendered twice, with fences and without. The last answer of Qwen3 looks
    # different, so the chat before it is rendered four more times. A cost that grows with the
    # square would be a hundred times this.
    assert costs[1] - costs[0] <= 6 * 60 * len(PAIRS)


def test_two_renderings_a_chat(monkeypatch, small):
    def cost(n):
        return renderings(monkeypatch, lambda: encode_chats([{"messages": PAIRS}] * n, small))

    assert cost(30) - cost(10) == 20 * 2 * len(PAIRS)


def test_several_processes_give_the_same(small):
    records = [{"messages": [SYSTEM, user(f"what {i}"), answer("x " * i)]} for i in range(300)]
    records[7] = {"messages": [{"role": "bot", "content": "a"}]}
    one = encode_chats(records, small)
    two = encode_chats(records, small, num_proc=2)
    same(one.samples, two.samples)
    assert (two.skipped, two.reasons) == (1, one.reasons)
    with pytest.raises(DataError, match=r"num_proc must be .* got 0"):
        encode_chats(records, small, num_proc=0)


# --- the cache -----------------------------------------------------------------------------------


def test_the_cache_gives_the_same(monkeypatch, tmp_path, small):
    evidence = {"messages": [user("abc", evidence=[[0, 2]]), answer("b")]}
    records = [{"messages": PAIRS}, evidence, {"messages": [{"role": "bot", "content": "a"}]}]
    first = encode_chats(records, small, cache_dir=tmp_path / "new")
    cost = renderings(
        monkeypatch, lambda: same(
            first.samples, encode_chats(records, small, cache_dir=tmp_path / "new").samples
        )
    )  # fmt: skip
    assert cost == 0
    again = encode_chats(records, small, cache_dir=tmp_path / "new")
    assert dataclasses.replace(again, samples=[]) == dataclasses.replace(first, samples=[])
    (file,) = (tmp_path / "new").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    same(first.samples, encode_chats(records, small, cache_dir=tmp_path / "new").samples)


def test_everything_that_changes_the_result_is_in_the_key(tmp_path, small):
    records = [{"messages": PAIRS}]
    other = train_tokenizer(["hello there, other"], 275)
    closed = train_tokenizer(["hello there"], 270)
    closed.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    left = train_tokenizer(["hello there"], 270)
    left.truncation_side = "left"
    runs = [
        lambda **k: encode_chats(records, small, **k),
        lambda **k: encode_chats([{"messages": PAIRS[2:]}], small, **k),
        lambda **k: encode_chats(records, small, merge_context=False, **k),
        lambda **k: encode_chats(records, small, max_length=30, **k),
        lambda **k: encode_chats(records, left, max_length=30, **k),
        lambda **k: encode_chats(records, small, turns="each", **k),
        lambda **k: encode_chats(records, small, chat_template_kwargs={"a": 1}, **k),
        lambda **k: encode_chats(records, other, **k),
        lambda **k: encode_chats(records, closed, **k),
    ]
    for _ in range(2):
        for run in runs:
            same(run(cache_dir=tmp_path).samples, run().samples)
    assert len(list(tmp_path.iterdir())) == len(runs)


def test_what_cannot_be_hashed_is_not_kept(tmp_path, small):
    def tick(word: str) -> str:
        """Ticks.

        Args:
            word: which
        """
        return word

    records = [{"messages": PAIRS, "tools": [tick]}]
    found = encode_chats(records, small, cache_dir=tmp_path)
    assert "tick" in small.decode(found.samples[0]["input_ids"])
    assert list(tmp_path.iterdir()) == []


# --- limits --------------------------------------------------------------------------------------

ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{{ messages[0].content }}"
)


def test_an_endless_template_is_stopped(monkeypatch, small):
    monkeypatch.setattr("metafocus.data.rendering._SECONDS", 0.2)
    small.chat_template = ENDLESS
    with pytest.raises(DataError, match=r"needs more than .* s for 2 messages.*endless loop"):
        encode_chat(PAIRS[:2], small)


@pytest.mark.parametrize("size", ["10**10", "10**30", "messages[0].content | length * 10**10"])
def test_a_template_that_needs_all_memory_is_stopped(small, size):
    small.chat_template = "{{ 'x' * (" + size + ") }}{{ messages[0].content }}"
    with pytest.raises(DataError, match=r"needs more than 2 GB of memory.*repeated string"):
        encode_chat(PAIRS[:2], small)


def test_the_limits_end_with_the_block():
    with pytest.raises(OutOfTimeError), limited(0.05, 1000):
        while True:
            pass
    with pytest.raises(MemoryError), limited(5, 64):
        bytearray(2**28)
    assert len(bytearray(2**28)) == 2**28
    done = []

    def elsewhere():
        with limited(0.001, 1):
            done.append(sum(range(10**5)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [sum(range(10**5))]


# --- turns, variables ----------------------------------------------------------------------------

THOUGHTS = [
    user("what"),
    answer("one", reasoning_content="think x"),
    user("how"),
    answer("two", reasoning_content="think y"),
]


def trained(sample, tokenizer):
    return tokenizer.decode(sample["input_ids"][sample["answer_mask"]])


def test_each_answer_as_the_last_message_of_its_own_chat():
    tokenizer = FAMILIES["qwen3"].tokenizer("qwen3")
    record = [{"messages": THOUGHTS}]
    with pytest.raises(DataError, match=r"rewrites history.*reasoning of message 1.*turns='each'"):
        encode_chats(record, tokenizer)
    found = encode_chats(record, tokenizer, turns="each")
    assert [trained(sample, tokenizer) for sample in found.samples] == [
        "<think>\nthink x\n</think>\n\none<|im_end|>",
        "<think>\nthink y\n</think>\n\ntwo<|im_end|>",
    ]
    for sample, n in zip(found.samples, (2, 4), strict=True):
        assert tokenizer.decode(sample["input_ids"]) == tokenizer.apply_chat_template(
            THOUGHTS[:n], tokenize=False
        )
    last = encode_chats(record, tokenizer, turns="last")
    same(last.samples, found.samples[1:])
    same(last.samples, [encode_chat([*THOUGHTS, user("more")], tokenizer, turns="last")])
    with pytest.raises(DataError, match="turns='each' must be one of as_rendered, last"):
        encode_chat(THOUGHTS, tokenizer, turns="each")
    with pytest.raises(DataError, match="turns='all' must be one of as_rendered, last, each"):
        encode_chats(record, tokenizer, turns="all")


def test_answers_that_are_rendered_otherwise_are_counted():
    tokenizer = FAMILIES["qwen3"].tokenizer("qwen3")
    found = encode_chats([{"messages": PAIRS}], tokenizer)
    assert (found.rewritten, found.unstopped) == (1, 0)
    assert "1 answers are rendered differently at the end of a chat" in found.summary()
    assert encode_chats([{"messages": PAIRS}], tokenizer, turns="each").rewritten == 0


def test_answers_without_a_stop_token_are_counted():
    tokenizer = FAMILIES["glm4moe"].tokenizer("glm4moe")
    found = encode_chats([{"messages": PAIRS}] * 3, tokenizer)
    assert (found.rewritten, found.unstopped) == (0, 3)
    assert "3 answers end in plain text" in found.summary()


def test_variables_reach_the_template():
    tokenizer = FAMILIES["glm4moe"].tokenizer("glm4moe")
    records = [
        {"messages": PAIRS[:2], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": PAIRS[:2]},
    ]
    first, second = encode_chats(records, tokenizer).samples
    assert "what one/nothink" in tokenizer.decode(first["input_ids"])
    assert "nothink" not in tokenizer.decode(second["input_ids"])
    both = encode_chats(
        records[1:], tokenizer, chat_template_kwargs={"enable_thinking": False}
    )  # fmt: skip
    same(both.samples, [first])
    one = encode_chat(
        PAIRS[:2], tokenizer, chat_template_kwargs={"enable_thinking": False}
    )  # fmt: skip
    same([one], [first])
    with pytest.raises(DataError, match=r"'tokenize': \.\.\.} is not a variable"):
        encode_chat(PAIRS, tokenizer, chat_template_kwargs={"tokenize": 1})
    with pytest.raises(DataError, match="chat_template_kwargs=3 is not a dict"):
        encode_chat(PAIRS, tokenizer, chat_template_kwargs=3)  # pyright: ignore


def test_a_refusal_names_the_template_that_helps():
    tokenizer = FAMILIES["deepseek_r1_distill"].tokenizer("deepseek_r1_distill")
    thought = [user("what"), answer("<think>\nhm\n</think>\n\none")]
    with pytest.raises(DataError, match=r"drops the reasoning.*r1_distill_training\.jinja"):
        encode_chat(thought, tokenizer)
    developer = [{"role": "developer", "content": "be"}, *PAIRS]
    qwen = FAMILIES["qwen2_5"].tokenizer("qwen2_5")
    with pytest.raises(DataError, match=r"developer.*'be'.*give it the role system") as caught:
        encode_chat(developer, qwen)
    assert "training" not in str(caught.value)
