"""Every suite against a server with OpenAI's API, which may be busy, wrong or too small."""

from __future__ import annotations

import json
import time

import pytest
from commands import flags, read_json, refused, run
from openai_server import serving

from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError
from metafocus.evals import babilong, builtin_prose, ruler
from metafocus.evals.agentic import HTTPEndpoint, TooLong, evaluate, play, run_python, science
from metafocus.evals.agentic.long_answers import endpoint_answers
from metafocus.evals.agentic.tool_calls import tool_call

CHAT = [{"role": "user", "content": "?"}]
QUICK = {"retries": 3, "wait": 0.01}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(builtin_prose("train").sentences[:200], 700).save_pretrained(folder)
    return folder


def test_a_busy_server_is_asked_again():
    codes = [503, 429, 502]
    with serving(lambda body, i: (codes[i], "busy") if i < 3 else "Answer: A") as server:
        assert HTTPEndpoint(server.url, "m", **QUICK)(CHAT, seed=0) == "Answer: A"
        assert len(server.bodies) == 4
    with serving(lambda body, i: (200, "{") if i < 2 else "good") as server:  # cut off
        assert HTTPEndpoint(server.url, "m", **QUICK)(CHAT, seed=0) == "good"


@pytest.mark.parametrize(
    "broken",
    [
        b'HTTP/1.0 200 OK\r\nContent-Length: 999\r\n\r\n{"choices": [',  # it stopped in between
        b"HTTP/1.0 503 Busy\r\nContent-Length: 999\r\n\r\nbus",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n{",
        b"",
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    ],
)
def test_a_reply_that_breaks_off_is_asked_for_again(broken):
    with serving(lambda body, i: broken if i < 2 else "good") as server:
        assert HTTPEndpoint(server.url, "m", **QUICK)(CHAT, seed=0) == "good"
    with serving(lambda body, i: broken) as server, pytest.raises(DataError, match="4 tries"):
        HTTPEndpoint(server.url, "m", **QUICK)(CHAT, seed=0)


@pytest.mark.parametrize("status", [301, 302, 303])
def test_the_key_does_not_follow_to_another_server(status):
    with serving(lambda body, i: "stolen") as other:
        moved = f"HTTP/1.0 {status} Moved\r\nLocation: {other.url}\r\n\r\n".encode()
        with serving(lambda body, i: moved) as server, pytest.raises(DataError):
            HTTPEndpoint(server.url, "m", key="k-1", **QUICK)(CHAT, seed=0)
    assert server.heads[0][1] == "Bearer k-1"
    assert {key for _, key in other.heads} == {None} and other.bodies == []


def test_waits_double_and_follow_the_server(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with serving(lambda body, i: (503, "busy")) as server, pytest.raises(DataError, match="busy"):
        HTTPEndpoint(server.url, "m", retries=8, wait=1.0)(CHAT, seed=0)
    own = [wait for wait in waits if wait >= 1]  # the server's thread sleeps less
    assert own == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
        "Requested tokens (5000) exceed context window of 4096",
        "the request exceeds the available context size, try increasing it",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096",
        '{"error": {"code": "context_length_exceeded"}}',
        "The prompt is too long: 5000",
    ],
)
def test_a_chat_that_is_too_long_for_the_server(said):
    with serving(lambda body, i: (400, said)) as server:
        with pytest.raises(TooLong):
            HTTPEndpoint(server.url, "m", **QUICK)(CHAT, seed=0)
        assert len(server.bodies) == 1
    with (
        serving(lambda body, i: (400, "temperature must be positive")) as server,
        pytest.raises(DataError, match="answers 400: temperature"),
    ):
        HTTPEndpoint(server.url, "m", **QUICK)(CHAT, seed=0)


def test_one_chat_that_is_too_long_does_not_stop_an_evaluation():
    def reply(body, i):
        return (400, "maximum context length is 4096") if i == 29 else "Answer: A"

    with serving(reply) as server:
        trial = evaluate(HTTPEndpoint(server.url, "m"), science(60))
    assert trial.summary()["ended"] == {"answered": 59, "too long": 1}


def test_a_prompt_that_is_too_long_has_an_empty_answer(tokenizer):
    items = babilong.generate(ruler_count(tokenizer), task="qa4", length=0, n=3)
    kept = {}
    with serving(lambda body, i: (400, "maximum context length") if i == 1 else "east") as server:
        endpoint_answers(HTTPEndpoint(server.url, "m"), items, kept.update)
    assert kept == {0: "east", 1: "", 2: "east"}


def test_native_calls_and_reasoning_become_text():
    call = {"function": {"name": "python", "arguments": '{"code": "print(40 + 2)"}'}}
    first = {"content": None, "tool_calls": [call, call], "reasoning_content": "Answer: D"}
    question = science(1)[0]
    with serving(lambda body, i: first if i == 0 else f"Answer: {question.letter}") as server:
        attempt = play(HTTPEndpoint(server.url, "m"), question, tool=run_python)
        assert [m["role"] for m in server.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert attempt.correct and attempt.calls == 1 and attempt.thoughts == ("Answer: D", "")
    assert attempt.messages[2]["content"] == "Output:\n42\n"
    del first["content"], first["reasoning_content"]  # as text-generation-inference sends it
    with serving(lambda body, i: first) as server:
        reply = HTTPEndpoint(server.url, "m")(CHAT, seed=0)
    assert reply.startswith("<tool_call>") and tool_call(reply).code == "print(40 + 2)"


def test_requests_at_the_same_time_give_the_same_result():
    def reply(body, i):
        time.sleep(0.05)
        return f"Answer: {'ABCD'[body['seed'] % 4]}"

    with serving(reply) as server:
        endpoint = HTTPEndpoint(server.url, "m")
        together = evaluate(endpoint, science(8), samples=2, concurrency=4)
        assert 1 < server.most <= 4
        server.most = 0
        assert together == evaluate(endpoint, science(8), samples=2)
        assert server.most == 1


def solved(items):
    """A reply with the right answer, found by the question in the prompt."""
    known = {item.question: item.answer.removeprefix(item.answer_prefix) for item in items}

    def reply(body, i):
        text = body["messages"][-1]["content"]
        return next(answer for question, answer in known.items() if question in text)

    return reply


@pytest.mark.parametrize(("suite", "tasks"), [("babilong", "qa4"), ("ruler", "niah_single_1,vt")])
def test_long_suites_by_a_server(tokenizer, tmp_path, suite, tasks):
    count = ruler_count(tokenizer)
    make = babilong.generate if suite == "babilong" else ruler.generate
    items = [
        item
        for task in tasks.split(",")
        for item in make(count, task=task, length=700, n=3, seed=42, prose=builtin_prose("heldout"))
    ]
    settings = {"suite": suite, "tasks": tasks, "lengths": "700", "n": 3, "concurrency": 2}
    with serving(solved(items)) as server:
        words = flags(
            endpoint=server.url, endpoint_model="m", model_name_or_path=tokenizer,
            output_dir=tmp_path / "out", **settings,
        )  # fmt: skip
        ran = run("eval", *words)
    assert ran.code == 0, ran.err
    assert len(server.bodies) == len(items)
    assert {body["temperature"] for body in server.bodies} == {0.0}
    assert {body["max_tokens"] for body in server.bodies} == {item.new_tokens for item in items}
    for cell in read_json(tmp_path / "out" / "eval.json")["cells"]:
        assert all(score["mean"] == 1 for score in cell["scores"].values())
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["question"] for line in lines] == [item.question for item in items]


def ruler_count(folder):
    from transformers import AutoTokenizer

    from metafocus.evals.run import prompt_counter

    return prompt_counter(AutoTokenizer.from_pretrained(folder))


def test_science_and_gpqa_by_a_server(tmp_path):
    rows = ["Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3"]
    rows += [f"Question {i}?,r,a,b,c" for i in range(5)]
    (tmp_path / "gpqa.csv").write_text("\n".join(rows))
    for suite, more in (("science", {"n": 5}), ("gpqa", {"gpqa_file": tmp_path / "gpqa.csv"})):
        with serving(lambda body, i: "Answer: B") as server:
            words = flags(
                suite=suite, endpoint=server.url, endpoint_model="m", samples=2, concurrency=3,
                output_dir=tmp_path / suite, **more,
            )  # fmt: skip
            ran = run("eval", "--no_tool", *words)
        assert ran.code == 0, ran.err
        assert len(server.bodies) == 10
        assert read_json(tmp_path / suite / "eval.json")["ended"] == {"answered": 10}


def test_words_of_a_server(tmp_path, monkeypatch):
    base = ("eval", *flags(suite="science", n=1, output_dir=tmp_path / "out"))
    assert "name a directory or hub id, or a server" in refused(*base)
    assert "must begin with http" in refused(*base, *flags(endpoint="localhost:8000"))
    assert "--endpoint_model is missing" in refused(*base, *flags(endpoint="http://localhost"))
    here = flags(endpoint="http://127.0.0.1:9/v1", endpoint_model="m", retries=0)
    monkeypatch.delenv("A_KEY", raising=False)
    assert "A_KEY is not set" in refused(*base, *here, *flags(endpoint_key_env="A_KEY"))
    long = ("eval", *flags(suite="ruler", output_dir=tmp_path / "out"), *here)
    assert "of the tokenizer" in refused(*long)
    with serving(lambda body, i: "Answer: B") as server:
        monkeypatch.setenv("A_KEY", "k-1")
        words = flags(endpoint=server.url, endpoint_model="m", endpoint_key_env="A_KEY", k=1)
        ran = run(*base, *words, "--no_tool", *flags(samples=1, enable_thinking="")[:-1])
        assert ran.code == 0, ran.err
        body = server.bodies[0]
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert body["max_tokens"] == 1024 + 2048
    for path in (tmp_path / "out").iterdir():
        assert "k-1" not in path.read_text()
