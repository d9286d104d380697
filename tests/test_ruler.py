from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from metafocus.data import encode_chat, encode_chats
from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError
from metafocus.evals import Prose, builtin_prose, token_windows
from metafocus.evals.ruler import NEW_TOKENS, NIAH, TASKS, Question, generate, read_questions
from metafocus.evals.ruler.frequency import _FEWEST, zipf_counts
from metafocus.evals.ruler.niah import DEPTHS
from metafocus.evals.ruler.words import ADJECTIVES, NOISE, NOUNS
from metafocus.evals.scorers import string_match_all, string_match_part

SENTENCES = builtin_prose("train").sentences
QUESTIONS = [
    Question(f"What is {i}?", (f"it-{i}", f"that-{i}"), (f"{SENTENCES[i]} It is it-{i}.",))
    for i in range(300)
]


def words(text):
    return len(text.split())


def make(task, length=1500, n=10, **more):
    return generate(words, task=task, length=length, n=n, questions=QUESTIONS, **more)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES[:400], 1000)


@pytest.mark.parametrize("length", [1400, 3000])
@pytest.mark.parametrize("task", TASKS)
def test_lengths(tokenizer, task, length):
    items = generate(tokenizer, task=task, length=length, n=3, questions=QUESTIONS)
    for item in items:
        size = len(tokenizer.encode(f"{item.prompt}\n{item.answer_prefix}")) + NEW_TOKENS[task]
        # Within a unit of haystack: a sentence, or a word that comes three times.
        assert 0.88 * length < size <= length
        assert item.answer.startswith(item.answer_prefix) and item.prompt.endswith(item.question)
    assert len({item.prompt for item in items}) == 3
    assert len(encode_chats([item.chat() for item in items], tokenizer).samples) == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_scores_and_the_prefix_does_not(task):
    for item in make(task, n=3):
        scorer = string_match_part if task == "qa" else string_match_all
        assert scorer([item.answer], [item.references]) == 100
        assert scorer([item.answer_prefix], [item.references]) == 0


@pytest.mark.parametrize("task", NIAH)
def test_needles(task):
    settings = NIAH[task]
    # RULER's table.
    published = {
        "niah_single_1": ("noise", "word", "number", 1, 1, 1),
        "niah_single_2": ("essay", "word", "number", 1, 1, 1),
        "niah_single_3": ("essay", "word", "uuid", 1, 1, 1),
        "niah_multikey_1": ("essay", "word", "number", 4, 1, 1),
        "niah_multikey_2": ("needle", "word", "number", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuid", "uuid", 1, 1, 1),
        "niah_multivalue": ("essay", "word", "number", 1, 4, 1),
        "niah_multiquery": ("essay", "word", "number", 1, 1, 4),
    }[task]
    assert tuple(vars(settings).values()) == published
    line = re.compile(r"(?:The|One of the) secret (?:number|uuid)s? of (\S+) is (\S+)\.")
    for item in make(task):
        context = item.prompt.removesuffix(item.question)
        found = line.findall(context)
        table = {}
        for key, value in found:
            table.setdefault(key, []).append(value)
        asked = [key for key in table if key in item.question]
        assert len(asked) == settings.queries
        assert sorted(v for key in asked for v in table[key]) == sorted(item.references)
        assert len(item.references) == settings.values * settings.queries
        values = [value for _, value in found]
        assert len(set(values)) == len(values)
        for value in item.references:  # once, and nowhere else
            assert item.prompt.count(value) == 1
            form = r"\d{7}" if settings.value == "number" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-.{12}"
            assert re.fullmatch(form, value)
        for key in asked:
            assert context.count(key) == settings.values
        for (start, stop), value in zip(item.evidence, item.references, strict=True):
            assert line.fullmatch(item.prompt[start:stop])[2] == value
        if settings.haystack == "needle":
            assert len(table) > 20
        else:
            assert len(table) == max(settings.keys, settings.queries)
        assert (NOISE in context) == (settings.haystack == "noise")


def test_depths_of_essays_are_spread_and_reach_both_ends():
    items = make("niah_single_2", n=200)
    depths = [item.depths[0] for item in items]
    assert min(depths) == 0 and max(depths) > 0.95
    for half in range(2):
        share = sum(half / 2 <= d < (half + 1) / 2 for d in depths) / len(depths)
        assert 0.35 < share < 0.65  # 200 draws: the deviation is 0.035
    assert DEPTHS == 40


def test_variables():
    for item in make("vt", n=20):
        assert len(item.references) == 5 and len(set(item.references)) == 5
        value = re.search(r"value (\d+)\?", item.question)[1]
        assert 10000 <= int(value) <= 99998
        statements = [item.prompt[a:b] for a, b in item.evidence]
        first, *others = statements
        assert first == f"VAR {item.references[0]} = {value}"
        chain = zip(others, item.references[1:], item.references, strict=False)
        assert all(text == f"VAR {name} = VAR {before}" for text, name, before in chain)
        assert [a for a, _ in item.evidence] == sorted(a for a, _ in item.evidence)
        shown, _, own = item.prompt.rpartition("Variables are set among")
        assert own.count("VAR") == shown.count("VAR") == 9  # 5 definitions, 4 uses
        # One solved example, whose names have three letters.
        assert shown.count("Variables are set among") == 1
        solved = re.search(r"The variables with the value (\d+) are (.*)\.", shown)
        assert set(re.findall(r"VAR (\w+) =", shown)) == set(re.findall(r"\b[A-Z]{3}\b", solved[2]))
        assert f"= {solved[1]}\n" in shown and solved[1] != value
        for i, name in enumerate(item.references):
            assert re.fullmatch("[A-Z]{5}", name)
            assert item.prompt.count(name) == (1 if i == 4 else 2)
        context = item.prompt.removesuffix(item.question)
        assert context.count(value) == 1


@pytest.mark.parametrize(("length", "often", "seldom"), [(1500, 6, 1), (4096, 30, 3)])
def test_common_words(length, often, seldom):
    for item in make("cwe", length=length):
        main = item.prompt.partition("Here is another list.\n\n")[2].removesuffix(item.question)
        counts = Counter(re.findall(r"\d+\. (\S+)", main))
        assert {w for w, k in counts.items() if k == often} == set(item.references)
        assert set(counts.values()) == {often, seldom} and len(item.references) == 10
        shown = item.prompt.partition("Here is another list.")[0]
        example = Counter(re.findall(r"\d+\. (\S+)", shown.partition("Which 10")[0]))
        assert sorted(example.values()) == [1] * 10 + [2] * 10
        solved = re.findall(r"\d+\. (\S+)", shown.partition("Which 10")[2])
        assert all(example[word] == 2 for word in solved) and len(solved) == 10
        assert not example.keys() & counts.keys()


def test_frequent_words():
    for item in make("fwe", length=2000):
        text = item.prompt.partition("\n\n")[2].removesuffix(item.question)
        counts = Counter(text.split())
        ranked = counts.most_common()
        assert ranked[0][0] == "..." and [w for w, _ in ranked[1:4]] == list(item.references)
        # One word for 50 tokens, without the 50 for the answer, as published.
        n = next(n for n in range(5000) if sum(zipf_counts(n, 39)) >= len(text.split()))
        assert [k for _, k in ranked] == [k for k in zipf_counts(n, 39) if k]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    for n in range(_FEWEST, 600):
        _, second, third, fourth, fifth = zipf_counts(n, 5)
        assert second > third > fourth > fifth


def test_qa(tmp_path):
    asked = make("qa", n=300)
    assert len({item.question for item in asked}) == 300
    for item in asked[:20]:
        number = int(re.search(r"\d+", item.question)[0])
        assert item.references == QUESTIONS[number].answers
        assert item.prompt.count(QUESTIONS[number].documents[0]) == 1
        assert item.prompt[slice(*item.evidence[0])].endswith(f"it-{number}.")
        numbers = [int(n) for n in re.findall(r"^Document (\d+):$", item.prompt, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 20
    # More room than documents: all of them, once.
    (short,) = generate(words, task="qa", length=9000, n=1, questions=QUESTIONS[:5])
    assert short.prompt.count("\nDocument ") == 5

    record = {"question": "Q?", "answers": ["a"], "documents": ["It is a."]}
    (tmp_path / "plain.jsonl").write_text(json.dumps(record) + "\n\n")
    squad = {"data": [{"paragraphs": [{"context": "It is a.", "qas": [
        {"question": "Q?", "answers": [{"text": "a"}, {"text": "a"}]},
        {"question": "R?", "answers": [], "is_impossible": True},
        {"question": "S?", "answers": [{"text": " "}]},
    ]}]}]}  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    hotpot = [{"question": "Q?", "answer": "a", "supporting_facts": [["T", 0]],
               "context": [["T", ["It", " is a."]], ["U", ["No."]]]}]  # fmt: skip
    (tmp_path / "hotpot.json").write_text(json.dumps(hotpot))
    want = Question("Q?", ("a",), ("It is a.",))
    assert read_questions(tmp_path / "plain.jsonl") == (want,)
    assert read_questions(tmp_path / "squad.json") == (want,)
    both = ("T\nIt is a.", "U\nNo.")
    assert read_questions(tmp_path / "hotpot.json") == (Question("Q?", ("a",), both, (0,)),)


def test_hotpotqa_keeps_its_distractors(tmp_path):
    hot = [
        {
            "question": f"Q{q}?",
            "answer": f"ans{q}",
            "supporting_facts": [[f"S{q}a", 0], [f"S{q}b", 0]],
            "context": [
                [f"S{q}a", [f"support a {q} ans{q}."]],
                *([f"D{q}_{i}", [f"hard distractor {q} {i}."]] for i in range(8)),
                [f"S{q}b", [f"support b {q}."]],
            ],
        }
        for q in range(30)
    ]
    (tmp_path / "h.json").write_text(json.dumps(hot))
    questions = read_questions(tmp_path / "h.json")
    assert len({x for question in questions for x in question.documents}) == 300
    for item in generate(words, task="qa", length=400, n=10, questions=questions):
        own = re.search(r"Q(\d+)\?", item.question)[1]
        assert item.prompt.count(f"hard distractor {own} ") == 8
        assert item.prompt.count("\nDocument ") > 10  # those of other questions too
        texts = [item.prompt[a:b] for a, b in item.evidence]
        assert len(texts) == 2
        assert f"support a {own}" in texts[0] and f"support b {own}" in texts[1]
    with pytest.raises(DataError, match="length=40 cannot hold qa"):
        generate(words, task="qa", length=40, n=1, questions=questions)


def test_squad_fills_with_the_same_article_first(tmp_path):
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": f"article {a} paragraph {p} text text text.",
                        "qas": [
                            {"question": f"q{a}.{p}?", "answers": [{"text": f"paragraph {p}"}]}
                        ],
                    }
                    for p in range(20)
                ]
            }
            for a in range(40)
        ]
    }
    (tmp_path / "s.json").write_text(json.dumps(squad))
    questions = read_questions(tmp_path / "s.json")
    for length, most in ((170, 20), (600, 20)):
        places = []
        for item in generate(words, task="qa", length=length, n=20, questions=questions):
            own = re.search(r"q(\d+)\.", item.question)[1]
            shown = re.findall(r"article (\d+) paragraph", item.prompt)
            assert shown.count(own) == min(len(shown), most)
            places += [i / len(shown) for i, article in enumerate(shown) if article == own]
            (start, stop), *none = item.evidence
            assert not none and item.references[0] in item.prompt[start:stop]
        assert 0.3 < sum(places) / len(places) < 0.6  # they do not stand first


@pytest.mark.parametrize(
    "text",
    [
        '{"question": "Q?"}',
        "{",
        '{"question": "Q", "answers": "a", "documents": ["d"]}',
        '{"question": "Q", "answers": [" "], "documents": ["d"]}',
        "",
    ],
)
def test_bad_questions(tmp_path, text):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"bad.jsonl"):
        read_questions(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        read_questions(tmp_path / "none.jsonl")


def test_seeds_and_order():
    for task in TASKS:
        few = make(task, n=2, seed=5)
        assert few == make(task, n=4, seed=5)[:2] and few != make(task, n=2, seed=6)
        # Not one order for every sample, as a shuffle seeded anew each time would give.
        assert few[0].references != few[1].references


def test_evidence_becomes_needle_tokens(tokenizer):
    (item,) = generate(tokenizer, task="niah_multivalue", length=1500, n=1)
    ids = encode_chat(item.chat()["messages"], tokenizer)["input_ids"]
    found = "".join(tokenizer.decode(ids[a:b]) for a, b in token_windows(item, tokenizer))
    assert all(found.count(value) == 1 for value in item.references)
    (item,) = generate(tokenizer, task="cwe", length=1500, n=1)
    assert token_windows(item, tokenizer) == []


def test_words():
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) and len(set(NOUNS)) == len(NOUNS)
    assert all(re.fullmatch("[a-z]+", word) for word in ADJECTIVES + NOUNS)
    assert len(ADJECTIVES) * len(NOUNS) > 131072 / 8  # a line of the haystack has 8 words


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS[:-1])
def test_128k(tokenizer, task):
    (item,) = generate(tokenizer, task=task, length=131072, n=1)
    size = len(tokenizer.encode(f"{item.prompt}\n{item.answer_prefix}")) + NEW_TOKENS[task]
    assert 0.99 * 131072 < size <= 131072


def test_errors():
    with pytest.raises(DataError, match="task='niah' is unknown"):
        generate(words, task="niah", length=1000, n=1)
    with pytest.raises(DataError, match="needs questions"):
        generate(words, task="qa", length=1000, n=1)
    with pytest.raises(DataError, match=r"length=140 cannot hold vt|length=90 cannot hold vt"):
        generate(words, task="vt", length=90, n=1)
    with pytest.raises(DataError, match="too short for fwe"):
        generate(words, task="fwe", length=200, n=1)
    with pytest.raises(DataError, match="words holds 2 different words"):
        generate(words, task="cwe", length=1000, n=1, words=["a", "b", "a"])
    few = [f"word{i}" for i in range(120)]
    with pytest.raises(DataError, match="words are too few for length=20000"):
        generate(words, task="cwe", length=20000, n=1, words=few)
    with pytest.raises(DataError, match="long number"):
        generate(words, task="niah_single_2", length=999, n=1, prose=Prose(("No 1234567.",)))
