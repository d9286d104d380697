"""The tokens of a rendered chat, and the characters that each of them covers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Any, cast

from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of special and added tokens, of which some end a turn.

    Tokens of white space, which some vocabularies add, are none.
    """
    added = tokenizer.added_tokens_decoder
    ids = {i for i, token in added.items() if token.content.strip()}
    return frozenset(ids.union(tokenizer.all_special_ids))


class Tokens:
    """A text as tokens.

    Attributes:
        ids: the tokens.
        offsets: the characters [start, stop) of each token; None if the tokenizer does not know.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str, encoded: Any, controls: frozenset[int]
    ):
        self._tokenizer, self._text, self._controls = tokenizer, text, controls
        self.ids: list[int] = encoded["input_ids"]
        self.offsets: list[tuple[int, int]] | None = encoded.get("offset_mapping")

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, texts: list[str], controls: frozenset[int]
    ) -> list[Tokens]:
        """Tokenise texts, without adding special tokens."""
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        if tokenizer.is_fast:
            options["return_offsets_mapping"] = True
        encoded: Any = tokenizer(texts, **options)
        return [
            cls(tokenizer, text, {name: values[i] for name, values in encoded.items()}, controls)
            for i, text in enumerate(texts)
        ]

    def before(self, position: int) -> int:
        """Return the number of tokens that end at or before a position of the text.

        Raises:
            DataError: if the tokenizer cannot tell.
        """
        if self.offsets is not None:
            return bisect_right(self.offsets, position, key=lambda offset: offset[1])
        prefix: Any = self._tokenizer(
            self._text[:position], add_special_tokens=False, verbose=False
        )
        ids = list(prefix["input_ids"])
        if ids != self.ids[: len(ids)]:
            raise DataError(
                "the tokenizer merges tokens across the beginning or the end of an answer: use "
                "its fast version, which knows the characters of each token"
            )
        return len(ids)

    def starting_before(self, position: int) -> int:
        """Return the number of tokens that begin before a position of the text."""
        if self.offsets is not None:
            return bisect_left(self.offsets, position, key=lambda offset: offset[0])
        return self.before(position)

    def beginning(self, position: int) -> int:
        """Return the first token of a text that begins at a position.

        A token across the position belongs to that text, but not a control token, which may
        swallow the white space after it.
        """
        i = self.before(position)
        across = self.offsets is not None and i < len(self.ids) and self.offsets[i][0] < position
        return i + (across and self.is_control(i))

    def is_control(self, i: int) -> bool:
        """Return whether a token is a special or added one."""
        return self.ids[i] in self._controls

    def is_space(self, i: int) -> bool:
        """Return whether a token is only white space."""
        if self.offsets is not None and not self.is_control(i):
            start, stop = self.offsets[i]
            return not self._text[start:stop].strip()
        return not self.is_control(i) and not self.name(i).strip()

    def name(self, i: int) -> str:
        """Return the text of a token."""
        return cast(str, self._tokenizer.decode([self.ids[i]]))
