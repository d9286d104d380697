"""Makes chats from the documentation of Python's standard library, real text on every machine.

The source files of the running interpreter are parsed and never imported. Each public function,
class or method with a proper docstring becomes an entry. A chat shows the documentation of many
functions and asks what one of them does. The answer is the summary line of its docstring. Each
module belongs either to the training split or to the held-out split.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metafocus.checks import whole
from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "heldout")

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages"}
_SENTENCE = re.compile(r"(?=(?:\S+ ){3})[A-Z][ -~]{18,158}\.")  # at least four ASCII words
_JUNK = ("Internal", "Deprecated", "Undocumented", "See ", "Same as ", "Test ")
_LONGEST = 800  # characters of one entry, so that a context has many entries
_HEADING = "Documentation of Python functions:"
_GAP = "\n\n"
_MISSES = 50  # a context is full after this many entries in a row that do not fit


@dataclass(frozen=True)
class Entry:
    """One documented function, class or method."""

    module: str
    name: str
    summary: str
    text: str


def generate(
    tokenizer: PreTrainedTokenizerBase | Callable[[str], int],
    *,
    split: str = "train",
    n: int,
    context_tokens: int,
    turns: int = 1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make `n` chats that ask about functions documented in the first user message.

    The first user message with its question has about `context_tokens` tokens, and never more. The
    tokens of the chat template are not counted. The functions in the questions are at uniformly
    random positions among the others, and all functions are from the same split. Each further turn
    asks about another function of the same documentation.

    A record has three entries. `messages`: the first message has `evidence`, the character spans of
    the summaries that are asked for. `asked`: the names of these functions, in the order of the
    questions. `depth`: where each of them begins in the documentation, from 0 to 1.

    The same interpreter, tokenizer and seed give the same chats. Chat i does not depend on `n`.

    Args:
        tokenizer: a tokenizer, or a function that counts the tokens of a string.
        split: "train" or "heldout"; about a fifth of the modules is held out.
        n: the number of chats.
        context_tokens: the length of the first user message.
        turns: the number of questions in a chat.
        seed: selects the chats.

    Raises:
        DataError: if the split is unknown, if `n` or `turns` is below 1, or if `context_tokens` is
            too small for the evidence or too large for the split.

    Example:
        >>> from metafocus.data.stdlib_qa import generate
        >>> chat, = generate(lambda text: len(text.split()), n=1, context_tokens=200)
        >>> [message["role"] for message in chat["messages"]]
        ['user', 'assistant']
        >>> (start, stop), = chat["messages"][0]["evidence"]
        >>> chat["messages"][0]["content"][start:stop] == chat["messages"][1]["content"]
        True
    """
    whole("n", n, 1, error=DataError)
    whole("turns", turns, 1, error=DataError)
    available = entries(split)
    count = lru_cache(maxsize=None)(_counter(tokenizer))
    return [
        _chat(available, random.Random(f"{split} {seed} {i}"), count, context_tokens, turns, split)
        for i in range(n)
    ]


def texts(split: str | None = "train") -> list[str]:
    """Return the documentation texts of a split (None: of both), to train a tokenizer.

    Raises:
        DataError: if the split is unknown.
    """
    chosen = SPLITS if split is None else (split,)
    return [entry.text for part in chosen for entry in entries(part)]


def entries(split: str) -> tuple[Entry, ...]:
    """Return all entries of a split, in the order of their modules.

    Raises:
        DataError: if the split is unknown, or if the interpreter has no sources of its library.
    """
    if split not in SPLITS:
        raise DataError(f"split={split!r} is unknown: use one of {', '.join(SPLITS)}")
    return tuple(entry for entry in _parse_library() if _split_of(entry.module) == split)


def _split_of(module: str) -> str:
    # Modules are grouped by their top-level name, because submodules document the same functions.
    name = "metafocus:" + module.partition(".")[0]
    held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 5 == 0
    return "heldout" if held_out else "train"


@lru_cache(maxsize=1)
def _parse_library() -> tuple[Entry, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Entry] = {}
    summaries: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library
        for path in _sources(root):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            module = module.removesuffix(".__init__")
            for name, node in _public(ast.parse(path.read_bytes()), module + "."):
                entry = _entry(module, name, node)
                # Each question has one answer and each answer one question, over both splits.
                if entry and name not in found and entry.summary.lower() not in summaries:
                    found[name] = entry
                    summaries.add(entry.summary.lower())
    if not found:
        raise DataError(
            f"no documented Python source under {root}: use an interpreter whose standard library "
            "is installed as .py files with docstrings"
        )
    return tuple(found.values())


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("_") and path.name != "__init__.py":
            continue
        if path.suffix == ".py":
            yield path
        elif path.name not in _SKIPPED and (path / "__init__.py").is_file():
            yield from _sources(path)


_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Documented]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Documented) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{prefix}{child.name}.")


def _entry(module: str, name: str, node: _Documented) -> Entry | None:
    first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
    summary = " ".join(first.split())
    if not _SENTENCE.fullmatch(summary) or summary.startswith(_JUNK) or ">>>" in summary:
        return None
    is_class = isinstance(node, ast.ClassDef)
    signature = f"class {name}" if is_class else f"{name}({ast.unparse(node.args)})"
    text = f"{signature}\n{summary}"
    for line in rest.strip().splitlines():
        if len(text) + len(line) >= _LONGEST:
            break
        text += "\n" + line.rstrip()
    return Entry(module, name, summary, text.rstrip())


def _counter(tokenizer: Any) -> Callable[[str], int]:
    # A tokenizer is callable too, but it does not return a number.
    if not hasattr(tokenizer, "encode"):
        return tokenizer
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _question(entry: Entry) -> str:
    return f"What does {entry.name} do? Answer with its summary."


def _chat(
    available: tuple[Entry, ...],
    rng: random.Random,
    count: Callable[[str], int],
    context_tokens: int,
    turns: int,
    split: str,
) -> dict[str, Any]:
    order = rng.sample(available, len(available))
    asked, others = _fill(order, count, context_tokens, turns, split)
    shown = rng.sample([*asked, *others], len(asked) + len(others))
    # The counts of the parts need not add up to the count of the whole, so count the whole.
    while count(_content(shown, asked[0])) > context_tokens:
        if not others:
            raise _too_small(context_tokens, turns, count(_content(shown, asked[0])))
        shown.remove(others.pop())

    content = _content(shown, asked[0])
    documentation = len(content) - len(_question(asked[0]))
    starts = [_offset(shown, entry) for entry in asked]
    evidence = [
        [begin, begin + len(entry.summary)]
        for entry, start in zip(asked, starts, strict=True)
        for begin in [start + entry.text.index("\n") + 1]
    ]
    messages: list[dict[str, Any]] = []
    for i, entry in enumerate(asked):
        messages += [
            {"role": "user", "content": content if i == 0 else _question(entry)},
            {"role": "assistant", "content": entry.summary},
        ]
    messages[0]["evidence"] = evidence
    return {
        "messages": messages,
        "asked": [entry.name for entry in asked],
        "depth": [start / documentation for start in starts],
    }


def _fill(
    order: list[Entry], count: Callable[[str], int], context_tokens: int, turns: int, split: str
) -> tuple[list[Entry], list[Entry]]:
    """Return the entries to ask about and the others, taken in order as long as they fit."""
    asked: list[Entry] = []
    others: list[Entry] = []
    room = context_tokens - count(_HEADING)
    misses = 0
    for entry in order:
        need = count(_GAP + entry.text)
        if not asked:
            need += count(_GAP + _question(entry))
        # A long entry must leave enough space for the remaining questions.
        if need > room // max(turns - len(asked), 1):
            misses += 1
            if len(asked) == turns and misses >= _MISSES:
                break
            continue
        misses, room = 0, room - need
        (asked if len(asked) < turns else others).append(entry)
    else:
        if len(asked) < turns:
            smallest = min(count(_content([entry], entry)) for entry in order)
            raise _too_small(context_tokens, turns, smallest)
        if len(asked) + len(others) == len(order):
            raise DataError(
                f"context_tokens={context_tokens} is more than the documentation of the {split} "
                f"split holds ({context_tokens - room}): ask for fewer"
            )
    return asked, others


def _too_small(context_tokens: int, turns: int, needed: int) -> DataError:
    return DataError(
        f"context_tokens={context_tokens} cannot hold the evidence for turns={turns}: one question "
        f"with its documentation takes at least {needed} tokens; raise context_tokens"
    )


def _content(shown: list[Entry], asked: Entry) -> str:
    return _GAP.join([_HEADING, *(entry.text for entry in shown), _question(asked)])


def _offset(shown: list[Entry], entry: Entry) -> int:
    before = shown[: shown.index(entry)]
    return sum(len(text) + len(_GAP) for text in [_HEADING, *(other.text for other in before)])
