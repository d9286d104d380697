"""Encodes many chats, and keeps those that have an answer to learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metafocus.checks import whole
from metafocus.data import encoding_cache
from metafocus.data.chat import TURNS, Made, Sample, check_max_length, truncate
from metafocus.data.records import Encoders, in_processes
from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = 5  # skipped chats whose reasons are kept


@dataclass(frozen=True)
class Encoded:
    """Samples that have an answer, and what happened to the other chats.

    Attributes:
        samples: dicts of 1-D tensors, as `encode_chat` makes them.
        dropped: the number of chats without an answer to predict.
        truncated: the number of chats that were cut to `max_length`.
        skipped: the number of chats that cannot be encoded.
        reasons: why the first of them cannot, at most five.
        unstopped: the number of trained answers whose last trained token is plain text.
        rewritten: the number of trained answers that the template renders differently at the end
            of a chat.
    """

    samples: Sequence[Sample]
    dropped: int
    truncated: int
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    unstopped: int = 0
    rewritten: int = 0

    def summary(self) -> str:
        """Return what to log: one sentence, and a line for each thing that needs a look."""
        tokens = sum(len(sample["input_ids"]) for sample in self.samples)
        answers = sum(int(sample["answer_mask"].sum()) for sample in self.samples)
        lines = [
            f"{len(self.samples)} samples with {tokens} tokens, {answers} of them answers; "
            f"{self.truncated} truncated, {self.dropped} dropped without an answer."
        ]
        if self.unstopped:
            lines.append(
                f"{self.unstopped} answers end in plain text: the template gives them no stop "
                "token, so the model does not learn to stop there."
            )
        if self.rewritten:
            lines.append(
                f"{self.rewritten} answers are rendered differently at the end of a chat, where "
                "the model gives them: turns='each' (--turns each) trains them as they are there."
            )
        if self.skipped:
            lines.append(skipped_lines("chats", self.skipped, self.reasons))
        return "\n".join(lines)


def skipped_lines(what: str, count: int, reasons: Sequence[str]) -> str:
    """Return what to log of things that were skipped, with the reasons for the first ones."""
    more = [f"  and {count - len(reasons)} more"] if count > len(reasons) else []
    return "\n".join([f"{count} {what} were skipped:", *(f"  {r}" for r in reasons), *more])


def encode_chats(
    records: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    merge_context: bool = True,
    turns: str = "as_rendered",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    strict: bool = False,
    num_proc: int = 1,
    cache_dir: str | Path | None = None,
    progress: bool = False,
    into: Any = None,
) -> Encoded:
    """Encode every chat as `encode_chat` does, and drop those without an answer to predict.

    An answer at the first token does not count, because no token comes before it. A chat that
    cannot be encoded is skipped and counted.

    Args:
        records: dicts with `messages` and optionally `tools` and `chat_template_kwargs`, or of
            another format that `read_chats` knows.
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_length: the largest number of tokens; the rest is cut on the tokenizer's
            `truncation_side`.
        merge_context: whether consecutive non-assistant messages form one turn.
        turns: "as_rendered" trains every answer as it stands in the whole chat. "last" trains only
            the last answer, as the last message of the chat. "each" makes a sample of every
            answer, in which it is the last message, as the model will see it at use.
        chat_template_kwargs: more variables of the template, such as `enable_thinking`; those of a
            record come on top.
        strict: whether to raise for a chat that cannot be encoded.
        num_proc: the number of processes that encode. A script that asks for several needs
            `if __name__ == "__main__"`.
        cache_dir: a directory for the result, under a hash of the records, the tokenizer, the
            settings and the code. Tools that are functions, which cannot be hashed, are not kept.
        progress: whether to show a progress bar.
        into: an empty sequence that the samples are added to, such as one on a disk; None: a list.

    Raises:
        DataError: with `strict`, if a record cannot be encoded (the text has its index); if no
            record has an answer.

    Example:
        >>> from metafocus.data import encode_chats
        >>> from metafocus.data.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["a tiny text"])
        >>> chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        >>> encode_chats([{"messages": chat}, {"messages": chat[:1]}], tokenizer).summary()
        '1 samples with 25 tokens, 3 of them answers; 0 truncated, 1 dropped without an answer.'
    """
    check_max_length(max_length)
    if turns not in TURNS:
        raise DataError(f"turns={turns!r} must be one of {', '.join(TURNS)}")
    if isinstance(records, str | Mapping) or not isinstance(records, Iterable):
        raise DataError(
            f"records is a {type(records).__name__}: pass a list of dicts with messages, as "
            "read_chats returns it"
        )
    whole("num_proc", num_proc, 1, error=DataError)
    arrow = type(records).__module__.partition(".")[0] == "datasets"
    encoders = Encoders(tokenizer, merge_context, chat_template_kwargs, arrow, turns)
    samples = [] if into is None else into
    tally = _Tally(tokenizer, max_length, strict, samples)
    name = None
    if cache_dir is not None:
        records = list(records)
        settings = [max_length, merge_context, turns, chat_template_kwargs, strict, arrow]
        name = encoding_cache.key(records, tokenizer, {"settings": settings})
        found = name and encoding_cache.load(cache_dir, name)
        if found:
            kept, counts = found
            samples.extend(kept)
            return Encoded(samples, **{**counts, "reasons": tuple(counts["reasons"])})
    if num_proc == 1:
        made = encoders.encode(enumerate(records))
    else:
        made = in_processes(encoders, records, num_proc)
    if progress:
        from tqdm import tqdm

        made = tqdm(made, desc="encoding chats", unit="chat")
    for i, one in made:
        tally.add(i, one)
    result = tally.result()
    if cache_dir is not None and name:
        counts = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "samples"}
        encoding_cache.save(
            cache_dir, name, result.samples, {**counts, "reasons": list(result.reasons)}
        )
    return result


class _Tally:
    def __init__(self, tokenizer: Any, max_length: int | None, strict: bool, samples: Any):
        self._side: str = tokenizer.truncation_side
        self._max_length, self._strict = max_length, strict
        self._samples = samples
        self._reasons: list[str] = []
        self._seen = self._dropped = self._truncated = self._cut_off = 0
        self._skipped = self._unstopped = self._rewritten = 0

    def add(self, i: int, made: list[Made] | DataError) -> None:
        self._seen += 1
        if isinstance(made, DataError):
            if self._strict:
                raise DataError(f"record {i}: {made}") from made
            self._skipped += 1
            if len(self._reasons) < NAMED:
                self._reasons.append(f"record {i}: {made}")
            return
        kept = 0
        for full, unstopped, rewritten in made:
            sample = truncate(full, self._max_length, self._side)
            self._truncated += sample is not full
            if sample["answer_mask"][1:].any():
                self._samples.append(sample)
                self._unstopped += unstopped
                self._rewritten += rewritten
                kept += 1
            elif full["answer_mask"][1:].any():
                self._cut_off += 1
        self._dropped += kept == 0

    def result(self) -> Encoded:
        if not self._samples:
            raise DataError(self._nothing())
        return Encoded(
            self._samples,
            self._dropped,
            self._truncated,
            self._skipped,
            tuple(self._reasons),
            self._unstopped,
            self._rewritten,
        )

    def _nothing(self) -> str:
        if self._skipped:
            return (
                f"{self._skipped} of {self._seen} chats cannot be encoded, and the others have no "
                f"answers. {self._reasons[0]}"
            )
        without = self._seen - self._cut_off
        cut = (
            f"{self._cut_off} lost theirs to max_length={self._max_length} on the {self._side} "
            "side: raise max_length or set tokenizer.truncation_side='left'"
        )
        none = (
            f"{without} have no trained assistant message: check the roles and weights of the "
            "messages"
        )
        found = [cut] * (self._cut_off > 0) + [none] * (without > 0 or self._cut_off == 0)
        return f"no answers at all in {self._seen} chats: {'; '.join(found)}"
