"""Attempts with scripted endpoints, pass@k by enumeration, and a small model from end to end."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from models import build
from openai_server import serving

from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError
from metafocus.evals import builtin_prose
from metafocus.evals.agentic import (
    Choice,
    HTTPEndpoint,
    LocalEndpoint,
    Ran,
    evaluate,
    pass_at_k,
    play,
    read_longbench,
    run_python,
    science,
)
from metafocus.evals.agentic.endpoints import TooLong
from metafocus.evals.intervals import wilson

QUESTION = Choice("What is 6 times 7?", ("41", "42", "43", "48"), answer=1)
CODE = "Let me see.\n```python\nprint(6 * 7)\n```"


class Script:
    """Says its lines in turn; remembers what it was shown."""

    def __init__(self, *lines):
        self.lines, self.seen, self.seeds = list(lines), [], []

    def __call__(self, messages, *, seed):
        self.seen.append(list(messages))
        self.seeds.append(seed)
        line = self.lines[min(len(self.seen), len(self.lines)) - 1]
        if isinstance(line, Exception):
            raise line
        return line


def echo(code):
    return Ran(f"ran {code!r}", 0, "", 0.0)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        share = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(share, abs=1e-15)


def test_pass_at_k_is_unbiased():
    """Its mean over binomial counts is 1 - (1-p)^k, and that of the plug-in estimate is not."""
    n, k, p = 8, 4, 0.3
    weights = [torch.distributions.Binomial(n, torch.tensor(p).double()).log_prob(
        torch.tensor(float(c))).exp().item() for c in range(n + 1)]  # fmt: skip
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-6)
    assert plug_in < mean - 0.02
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4)
    for bad in ((4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(DataError, match="1 <= k <= n"):
            pass_at_k(*bad)


def test_a_call_and_an_answer():
    script = Script(CODE + "\nIt prints 43.\nAnswer: C", "Answer: B")
    attempt = play(script, QUESTION, tool=run_python)
    assert (attempt.answer, attempt.correct, attempt.ended) == ("B", True, "answered")
    assert [m["role"] for m in attempt.messages] == ["user", "assistant", "user", "assistant"]
    # What it made up after the call is not kept, and its answer there does not count.
    assert attempt.messages[1]["content"] == CODE
    assert attempt.messages[2]["content"] == "Output:\n42\n"
    assert script.seen[1] == list(attempt.messages[:3])
    (run,) = attempt.runs
    assert (run["code"], run["stopped"], attempt.calls) == (0, "", 1)
    first = attempt.messages[0]["content"]
    assert all(part in first for part in (QUESTION.question, "(B) 42", "A to D", "at most 5"))
    assert len(set(script.seeds)) == 2


def test_the_model_sees_what_went_wrong():
    crash = "```python\nprint('a')\n1 / 0\n```"
    attempt = play(Script(crash, "Answer: B"), QUESTION, tool=run_python)
    told = attempt.messages[2]["content"]
    assert "ZeroDivisionError" in told and "[exit status 1]" in told and "a\n" in told


def test_it_never_answers():
    attempt = play(Script("Hm."), QUESTION, tool=echo)
    assert (attempt.answer, attempt.ended, attempt.calls) == (None, "no answer", 0)
    assert not attempt.correct
    # It is asked once more, and then no more.
    assert [m["role"] for m in attempt.messages] == ["user", "assistant"] * 2
    assert "no answer" in attempt.messages[2]["content"]
    assert play(Script("Hm.", "Answer: B"), QUESTION).correct
    assert play(Script("Hm.", CODE, "Answer: B"), QUESTION, tool=echo).correct


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_too_many_calls(calls):
    script = Script(CODE)
    attempt = play(script, QUESTION, tool=echo, calls=calls)
    assert attempt.calls == calls and attempt.ended == "no answer"
    assert len(script.seen) == calls + 2
    told = [m["content"] for m in attempt.messages if m["role"] == "user"]
    assert sum("No runs are left" in text for text in told) == bool(calls)
    assert ("```python" in told[0]) == bool(calls)
    # After the last call what the next reply answers counts, code or not.
    script = Script(*[CODE] * calls, CODE + "\nAnswer: B")
    assert play(script, QUESTION, tool=echo, calls=calls).correct


def test_malformed_calls():
    """A block that does not end is a call that is not run; another language is no call."""
    script = Script("```python\nprint(1)", "``` py\nprint(2)```", "Answer: B")
    attempt = play(script, QUESTION, tool=echo)
    assert attempt.runs[0] is None and attempt.runs[1] is not None and attempt.correct
    assert "has no end" in attempt.messages[2]["content"]
    assert "'print(2)'" in attempt.messages[4]["content"]
    attempt = play(Script("```text\n42\n```\nAnswer: B"), QUESTION, tool=echo)
    assert attempt.calls == 0 and attempt.correct
    twice = play(Script(CODE + CODE.replace("6", "5"), "Answer: B"), QUESTION, tool=echo)
    assert twice.calls == 1 and "'print(6 * 7)'" in twice.messages[2]["content"]


def test_reasoning_is_neither_executed_nor_scored():
    thought = f"<think>Maybe the answer is D.\n{CODE}\nAnswer: D</think>"
    script = Script(thought + CODE, thought + "Answer: B")
    attempt = play(script, QUESTION, tool=echo)
    assert (attempt.answer, attempt.calls) == ("B", 1) and len(attempt.thoughts) == 2
    assert "Answer: D" in attempt.thoughts[0]
    # The next turn does not show it either, as the templates of such models do.
    assert all("<think>" not in m["content"] for m in script.seen[1])
    cut = play(Script("<think>First guess: the answer is D. Let me check"), QUESTION)
    assert (cut.answer, cut.ended) == (None, "no answer")


def test_a_tool_that_breaks_costs_one_call():
    def broken(code):
        raise OSError("no more processes")

    attempt = play(Script(CODE, "Answer: B"), QUESTION, tool=broken)
    assert attempt.correct and attempt.runs == (None,)
    assert "no more processes" in attempt.messages[2]["content"]


def test_a_tool_that_can_run_nothing_here_ends_the_trial():
    def walled(code):
        raise DataError("there is no wall")

    with pytest.raises(DataError, match="no wall"):
        play(Script(CODE, "Answer: B"), QUESTION, tool=walled)


@pytest.mark.parametrize(
    "change",
    [{"answer": ""}, {"answer": "AB"}, {"answer": "E"}, {"answer": None}, {"choice_C": None},
     {"choice_C": " "}, {"context": None}, {"question": ""}],
)  # fmt: skip
def test_records_of_longbench_that_have_no_answer_or_no_text(tmp_path, change):
    good = {"question": "?", **{f"choice_{x}": x for x in "ABCD"}, "answer": "B", "context": "c"}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good]))
    assert read_longbench(path)[0].letter == "B"
    path.write_text(json.dumps([good, {**good, **change}]))
    with pytest.raises(DataError, match="record 2: "):
        read_longbench(path)


def test_without_a_tool_code_is_text():
    attempt = play(Script(CODE + "\nAnswer: B"), QUESTION)
    assert attempt.correct and attempt.calls == 0
    assert "```" not in attempt.messages[0]["content"]


def test_a_chat_that_grows_too_long():
    attempt = play(Script(CODE, TooLong("full")), QUESTION, tool=echo)
    assert (attempt.ended, attempt.answer, attempt.calls) == ("too long", None, 1)
    with pytest.raises(DataError, match=r"calls must be.*got -1"):
        play(Script("B"), QUESTION, calls=-1)


def test_a_trial():
    questions = science(5, seed=3)
    right = {q.question: q.letter for q in questions}

    def endpoint(messages, seed):
        letter = next(a for q, a in right.items() if q in messages[0]["content"])
        return f"Answer: {letter}" if seed % 3 == 0 else "Answer: none"

    seen = []
    trial = evaluate(
        endpoint, questions, samples=6, ks=(1, 3, 6), seed=1, each=lambda *ended: seen.append(ended)
    )
    assert [ended[:2] for ended in seen] == [(i, j) for i in range(5) for j in range(6)]
    counts = [sum(e.correct for e in row) for row in trial.attempts]
    assert 0 < sum(counts) < 30  # chance 1/3: neither has one seed in 10^5
    for rate, k in zip(trial.rates, (1, 3, 6), strict=True):
        mean = sum(pass_at_k(6, c, k) for c in counts) / 5
        assert rate.k == k and rate.mean == pytest.approx(mean) and rate.questions == 5
        assert (rate.low, rate.high) == wilson(rate.mean, 5)
    assert trial.rates[0].mean == pytest.approx(sum(counts) / 30)
    # More samples or fewer questions leave the other tries as they were.
    fewer = evaluate(endpoint, questions[:2], samples=4, seed=1)
    assert fewer.attempts == tuple(row[:4] for row in trial.attempts[:2])
    assert evaluate(endpoint, questions, samples=6, seed=2).attempts != trial.attempts
    summary = json.loads(json.dumps(trial.summary()))
    assert summary["pass_at_k"]["3"]["mean"] == trial.rates[1].mean
    assert sum(summary["ended"].values()) == 30 and summary["tool"]["calls"] == 0


def test_a_trial_counts_calls():
    lines = ["```python\nfail", "```python\nx\n```", "Answer: A"]

    def endpoint(messages, seed):
        return lines[len(messages) // 2]

    def tool(code):
        return Ran("", -9, "wall time", 1.0)

    tools = evaluate(endpoint, [QUESTION], samples=3, tool=tool).summary()["tool"]
    assert tools == {"calls": 6, "not_run": 3, "failed": 3, "stopped": 3}
    for bad in ({"samples": 0}, {"samples": 2, "ks": (3,)}, {"ks": ()}, {"ks": (0,)}):
        with pytest.raises(DataError, match="1 <= k <= samples"):
            evaluate(endpoint, [QUESTION], **bad)
    with pytest.raises(DataError, match="0 questions"):
        evaluate(endpoint, [])


@pytest.fixture(scope="module")
def local():
    tokenizer = train_tokenizer(builtin_prose("train").sentences[:60], 400)
    torch.manual_seed(0)
    model = build(
        dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=1024
    ).eval()
    return model, tokenizer


def test_a_local_model_from_end_to_end(local):
    model, tokenizer = local
    # The checkpoint's own settings must not show.
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    endpoint = LocalEndpoint(model, tokenizer, temperature=1.0, new_tokens=12)
    state = torch.get_rng_state()
    questions = science(2)
    trial = evaluate(endpoint, questions, samples=2, ks=(1, 2), tool=run_python, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert trial == evaluate(endpoint, questions, samples=2, ks=(1, 2), tool=run_python, seed=5)
    assert 0 <= trial.rates[0].mean <= trial.rates[1].mean <= 1
    replies = [row[j].messages[1]["content"] for row in trial.attempts for j in range(2)]
    assert len(set(replies)) > 1
    assert all(row[0].messages[0]["content"].endswith("LETTER") for row in trial.attempts)


def test_local_replies(local):
    model, tokenizer = local
    chat = [{"role": "user", "content": "Say something."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False, return_tensors="pt")
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[0, -1].argmax().view(1, 1)], 1)
    greedy = LocalEndpoint(model, tokenizer, temperature=0, new_tokens=8)
    new = ids[0, start:].tolist()
    if tokenizer.eos_token_id in new:
        new = new[: new.index(tokenizer.eos_token_id)]
    assert greedy(chat, seed=1) == tokenizer.decode(new, skip_special_tokens=True)
    assert greedy(chat, seed=1) == greedy(chat, seed=2)
    # A nucleus that holds one token is greedy too.
    assert LocalEndpoint(model, tokenizer, 1.0, 1e-9, 8)(chat, seed=3) == greedy(chat, seed=1)
    with pytest.raises(TooLong, match="tokens, the model"):
        greedy([{"role": "user", "content": "word " * 5000}], seed=0)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"new_tokens": 0}):
        with pytest.raises(DataError, match="needs temperature >= 0"):
            LocalEndpoint(model, tokenizer, **bad)
    with pytest.raises(DataError, match="no token </think>"):
        LocalEndpoint(model, tokenizer, thinking=5)


def test_a_server():
    with serving(lambda body, i: "Answer: B") as server:
        url = f"{server.url}/"
        endpoint = HTTPEndpoint(url, "small", temperature=0.5, new_tokens=9, key="k-1")
        assert play(endpoint, QUESTION, seed=2**40).correct
    assert server.heads == [("/v1/chat/completions", "Bearer k-1")]
    (asked,) = server.bodies
    assert 0 <= asked.pop("seed") < 2**31
    assert asked.pop("messages")[0]["role"] == "user"
    assert asked == {"model": "small", "temperature": 0.5, "max_tokens": 9}
    assert "k-1" not in repr(endpoint)
    chat = [{"role": "user", "content": "?"}]
    quick = {"retries": 2, "wait": 0.01}
    with serving(lambda body, i: (503, "busy")) as server:
        with pytest.raises(DataError, match=r"answers 503: busy \(3 tries\)"):
            HTTPEndpoint(server.url, "m", **quick)(chat, seed=0)
        assert len(server.bodies) == 3
    with serving(lambda body, i: (401, "no key")) as server:
        with pytest.raises(DataError, match="answers 401: no key"):
            HTTPEndpoint(server.url, "m", **quick)(chat, seed=0)
        assert len(server.bodies) == 1  # it would be refused again
    for text in ("<html>", "[]", '{"choices": []}', '{"choices": [{"message": {}}]}'):
        with (
            serving(lambda body, i, text=text: (200, text)) as server,
            pytest.raises(DataError, match="does not answer as"),
        ):
            HTTPEndpoint(server.url, "m", **quick)(chat, seed=0)
    with serving(lambda body, i: {"content": None}) as server:
        assert HTTPEndpoint(server.url, "m")(chat, seed=0) == ""
    with pytest.raises(DataError, match="cannot be reached"):
        HTTPEndpoint(url, "m", timeout=5, **quick)(chat, seed=0)
