"""A killed evaluation, a full disk and failed requests cost one batch of answers at most."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from commands import flags, read_json, run
from openai_server import serving

from metafocus.cli import evaluate
from metafocus.data.tokenizer import train_tokenizer
from metafocus.evals import builtin_prose
from metafocus.models import small

EVAL = (sys.executable, "-m", "metafocus", "eval")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(builtin_prose("train").sentences[:100], 500).save_pretrained(folder)
    return folder


def outputs(path):
    return {
        tuple(record["key"]): record["output"]
        for record in map(json.loads, path.read_text().splitlines())
    }


def reply(body, i):
    return f"The answer to a prompt of {len(body['messages'][0]['content'])} characters."


def words(tokenizer, url, out, **more):
    return flags(
        suite="babilong", tasks="qa1,qa4", lengths="0k,500", n=5, endpoint=url,
        endpoint_model="m", model_name_or_path=tokenizer, output_dir=out, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with serving(reply) as server:
        assert run("eval", *words(tokenizer, server.url, out)).code == 0
    return outputs(out / "answers.jsonl"), read_json(out / "eval.json")["cells"]


@pytest.mark.parametrize("after", [0, 1, 7, 19])
def test_a_killed_evaluation_goes_on_where_it_was(tokenizer, tmp_path, undisturbed, after):
    """The server answers `after` requests and then none, so the moment of the kill is known."""
    stuck, release = threading.Event(), threading.Event()

    def stops(body, i):
        if i == after:
            stuck.set()
            release.wait(60)
        return reply(body, i)

    out = tmp_path / "out"
    with serving(stops) as server:
        process = subprocess.Popen([*EVAL, *words(tokenizer, server.url, out)])
        assert stuck.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        release.set()
    kept = outputs(out / "answers.jsonl")
    assert len(kept) == after and kept.items() <= undisturbed[0].items()
    assert not (out / "eval.json").exists()
    with serving(reply) as server:  # at another address
        ran = run("eval", *words(tokenizer, server.url, out))
        assert ran.code == 0, ran.err
        assert len(server.bodies) == 20 - after
    assert (f"{after} answers of an earlier run are kept" in ran.err) == bool(after)
    assert (outputs(out / "answers.jsonl"), read_json(out / "eval.json")["cells"]) == undisturbed


def test_more_questions_later_ask_only_the_new_ones(tokenizer, tmp_path):
    out = tmp_path / "out"
    with serving(lambda body, i: (500, "no") if i >= 7 else reply(body, i)) as server:
        ran = run("eval", *words(tokenizer, server.url, out, retries=0))
        assert ran.code == 2 and "run the same command again" in ran.err
    with serving(reply) as server:
        more = words(tokenizer, server.url, out)
        more[more.index("--n") + 1] = "6"
        assert run("eval", *more).code == 0
        assert len(server.bodies) == 4 * 6 - 7


def test_one_failed_request_costs_one_answer(tokenizer, tmp_path, undisturbed):
    out = tmp_path / "out"
    with serving(lambda body, i: (400, "odd") if i == 3 else reply(body, i)) as server:
        ran = run("eval", *words(tokenizer, server.url, out))
    assert ran.code == 2 and "1 requests failed" in ran.err
    # The first cell is answered except for one; the others were not begun.
    assert len(outputs(out / "answers.jsonl")) == 4
    with serving(reply) as server:
        assert run("eval", *words(tokenizer, server.url, out)).code == 0
        assert len(server.bodies) == 16
    assert outputs(out / "answers.jsonl") == undisturbed[0]


def test_a_crash_in_a_later_batch_keeps_the_batches_before_it(tmp_path, monkeypatch):
    """A local model that runs out of memory in its third cell."""
    model, tokenizer = small(builtin_prose("train").sentences[:100], vocab_size=500,
                             hidden_size=64, num_hidden_layers=1, max_length=4096)  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    real, calls = evaluate.answers, []

    def fails(*args, **kwargs):
        calls.append(len(args[2]))
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory (simulated)")
        return real(*args, **kwargs)

    argv = flags(
        suite="babilong", tasks="qa1,qa4", lengths="0k,500", n=3,
        model_name_or_path=tmp_path / "model", output_dir=tmp_path / "out",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "answers", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            run("eval", *argv)
    path = tmp_path / "out" / "answers.jsonl"
    before = outputs(path)
    assert len(before) == 6
    # A smaller batch is the way on.
    ran = run("eval", *argv, "--per_device_eval_batch_size", 1)
    assert ran.code == 0 and "6 answers of an earlier run are kept" in ran.err
    assert len(outputs(path)) == 12 and before.items() <= outputs(path).items()
    # A model that was trained on in between is another model.
    (tmp_path / "out" / "eval.json").unlink()
    for weight in model.parameters():
        weight.data += 1
    model.save_pretrained(tmp_path / "model")
    ran = run("eval", *argv)
    assert ran.code == 2 and "other settings (files was" in ran.err


FULL = """\
import sys
from metafocus.errors import DataError
from metafocus.evals.journal import Journal
with Journal(sys.argv[1], {}) as journal:
    try:
        for i in range(10_000):
            journal.add([(("s", "t", 0, i), "p", {"output": "x" * 3000})])
    except DataError as error:
        print(i, error)
"""


def test_a_full_disk_keeps_what_was_answered(tmp_path):
    """A disk of 64 KiB in a mount namespace of its own."""
    disk, copy = tmp_path / "disk", tmp_path / "copy.jsonl"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {disk}"
    start = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*start, mount]).returncode:
        pytest.skip("this kernel lets users mount no disk of their own")
    code = (
        f"{mount} && {sys.executable} -c '{FULL}' {disk}/answers.jsonl && cp {disk}/*.jsonl {copy}"
    )
    done = subprocess.run([*start, code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed_at = int(done.stdout.split()[0])
    assert failed_at > 5 and "No space left" in done.stdout
    assert f"{failed_at} answers are kept" in done.stdout
    lines = copy.read_text().splitlines()
    assert [json.loads(line)["key"][3] for line in lines] == list(range(failed_at))


def test_two_evaluations_do_not_mix(tokenizer, tmp_path):
    stuck, release = threading.Event(), threading.Event()

    def waits(body, i):
        stuck.set()
        release.wait(60)
        return reply(body, i)

    out = tmp_path / "out"
    with serving(waits) as server:
        process = subprocess.Popen([*EVAL, *words(tokenizer, server.url, out)])
        assert stuck.wait(60)
        second = run("eval", *words(tokenizer, server.url, out))
        release.set()
        assert process.wait() == 0
    assert second.code == 2 and "being written by another evaluation" in second.err
    assert len(outputs(out / "answers.jsonl")) == 20


def test_nothing_is_replaced_without_being_asked(tokenizer, tmp_path):
    out = tmp_path / "out"
    with serving(reply) as server:
        argv = words(tokenizer, server.url, out)
        assert run("eval", *argv).code == 0
        before = (out / "answers.jsonl").read_bytes()
        ran = run("eval", *argv)
        assert ran.code == 2 and "this evaluation is finished" in ran.err
        assert (out / "answers.jsonl").read_bytes() == before and len(server.bodies) == 20
        assert run("eval", *argv, "--overwrite_output_dir").code == 0
        assert len(server.bodies) == 40
