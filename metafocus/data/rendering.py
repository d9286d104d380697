"""Renders chats with a tokenizer's chat template, in the form of messages that it understands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from metafocus.data.fences import Located, locate, with_marks
from metafocus.data.limits import OutOfTimeError, limited
from metafocus.data.messages import Message
from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys for metafocus, which the chat template must not see.
_OWN_KEYS = ("weight", "train", "evidence")
_SECONDS, _MEGABYTES = 10.0, 2048
# What metafocus itself passes to apply_chat_template.
_TAKEN = (
    "add_generation_prompt, chat_template, continue_final_message, conversation, max_length, "
    "padding, return_assistant_tokens_mask, return_dict, return_tensors, tokenize, "
    "tokenizer_kwargs, tools, truncation"
).split(", ")


class Form(NamedTuple):
    """How messages are put before they are rendered.

    Attributes:
        content: "strings", or "parts" of type text.
        arguments: of tool calls, "objects" or "json" text.
        missing: whether a message with calls and without content gets an empty one.
    """

    content: str = "strings"
    arguments: str = "objects"
    missing: bool = False

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return the messages in this form, without the keys for metafocus and without nulls."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> dict[str, Any]:
        out = {k: v for k, v in message.items() if k not in _OWN_KEYS and v is not None}
        if self.missing:
            out.setdefault("content", "")
        content = out.get("content")
        if self.content == "strings" and isinstance(content, list):
            out["content"] = "".join(p if isinstance(p, str) else p["text"] for p in content)
        elif self.content == "parts" and isinstance(content, str):
            out["content"] = [{"type": "text", "text": content}]
        if out.get("tool_calls"):
            out["tool_calls"] = [self._call(call) for call in out["tool_calls"]]
        return out

    def _call(self, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"])}
        arguments = call.get("arguments")
        if self.arguments == "objects" and isinstance(arguments, str):
            return {**call, "arguments": _decoded(arguments)}
        if self.arguments == "json" and isinstance(arguments, Mapping):
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return call


def forms(messages: Sequence[Message]) -> Iterator[Form]:
    """Yield the forms in which a template may understand the messages, the usual one first."""
    calls = any(message.get("tool_calls") for message in messages)
    missing = any(message.get("content") is None for message in messages)
    for empty in (False, True) if missing else (False,):
        for content in ("strings", "parts"):
            for arguments in ("objects", "json") if calls else ("objects",):
                yield Form(content, arguments, empty)


def _decoded(arguments: str) -> Any:
    # OpenAI's API gives the arguments as the JSON text of an object.
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


class Renderer:
    """A tokenizer's chat template with fixed settings.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        variables: more variables for the template, such as `enable_thinking`.
        template: instead of the tokenizer's own.

    Raises:
        DataError: if there is no chat template, or if a variable has a taken name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any] | None = None,
        template: str | None = None,
    ):
        if not hasattr(tokenizer, "apply_chat_template"):
            raise DataError(
                f"tokenizer is a {type(tokenizer).__name__}: pass a Hugging Face tokenizer, such "
                "as AutoTokenizer.from_pretrained(name)"
            )
        if not (template or tokenizer.chat_template):
            raise DataError(
                "the tokenizer has no chat template: load the tokenizer of the chat model, or set "
                "tokenizer.chat_template (metafocus.data.tokenizer.CHATML is one)"
            )
        if variables is not None and not isinstance(variables, Mapping):
            raise DataError(
                f"chat_template_kwargs={variables!r:.80} is not a dict: pass names and values"
            )
        self.tokenizer: Any = tokenizer
        self._own = template
        self.variables: dict[str, Any] = dict(variables or {})
        taken = [name for name in self.variables if name in _TAKEN]
        if taken:
            raise DataError(
                f"chat_template_kwargs={{{taken[0]!r}: ...}} is not a variable of a template: "
                "remove it, metafocus passes it itself"
            )
        self._templates: dict[tuple[bool, tuple[str, str] | None], str] = {}

    def template(self, tools: list[Any] | None, marks: tuple[str, str] | None = None) -> str:
        """Return the template for chats with or without tools.

        Args:
            tools: function descriptions.
            marks: characters to put at both ends of what the template marks as generated.

        Raises:
            DataError: if the tokenizer has several templates and no default.
        """
        key = (bool(tools), marks)
        if key not in self._templates:
            try:
                found = self._own or self.tokenizer.get_chat_template(tools=cast(Any, tools))
                text = cast(str, found)
            except ValueError as error:
                raise DataError(f"the tokenizer has no default chat template: {error}") from error
            self._templates[key] = text if marks is None else with_marks(text, *marks)
        return self._templates[key]

    def text(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        *,
        prompt: bool = False,
        marks: tuple[str, str] | None = None,
    ) -> str:
        """Return the text that the template makes of messages.

        Args:
            messages: in the form for the template.
            tools: function descriptions.
            prompt: whether the text ends with the header of the next answer.
            marks: characters to put at both ends of what the template marks as generated.

        Raises:
            DataError: if the template refuses the chat, or takes too long or too much memory.
        """
        template = self.template(tools, marks)
        try:
            with limited(_SECONDS, _MEGABYTES):
                text = self.tokenizer.apply_chat_template(
                    cast(Any, messages),
                    chat_template=template,
                    tools=cast(Any, tools),
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **self.variables,
                )
        except self._errors as error:
            raise DataError(
                f"the chat template refuses these messages ({error}): change the order or the "
                f"roles ({', '.join(m['role'] for m in messages)}) to what the template accepts"
            ) from error
        except (OutOfTimeError, MemoryError, OverflowError, RecursionError) as error:
            limit = f"{_SECONDS:.0f} s" if isinstance(error, OutOfTimeError) else "2 GB of memory"
            raise DataError(
                f"the chat template needs more than {limit} for {len(messages)} messages: look "
                "for an endless loop or a repeated string in it"
            ) from None
        return cast(str, text)

    def located(
        self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool = False
    ) -> Located | None:
        """Return the rendering of messages with the places of their texts, if they can be found."""
        text = self.text(messages, tools, prompt=prompt)
        return locate(partial(self._fenced, prompt), messages, tools, text)

    def _fenced(
        self,
        prompt: bool,
        messages: Sequence[Message],
        tools: list[Any] | None,
        marks: tuple[str, str],
    ) -> str:
        return self.text(messages, tools, prompt=prompt, marks=marks)

    @cached_property
    def _errors(self) -> tuple[type[Exception], ...]:
        import jinja2

        # Templates raise the first on purpose, and the others if they add a string to a list or
        # look for a key that is not there. transformers raises ValueError for tools that it cannot
        # describe.
        return jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError
