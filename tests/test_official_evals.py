"""Our generators and scorers beside the official ones, from clones that the user names.

    git clone https://github.com/booydar/babilong && git clone https://github.com/NVIDIA/RULER
    METAFOCUS_BABILONG_REPO=babilong METAFOCUS_RULER_REPO=RULER pytest tests/test_official_evals.py

Nothing of theirs is kept here: their code is run, and what it makes is compared by its form.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from metafocus.data.tokenizer import train_tokenizer
from metafocus.evals import babilong, builtin_prose, ruler
from metafocus.evals.prose import builtin_words
from metafocus.evals.ruler.frequency import zipf_counts
from metafocus.evals.scorers import babilong_official, string_match_all, string_match_part

CASES = 200
pytestmark = pytest.mark.xdist_group("official")


def clone(variable, inside):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} names no clone of the official repository")
    assert (Path(path) / inside).exists(), f"{variable}={path} holds no {inside}"
    return Path(path).resolve()


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def babilong_repo():
    return clone("METAFOCUS_BABILONG_REPO", "babilong/metrics.py")


@pytest.fixture(scope="module")
def ruler_repo():
    return clone("METAFOCUS_RULER_REPO", "scripts/synthetic.yaml")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(builtin_prose("train").sentences[:150], 900)


# --- BABILong


def published_answers(repo, task):
    """Answers of other models that the repository holds, with their questions."""
    for path in sorted((repo / "babilong_evals").rglob(f"{task}_*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield row["target"].strip(), row["output"], row["question"].strip()


@pytest.mark.parametrize("task", babilong.TASKS)
def test_babilong_scorers_on_made_answers(babilong_repo, task):
    metrics = load(babilong_repo / "babilong/metrics.py", "official_metrics")
    labels = babilong.World().labels(task)
    assert set(metrics.TASK_LABELS[task]) == set(labels)
    items = babilong.generate(len, task=task, length=0, n=CASES)
    rng = random.Random(task)
    pieces = [*labels, "not", "Question:", "<context>", "<example>", ".", "\n", "KITCHEN", "then"]
    verdicts = []
    for item in items:
        target = item.references[0]
        words = rng.choices([*pieces, target, target, *target.split(",")], k=rng.randrange(5))
        for output in (item.answer, " ".join(words), f"{item.answer} {' '.join(words)}"):
            theirs = metrics.compare_answers(target, output, item.question, labels)
            assert babilong_official(output, target, item.question, labels) == theirs, output
            verdicts.append(theirs)
        right = metrics.compare_answers(target, item.answer, item.question, labels)
        assert right == (target != "none")  # they find "one" in it too
    assert 0.1 < statistics.mean(verdicts) < 0.95


def test_babilong_scorers_on_published_answers(babilong_repo):
    metrics = load(babilong_repo / "babilong/metrics.py", "official_metrics")
    verdicts = []
    for task in babilong.TASKS:
        rows = list(published_answers(babilong_repo, task))
        if not rows:
            pytest.skip("this clone holds no babilong_evals")
        chosen = random.Random(task).sample(rows, min(CASES, len(rows)))
        for target, output, question in chosen:
            labels = metrics.TASK_LABELS[task]
            theirs = metrics.compare_answers(target, output, question, labels)
            ours = babilong_official(output, target, question, babilong.World().labels(task))
            assert ours == theirs, (task, output)
            verdicts.append(theirs)
    print(f"{len(verdicts)} published answers, {sum(verdicts)} of them right")
    assert 0 < sum(verdicts) < len(verdicts)


def form(question):
    """A question with its names left out."""
    world = babilong.World()
    for name, words in (
        ("ROOM", world.rooms),
        ("PERSON", world.people + world.givers),
        ("THING", world.objects),
        ("SIDE", ("north", "south", "east", "west")),
    ):
        question = re.sub(rf"\b({'|'.join(words)})\b", name, question)
    return question


@pytest.mark.parametrize("task", babilong.TASKS)
def test_babilong_questions_have_the_published_forms(babilong_repo, task):
    theirs = {form(question) for _, _, question in published_answers(babilong_repo, task)}
    if not theirs:
        pytest.skip("this clone holds no babilong_evals")
    ours = {form(i.question) for i in babilong.generate(len, task=task, length=0, n=CASES)}
    assert ours == theirs


@pytest.mark.parametrize("task", babilong.TASKS)
def test_babilong_prompts_have_the_official_structure(babilong_repo, task):
    prompts = load(babilong_repo / "babilong/prompts.py", "official_prompts")
    parts = prompts.DEFAULT_PROMPTS[task]
    for item in babilong.generate(lambda s: len(s.split()), task=task, length=700, n=CASES // 5):
        heading, _, rest = item.prompt.partition("<context>\n")
        context = rest.partition("\n</context>")[0]
        official = prompts.get_formatted_input(context, item.question, **parts)
        # From the context on ours is theirs; before it stand instruction and solved examples.
        own = prompts.USER_TEMPLATE.format(context=context, question=item.question)
        assert item.prompt.endswith(own) and official.endswith(own)
        tags = re.compile(r"</?(?:example|context)>")
        assert tags.findall(heading)[:4] == tags.findall(official)[:4]
        assert heading.count("\nAnswer: ") == heading.count("<example>") == 2
        assert heading.index("<example>") > 50 < official.index("<example>")


@pytest.mark.parametrize("task", ["qa3", "qa4", "qa5"])
def test_the_oracle_solves_the_official_examples(babilong_repo, task):
    """Those of qa1 and qa2 are told with other names."""
    prompts = load(babilong_repo / "babilong/prompts.py", "official_prompts")
    text = prompts.DEFAULT_PROMPTS[task]["examples"]
    examples = re.findall(r"<example>\n(.*?) (Wh[^.?]*\?)\nAnswer: (.*?)\n</example>", text, re.S)
    assert len(examples) >= 2
    for facts, question, answer in examples:
        found = babilong.solve(task, facts, question)
        assert answer.rstrip(".").endswith(found)
        labels = babilong.World().labels(task)
        assert babilong_official(answer, found, question, labels)


def test_facts_are_hidden_as_officially(babilong_repo, tokenizer):
    """Their noise injection on our stories: the oracle reads it, and facts stand alike."""
    pytest.importorskip("pandas")
    pytest.importorskip("nltk")
    utils = load(babilong_repo / "babilong/babilong_utils.py", "official_utils")
    world, length = babilong.World(), 900
    prose = builtin_prose("train").without(world.names)
    depths = {"ours": [], "theirs": []}
    for task in babilong.TASKS:
        n = CASES // 5
        # The stories that our generator tells too.
        names = [f"babilong {task} 0 {i}" for i in range(n)]
        stories = [babilong.tell(task, random.Random(name), world) for name in names]
        stories = [s for s in stories if len(s.facts) < 20]
        hidden = utils.NoiseInjectionDataset(
            [{"facts": s.facts, "question": s.question, "answer": s.answer} for s in stories],
            utils.SentenceSampler(
                [{"text": " ".join(prose.sentences)}], tokenizer, shuffle=True, random_seed=3
            ),
            tokenizer,
            sample_size=length,
        )
        for i, story in enumerate(stories):
            context = tokenizer.decode(hidden[i]["input_tokens"])
            assert babilong.solve(task, context, story.question) == story.answer
            depths["theirs"] += depths_of(story.facts, context)
        for item in babilong.generate(tokenizer, task=task, length=length + 300, n=n):
            context = item.prompt.partition("<context>\n")[2].partition("\n</context>")[0]
            assert babilong.solve(task, context, item.question) == item.references[0]
            asked = [s for s in stories if s.question == item.question]
            story = next((s for s in asked if all(f in context for f in s.facts)), None)
            if story:
                depths["ours"] += depths_of(story.facts, context)
    assert all(len(row) > 100 for row in depths.values())
    print({k: (len(v), round(statistics.mean(v), 3)) for k, v in depths.items()})
    for row in depths.values():
        assert abs(statistics.mean(row) - 0.5) < 0.06
        assert max(row) > 0.9 and min(row) < 0.1


def depths_of(facts, context):
    """Where the facts stand, which come one after the other."""
    found, at = [], 0
    for fact in facts:
        at = context.index(fact, at)
        found.append(at / len(context))
        at += len(fact)
    return found


# --- RULER

# What their scripts import and what a clone lacks, made of our own words and sentences.
STUBS = {
    "wonderwords/__init__.py": "from wonderwords import random_word\n",
    "wonderwords/random_word.py": """
import json, pathlib
WORDS = json.loads((pathlib.Path(__file__).parent / "words.json").read_text())
def _get_words_from_text_file(name):
    return WORDS[name]
""",
    "tenacity.py": """
def retry(*a, **k): return lambda f: f
def stop_after_attempt(*a): return None
def wait_fixed(*a): return 0
def wait_random(*a): return 0
""",
    "nltk/__init__.py": "",
    "nltk/tokenize.py": """
import re
def sent_tokenize(text): return re.split(r"(?<=[.!?]) ", text)
""",
}
LENGTH, EACH = 2048, CASES // 10


@pytest.fixture(scope="module")
def ruler_made(ruler_repo, tokenizer, tmp_path_factory):
    """What their scripts make: 20 prompts of each of 13 tasks."""
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("scipy")
    home = tmp_path_factory.mktemp("ruler")
    shutil.copytree(ruler_repo / "scripts/data", home / "data")
    for name, text in STUBS.items():
        (home / "stubs" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "stubs" / name).write_text(text)
    words = list(builtin_words())
    lists = {"nounlist.txt": words[::3], "adjectivelist.txt": words[1::3][:200]}
    lists["verblist.txt"] = words[2::3]
    (home / "stubs/wonderwords/words.json").write_text(json.dumps(lists))
    folder = home / "data/synthetic/json"
    essay = " ".join(s for s in builtin_prose("train").sentences if not re.search(r"\d{7}", s))
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))
    pairs = {str(i): f"{a}{b}" for i, (a, b) in enumerate(zip(words, words[1:] * 3, strict=False))}
    (folder / "english_words.json").write_text(
        json.dumps({**pairs, **{f"x{i}": f"{w}ish" for i, w in enumerate(words)}})
    )
    tokenizer.save_pretrained(home / "tokenizer")
    settings = yaml.safe_load((ruler_repo / "scripts/synthetic.yaml").read_text())
    base = load(ruler_repo / "scripts/data/synthetic/constants.py", "official_ruler").TASKS
    found = {}
    for name, data in QUESTIONS.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    for task in (*ruler.TASKS[:-1], "qa_1", "qa_2"):
        kind = base[settings[task]["task"]]
        command = [sys.executable, home / f"data/synthetic/{settings[task]['task']}.py"]
        options = {
            "save_dir": home / "out",
            "save_name": task,
            "tokenizer_path": home / "tokenizer",
            "tokenizer_type": "hf",
            "max_seq_length": LENGTH,
            "tokens_to_generate": kind["tokens_to_generate"],
            "num_samples": EACH,
            "template": kind["template"] + kind["answer_prefix"],
            **settings[task]["args"],
        }
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        env = {**os.environ, "PYTHONPATH": str(home / "stubs"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (home / "out" / task / "validation.jsonl").read_text().splitlines()
        found[task] = [json.loads(line) for line in lines]
        assert len(found[task]) == EACH
    return found


def test_ruler_settings(ruler_repo):
    yaml = pytest.importorskip("yaml")
    settings = yaml.safe_load((ruler_repo / "scripts/synthetic.yaml").read_text())
    base = load(ruler_repo / "scripts/data/synthetic/constants.py", "official_ruler").TASKS
    scored = load(ruler_repo / "scripts/eval/synthetic/constants.py", "official_scores").TASKS
    assert {*settings} == {*ruler.TASKS[:-1], "qa_1", "qa_2"}
    for task in settings:
        kind = settings[task]["task"]
        ours = "qa" if kind == "qa" else task
        assert ruler.NEW_TOKENS[ours] == base[kind]["tokens_to_generate"]
        name = scored[kind]["metric_fn"].__name__
        assert name == ("string_match_part" if ours == "qa" else "string_match_all")
    for task, own in ruler.NIAH.items():
        args = settings[task]["args"]
        assert args["type_haystack"] == own.haystack
        assert args["type_needle_k"] == f"{own.key}s" and args["type_needle_v"] == f"{own.value}s"
        assert max(args["num_needle_k"], args["num_needle_q"]) == max(own.keys, own.queries)
        assert (args["num_needle_v"], args["num_needle_q"]) == (own.values, own.queries)


def test_ruler_scorers(ruler_repo):
    theirs = load(ruler_repo / "scripts/eval/synthetic/constants.py", "official_scores")
    rng = random.Random(0)
    words = ["7123456", "712", "Paris", "paris, France", "ABC", "abcd", "the", "\n", "...", "é"]
    outputs = [" ".join(rng.choices(words, k=rng.randrange(6))) for _ in range(CASES)]
    references = [rng.sample(words, rng.randrange(1, 5)) for _ in range(CASES)]
    for name, ours in (
        ("string_match_all", string_match_all),
        ("string_match_part", string_match_part),
    ):
        scorer = getattr(theirs, name)
        for output, row in zip(outputs, references, strict=True):
            assert ours([output], [row]) == pytest.approx(scorer([output], [row]), abs=5.1e-3)
        whole = scorer(outputs, references)  # rounded to two digits
        assert ours(outputs, references) == pytest.approx(whole, abs=5.1e-3)
        assert 5 < whole < 95


VALUE = {"number": r"(?<!\d)\d{7}(?!\d)", "uuid": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"}


def needles(task, prompt, prefix, references):
    """What can be said of a needle prompt whatever its words."""
    settings = ruler.NIAH[task]
    context, _, _ = prompt.rpartition("\n")
    values = re.findall(VALUE[settings.value], context)
    if settings.key == "uuid":
        values = values[1::2]  # key, value, key, value
    lines = Counter(context.splitlines())
    return {
        "values": len(values) if settings.haystack != "needle" else len(values) > 9,
        "different": len(set(values)) == len(values),
        "references": len(references),
        "form": all(re.fullmatch(VALUE[settings.value], r) for r in references),
        "once": all(prompt.count(r) == 1 for r in references),
        "not in the prefix": not any(r in prefix for r in references),
        "repeated lines": max(lines.values()) > 10,
        "a line for each needle": sum(len(re.findall(VALUE[settings.value], x)) > 0 for x in lines)
        >= len(values)
        if settings.haystack != "essay"
        else None,
    }


def variables(task, prompt, prefix, references):
    parts = re.findall(r"VAR ([A-Z]{5}) = (VAR [A-Z]{5}|\d+)", prompt)
    names = [name for name, _ in parts]
    chain = [parts[0][1], *(f"VAR {name}" for name in names[:-1])]
    lines = Counter(prompt.splitlines())
    return {
        "statements": len(parts),
        "in order": [source for _, source in parts] == chain,
        "answers": set(names) == set(references) and len(references),
        "value": re.fullmatch(r"[1-9]\d{4}", parts[0][1]) is not None,
        "asked for by value": parts[0][1] in prompt.rpartition("\n")[2],
        "prefix": not any(name in prefix for name in names),
        "repeated lines": max(lines.values()) > 10,
    }


def common(task, prompt, prefix, references):
    lists = re.findall(r"1\. \S+(?: \d+\. \S+)+", prompt)
    main = Counter(re.findall(r"\d+\. (\S+)", lists[-1]))
    often = {word for word, k in main.items() if k == max(main.values())}
    first = Counter(re.findall(r"\d+\. (\S+)", lists[0]))
    solved = re.findall(r"\d+\. (\S+)", lists[1])
    return {
        "lists": len(lists),  # an example, its answer, and the list
        "counts": sorted(set(main.values())),
        "common": often == set(references) and len(references),
        "example": len(solved) == 10 and {first[w] for w in solved} == {max(first.values())},
    }


def frequent(task, prompt, prefix, references):
    words = max(re.findall(r"(?:(?:[a-z]{6}|\.\.\.) ){20,}(?:[a-z]{6}|\.\.\.)", prompt), key=len)
    counts = Counter(w for w in words.split() if w == "..." or len(w) == 6)
    ranked = counts.most_common()
    size = (LENGTH - ruler.NEW_TOKENS["fwe"]) // 50
    shapes = [[k for k in zipf_counts(n, size) if k] for n in range(50, 3000)]
    return {
        "noise": ranked[0][0],
        "answers": [w for w, _ in ranked[1:4]] == list(references),
        "counts": [k for _, k in ranked] in shapes,
    }


def paragraph(a, p):
    asked = {"question": f"Which one is {a}.{p}?", "is_impossible": False}
    return {
        "context": f"Article {a} has paragraph {p}. {SENTENCES[(17 * a + p) % len(SENTENCES)]}",
        "qas": [{**asked, "answers": [{"text": f"paragraph {p}"}]}],
    }


def supported(q):
    distractors = [[f"D{q}.{i}", [f"Distractor {q} number {i}. {SENTENCES[q]}"]] for i in range(8)]
    return {
        "question": f"Who wrote {q}?",
        "answer": f"author {q}",
        "supporting_facts": [[f"S{q}a", 0], [f"S{q}b", 0]],
        "context": [
            [f"S{q}a", [f"Support a {q}: author {q}."]],
            *distractors,
            [f"S{q}b", [f"Support b {q}."]],
        ],
    }


SENTENCES = builtin_prose("train").sentences
# The official script asks the questions in order, and ours in a random one.
QUESTIONS = {
    "squad": {
        "data": [{"paragraphs": [paragraph(a, p) for p in range(9)]} for a in range(60)],
    },
    "hotpotqa": [supported(q) for q in range(60)],
}


def documents(prompt, question, references):
    """What can be said of a prompt of documents whatever its words."""
    numbers = [int(n) for n in re.findall(r"^Document (\d+):$", prompt, re.MULTILINE)]
    before, _, after = prompt.partition("Document 1:")
    said = re.compile(r"Answer the question [^\n]*\.")
    hot = question.startswith("Who wrote")
    name = question[:-1].split()[-1]
    if hot:
        own = [*re.findall(rf"(?:Distractor|Support \w) {name}\b", prompt)]
    else:
        own = re.findall(rf"Article {name.partition('.')[0]} has", prompt)
    return {
        "numbered": numbers == list(range(1, len(numbers) + 1)),
        "its own": len(own),  # ten of HotpotQA; nine paragraphs of its article
        "others": len(numbers) > len(own),
        "asked before and after": bool(said.search(before)) and bool(said.search(after)),
        "answers": list(references),
        "there": any(reference in prompt for reference in references),
        "question last": prompt.strip().endswith(f"Question: {question}"),
    }


@pytest.mark.parametrize(("task", "name"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_ruler_qa_has_the_official_structure(ruler_made, tokenizer, tmp_path, task, name):
    (tmp_path / f"{name}.json").write_text(json.dumps(QUESTIONS[name]))
    questions = ruler.read_questions(tmp_path / f"{name}.json")
    ours = {
        item.question: documents(item.prompt, item.question, item.references)
        for item in ruler.generate(
            tokenizer, task="qa", length=LENGTH, n=len(questions), questions=questions
        )
    }
    firsts = []
    for made in ruler_made[task]:
        question = re.search(r"Question: (.*\?)\s*$", made["input"])[1]
        assert ours[question] == documents(made["input"], question, made["outputs"])
        assert made["answer_prefix"].strip() == "Answer:"
        firsts.append(made["input"].partition("Document 2:")[0])
    assert len(set(firsts)) > 1


def shown_variables(prompt):
    """What can be said of the solved example of variable tracking."""
    parts = re.findall(r"VAR ([A-Z]{3}) = (VAR [A-Z]{3}|\d+)", prompt)
    names = [name for name, _ in parts]
    first = prompt.index(f"VAR {names[0]} = ")
    solved = prompt[prompt.rindex(f"VAR {names[-1]}") :].partition("VAR ")[2]
    return {
        "statements": len(parts),
        "in order": [s for _, s in parts] == [parts[0][1], *(f"VAR {n}" for n in names[:-1])],
        "before the question": first < re.search(r"VAR [A-Z]{5} =", prompt).start(),
        "solved": all(name in solved for name in names),
        "value": re.fullmatch(r"[1-9]\d{4}", parts[0][1]) is not None,
    }


def test_ruler_variables_have_the_official_example(ruler_made, tokenizer):
    ours = ruler.generate(tokenizer, task="vt", length=LENGTH, n=EACH)
    sizes = {"ours": [], "theirs": []}
    for item, made in zip(ours, ruler_made["vt"], strict=True):
        assert shown_variables(item.prompt) == shown_variables(made["input"])
        for who, prompt in (("ours", item.prompt), ("theirs", made["input"])):
            at = re.search(r"VAR [A-Z]{5} =", prompt).start()
            example = prompt[: prompt.rindex("\n\n", 0, at)]
            sizes[who].append(len(tokenizer.tokenize(example)))
    print(sizes)
    assert 300 < min(map(min, sizes.values())) and max(map(max, sizes.values())) < 700


FORMS = {**dict.fromkeys(ruler.NIAH, needles), "vt": variables, "cwe": common, "fwe": frequent}


@pytest.mark.parametrize("task", FORMS)
def test_ruler_prompts_have_the_official_structure(ruler_made, tokenizer, task):
    ours = ruler.generate(tokenizer, task=task, length=LENGTH, n=EACH)
    forms = {"ours": [], "theirs": []}
    sizes = {"ours": [], "theirs": []}
    for item, made in zip(ours, ruler_made[task], strict=True):
        for who, prompt, prefix, references in (
            ("ours", item.prompt, item.answer_prefix, item.references),
            ("theirs", made["input"], made["answer_prefix"], made["outputs"]),
        ):
            forms[who].append(FORMS[task](task, prompt.strip(), prefix, references))
            whole = f"{prompt} {prefix}"
            sizes[who].append(len(tokenizer.tokenize(whole)) + ruler.NEW_TOKENS[task])
    print(task, {who: (min(row), max(row)) for who, row in sizes.items()})
    for a, b in zip(forms["ours"], forms["theirs"], strict=True):
        assert a == b
    # Theirs makes a prompt that came out too long shorter by as much as 500 words.
    assert 0.85 * LENGTH < min(sizes["ours"])
    for row in sizes.values():
        assert max(row) <= LENGTH + 3  # a space more between prompt and prefix
