"""Needles without lexical overlap, and values of JSON keys."""

from __future__ import annotations

import json
import re

import pytest

from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError
from metafocus.evals import builtin_prose, helmet, nolima
from metafocus.evals.results import score


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(builtin_prose("train").sentences[:400], 1000)


@pytest.mark.parametrize("length", [1500, 4000])
@pytest.mark.parametrize("task", nolima.TASKS)
def test_needles_share_no_word_with_their_question(tokenizer, task, length):
    found = nolima.generate(tokenizer, task=task, length=length, n=6, seed=3)
    for item in found:
        size = len(tokenizer.encode(item.prompt)) + item.new_tokens
        assert 0.9 * length < size <= length
        ((start, stop),) = item.evidence
        needle = item.prompt[start:stop]
        assert nolima.shared_words(needle, item.question) == set()
        (name,) = item.references
        row = next(row for row in nolima.PLACES if row[0] in needle)
        assert name in needle and item.question.endswith(f"{row[1 + task.startswith('two')]}?")
        # Nothing else in the prompt names the person, the building or the place.
        rest = item.prompt[:start] + item.prompt[stop:]
        assert item.prompt.count(name) == 1 and row[0] not in rest
        asked = item.question.rpartition(" to ")[2].rstrip("?")
        assert rest.count(asked) == 1
        assert (needle.endswith(f"{name}.")) == task.endswith("_inverted")
        assert score(item, f"It is {name}.") == {"string_match_all": 1.0}
        assert score(item, "I cannot tell.") == {"string_match_all": 0.0}
    assert found == nolima.generate(tokenizer, task=task, length=length, n=9, seed=3)[:6]


def test_every_needle_and_question():
    """Also those that no draw above has found, with the stems of their words."""
    for building, city, country in nolima.PLACES:
        for needle in (f"Ada lives next to the {building}.", f"The {building} stands next door."):
            for place in (city, country):
                question = f"Which character has been to {place}?"
                assert not nolima.shared_words(needle, question)
                for word in re.findall(r"[a-z]{4,}", building.lower()):
                    assert word[:4] not in place.lower(), (building, place)
    assert nolima.shared_words("a Paris cafe", "Who was in Paris?") == {"paris"}
    assert all(len({row[i] for row in nolima.PLACES}) == len(nolima.PLACES) for i in (0, 1))


@pytest.mark.parametrize("length", [1500, 4000])
def test_json_keys(tokenizer, length):
    items = helmet.generate(tokenizer, length=length, n=12)
    depths = []
    for item in items:
        size = len(tokenizer.encode(f"{item.prompt}\n{item.answer_prefix}")) + item.new_tokens
        assert length - 200 < size <= length
        context, _, rest = item.prompt.partition("\n\n")
        table = json.loads(context)
        pairs = re.findall(r"Key: (\S+)(?:\nCorresponding value: (\S+))?", rest)
        assert len(pairs) == 3 and len(set(pairs)) == 3
        assert all(table[key] == value for key, value in pairs[:2])
        key, value = pairs[2]
        assert not value and item.references == (table[key],) and item.question == f"Key: {key}"
        assert item.prompt[slice(*item.evidence[0])] == f'"{key}": "{table[key]}"'
        depths.append(list(table).index(key) / (len(table) - 1))
        assert item.depths[0] == pytest.approx(depths[-1], abs=0.1)  # where it begins
        assert score(item, f" {table[key]}") == {"string_match_all": 1.0}
    assert depths[:6] == pytest.approx([i / 5 for i in range(6)], abs=0.06)
    assert items[:5] == helmet.generate(tokenizer, length=length, n=5)


def test_bad_requests(tokenizer):
    with pytest.raises(DataError, match="task='qa1' is unknown: use one of json_kv"):
        helmet.generate(tokenizer, task="qa1", length=1000, n=1)
    with pytest.raises(DataError, match="length=200 cannot hold json_kv"):
        helmet.generate(tokenizer, length=200, n=1)
    with pytest.raises(DataError, match="task='vt' is unknown: use one of onehop"):
        nolima.generate(tokenizer, task="vt", length=1000, n=1)
