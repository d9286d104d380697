"""Shapes of chats and families of chat templates, with the markers that an oracle reads."""

# ruff: noqa: RUF001
from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl
from transformers import AddedToken

from metafocus.data.tokenizer import train_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
_BASE = train_tokenizer(["one two three four five six hello there what how x y z go"] * 9, 330)


def user(text, **more):
    return {"role": "user", "content": text, **more}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(arguments, name="look_up", **more):
    calls = [{"type": "function", "id": "c1", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": "", "tool_calls": calls, **more}


def result(text):
    return {"role": "tool", "content": text, "tool_call_id": "c1", "name": "look_up"}


def parts(message):
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


SYSTEM = {"role": "system", "content": "hello system"}
PAIR = [user("what one"), answer("two one")]
PAIRS = [*PAIR, user("how three"), answer("four three")]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "finds",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "which"}},
            },
        },
    }
]

SHAPES: dict[str, list[dict[str, Any]]] = {
    "one pair": PAIR,
    "system": [SYSTEM, *PAIR],
    "two pairs": PAIRS,
    "system and three pairs": [SYSTEM, *PAIRS, user("go x"), answer("six y")],
    "first answer has weight 0": [user("what"), answer("no no", weight=0), *PAIRS[2:]],
    "last answer has weight 0": [*PAIR, user("what"), answer("no no", weight=0)],
    "train is false": [user("what"), answer("no no", train=False), *PAIRS[2:]],
    "ends with a question": [*PAIRS, user("how five")],
    "two answers in a row": [*PAIR, answer("three more")],
    "weight 0, then an answer": [user("what"), answer("no no", weight=0), answer("yes yes")],
    "two questions in a row": [user("what one"), *PAIRS],
    "empty answer": [user("what"), answer(""), *PAIRS[2:]],
    "white space at the ends": [user(" what \n"), answer("\n one\n"), user("how"), answer(" two ")],
    "lines, emoji, code": [user("a\n\n\nb"), answer("x 🙂\n\n```\n  y\n```"), *PAIRS],
    "all contents are the same": [user("one"), answer("one"), user("one"), answer("one")],
    "parts": [parts(m) for m in [SYSTEM, *PAIRS]],
    "parts and strings": [PAIRS[0], parts(PAIRS[1]), *PAIRS[2:]],
    "developer": [{"role": "developer", "content": "hello developer"}, *PAIR],
    "reasoning in every answer": [
        user("what"),
        answer("one", reasoning_content="think x"),
        user("how"),
        answer("two", reasoning_content="think y"),
    ],
    "reasoning in the content": [user("what"), answer("<think>\nthink z\n</think>\n\nthree")],
    "thinking": [user("what"), answer("one", thinking="think x")],
    "names": [user("what", name="Ann"), answer("one", name="Bob")],
    "a call with an object": [user("go"), call({"word": "five"}), result("six"), answer("done x")],
    "a call with JSON text": [
        user("go"),
        call('{"word": "five"}'),
        result("six"),
        answer("done x"),
    ],
    "two calls, numbers": [
        user("go"),
        call({"word": "five", "n": 3}),
        result("six"),
        call({"word": "six", "n": 41}),
        result("seven"),
        answer("done y"),
    ],
    "a call that is not trained": [
        user("go"),
        call({"word": "five"}, weight=0),
        result("six"),
        answer("done x"),
    ],
    "a call at the end": [user("go"), call({"word": "five"})],
    "starts with an answer": [answer("hello one"), *PAIRS],
    "nulls of Arrow": [
        {"role": "user", "content": "go", "tool_calls": None, "name": None},
        {**call({"word": "five", "other": None}), "name": None},
        {"role": "tool", "content": "six", "tool_calls": None, "name": None},
        {"role": "assistant", "content": "done x", "tool_calls": None, "name": None},
    ],
}
WITH_TOOLS = [name for name in SHAPES if "call" in name or "Arrow" in name]


@dataclass
class Family:
    """What an oracle needs to know of a template: the markers of an answer.

    Attributes:
        head: what stands before an answer, and is not trained; a regular expression.
        body: the rest of an answer with its stop token, which is trained; a regular expression.
        eos: the token that ends a text.
        control: a regular expression for the control tokens, each a token of its own.
        template: the text, or "" for the file of trl with the name before an @.
        ordinary: control tokens that are added as ordinary ones.
        rstrip: control tokens that swallow the white space after them.
    """

    head: str
    body: str
    eos: str
    control: str = r"<\|[^<>|\n']{1,40}\|>"
    template: str = ""
    ordinary: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()

    def tokenizer(self, name: str) -> Any:
        """Return a tokenizer with the template and its control tokens."""
        made = copy.deepcopy(_BASE)
        template = self.template or (TEMPLATES / f"{name.split('@')[0]}.jinja").read_text("utf-8")
        found = sorted({*re.findall(self.control, template), *self.rstrip} - {*self.ordinary})
        tokens = [AddedToken(t, special=True, rstrip=t in self.rstrip) for t in found]
        made.add_special_tokens({"additional_special_tokens": tokens})
        made.add_special_tokens({"eos_token": self.eos, "bos_token": "<bos>"})
        made.add_tokens([AddedToken(t, special=False) for t in self.ordinary])
        made.chat_template = template
        return made

    def answers(self, text: str) -> list[tuple[int, int]]:
        """Return where the answers stand in a rendered chat, without their headers."""
        found, position = [], 0
        while head := re.compile(self.head).search(text, position):
            body = re.compile(self.body, re.DOTALL).match(text, head.end())
            assert body, text[head.start() : head.start() + 80]
            found.append(body.span())
            # The end of one answer may be the header of the next.
            position = max(body.end() - len(self.eos), head.end())
        return found


_IM = r".*?<\|im_end\|>"
_PIPES = r"<\|[^<>|\n']{1,40}\|>|</?tool_call>|</?think>|</?tool_response>"


def _im(head: str = "", **more: Any) -> Family:
    return Family(r"<\|im_start\|>assistant\n" + head, _IM, "<|im_end|>", _PIPES, **more)


_LLAMA = Family(
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", r".*?<\|eot_id\|>", "<|eot_id|>"
)
_COHERE = r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>"
_DEEPSEEK = Family(
    r"<｜Assistant｜>|<｜tool▁outputs▁end｜>",
    r".*?<｜end▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    r"<｜[^<>｜]{1,40}｜>|</?think>",
)
_GEMMA = Family(
    r"<start_of_turn>model\n", r".*?<end_of_turn>", "<end_of_turn>", r"<(?:start|end)_of_turn>"
)
_GEMMA4 = Family(
    r"<\|turn>model\n(?!\Z)|<tool_response\|>(?:<\|turn>model\n)?(?=.)|<turn\|>\n(?=[^<])",
    r".*?(?:<turn\|>|<tool_call\|>(?:<\|tool_response>|<turn\|>))",
    "<turn|>",
    r"<\|?[a-z_]+\|?>|<\|\"\|>",
)
_VISION = Family(
    r"(?<=[\n>])Assistant:", r".*?<end_of_utterance>", "<end_of_utterance>", "<end_[a-z_]+>"
)
_GPT_OSS = Family(
    r"<\|start\|>assistant",
    r"(?:<\|channel\|>analysis<\|message\|>.*?<\|end\|><\|start\|>assistant)?"
    r".*?(?:<\|return\|>|<\|call\|>|<\|end\|>)",
    "<|return|>",
)
_MUSE = Family(
    r"<\|start\|>assistant",
    r"(?: to=self<\|message\|>.*?<\|eom\|><\|start\|>assistant)?.*?<\|eot\|>",
    "<|eot|>",
)
_LLAVA = Family(
    r"\A ?(?=[^\[]*</s>)|\[/INST\] ?(?=[^\[]*</s>)|(?<=</s>) (?!\[)(?=.)",
    r".*?</s>",
    "</s>",
    r"</s>|\[/?INST\]",
)
_GLM = (
    r"(?:(?!<\|assistant\|>).)*?"
    r"(?:<\|user\|>|<\|observation\|>|<\|system\|>|(?=<\|assistant\|>)|\Z)"
)
# What the generation prompt opens of the reasoning is no part of an answer without marks.
_THOUGHT = r"(?:<think>\n?)?"

FAMILIES: dict[str, Family] = {
    "cohere": Family(_COHERE, r".*?<\|END_OF_TURN_TOKEN\|>", "<|END_OF_TURN_TOKEN|>"),
    "cohere_training": Family(_COHERE, r".*?<\|END_OF_TURN_TOKEN\|>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": Family(
        _COHERE + r"<\|START_RESPONSE\|>", r".*?<\|END_OF_TURN_TOKEN\|>", "<|END_OF_TURN_TOKEN|>"
    ),
    "cohere2_training": Family(
        _COHERE + r"<\|START_RESPONSE\|>", r".*?<\|END_OF_TURN_TOKEN\|>", "<|END_OF_TURN_TOKEN|>"
    ),
    "deepseek_r1_distill": _DEEPSEEK,
    "deepseek_r1_distill_training": _DEEPSEEK,
    "deepseekv3": _DEEPSEEK,
    "deepseekv3_training": _DEEPSEEK,
    "gemma": _GEMMA,
    "gemma_training": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_training": _GEMMA,
    "gemma4": _GEMMA4,
    "gemma4_v2": _GEMMA4,
    "gemma4_v3": _GEMMA4,
    "glm4moe": Family(r"<\|assistant\|>", _GLM, "<|endoftext|>"),
    "glm4moe_training": Family(r"<\|assistant\|>", _GLM, "<|endoftext|>"),
    "gptoss": _GPT_OSS,
    "gptoss_training": _GPT_OSS,
    "idefics3": _VISION,
    "idefics3_training": _VISION,
    "smolvlm": _VISION,
    "smolvlm_training": _VISION,
    "lfm2": _im(),
    "lfm2_training": _im(),
    "lfm2_v2": _im(),
    "lfm2_v2_training": _im(),
    "lfm2_2_5": _im(),
    "lfm2_2_5_v2": _im(),
    "lfm2_2_5_vl": _im(),
    "llama3": _LLAMA,
    "llama3_training": _LLAMA,
    "llama3_1": _LLAMA,
    "llama3_2": _LLAMA,
    "llava_next": _LLAVA,
    "llava_next_training": _LLAVA,
    "muse_glimmer": _MUSE,
    "muse_glimmer_training": _MUSE,
    **{
        f"nemotron_{size}{training}": _im("" if training else _THOUGHT)
        for size in ("3_nano", "3_super", "3_ultra", "3_5_lightning")
        for training in ("", "_training")
    },
    "phi3": Family(r"<\|assistant\|>\n", r".*?<\|end\|>(?:\n<\|endoftext\|>)?", "<|endoftext|>"),
    "phi3_training": Family(
        r"<\|assistant\|>\n", r".*?<\|end\|>(?:\n<\|endoftext\|>)?", "<|endoftext|>"
    ),
    "phi3_5": Family(r"<\|assistant\|>\n", r".*?<\|end\|>(?:\n<\|endoftext\|>)?", "<|endoftext|>"),
    "phi3_5_training": Family(
        r"<\|assistant\|>\n", r".*?<\|end\|>(?:\n<\|endoftext\|>)?", "<|endoftext|>"
    ),
    "qwen2_5": _im(),
    "qwen2_5_training": _im(),
    "qwen2_5_vl": _im(),
    "qwen2_5_vl_training": _im(),
    "qwen3": _im(),
    "qwen3_training": _im(),
    "qwen3_instruct_2507": _im(),
    "qwen3_instruct_2507_training": _im(),
    "qwen3_vl": _im(),
    "qwen3_vl_training": _im(),
    **{f"qwen3_{v}": _im(_THOUGHT) for v in ("5_think", "6", "8")},
    "qwen3_5_nothink": _im(r"(?:<think>\n(?:\n</think>\n\n)?)?"),
    **{f"qwen3_{v}_training": _im() for v in ("5_think", "5_nothink", "6", "8")},
    "phi3@tokens that swallow white space": Family(
        r"<\|assistant\|>\n?",
        r".*?<\|end\|>(?:\n?<\|endoftext\|>)?",
        "<|endoftext|>",
        rstrip=("<|user|>", "<|assistant|>", "<|end|>", "<|system|>", "<|endoftext|>"),
    ),
    "qwen2_5@ordinary tokens": _im(ordinary=("<|im_start|>", "<|im_end|>")),
    "llama3@ordinary tokens": Family(
        _LLAMA.head, _LLAMA.body, "<|endoftext|>", ordinary=("<|eot_id|>",)
    ),
    "own: the generation prompt is always there": Family(
        r"<\|S\|><\|assistant\|>(?!\Z)",
        r".*?<\|E\|>",
        "<|E|>",
        r"<\|[SE]\|>",
        "{% for m in messages %}<|S|><|{{ m.role }}|>{{ m.content }}<|E|>{% endfor %}"
        "<|S|><|assistant|>",
    ),
    "own: another token at the end of a chat": Family(
        r"<\|of\|>assistant\n",
        r".*?(?:<\|next\|>|<\|stop\|>)",
        "<|stop|>",
        template="{% for m in messages %}<|of|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|stop|>' if loop.last and m.role == 'assistant' else '<|next|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|of|>assistant\n{% endif %}",
    ),
    "own: no stop token": Family(
        r"### assistant:\n",
        r".*?(?=\n\n### |\n\n\Z)",
        "<|endoftext|>",
        template="{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    ),
    "own: the next message stops": Family(
        r"<\|assistant\|>",
        r"(?:(?!<\|).)*(?:<\|user\|>|<\|system\|>|<\|tool\|>|)",
        "<|endoftext|>",
        r"<\|[a-z]+\|>",
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        "{# <|user|> <|assistant|> <|system|> <|tool|> <|developer|> #}",
    ),
    "own: names, and text before the messages": Family(
        r"<\|im_start\|>assistant(?:=\w+)?\n",
        _IM,
        "<|im_end|>",
        template="{{ bos_token }}today {{ strftime_now('%Y') }}\n{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + ('=' + m.name if m.name else '') + '\n' }}"
        "{{ m.content | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
}
