"""The disk store in bad directories and in processes that die: nothing is left or lost."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import loops
import pytest
import torch
from loops import PROBLEM
from problems import assert_close

import metafocus as mf

STEPS = 6
CASE = loops.case(tasks=1, steps=STEPS)


def loss_with(store):
    meta = mf.bilevel(PROBLEM, solver=loops.solver(STEPS), estimator=mf.Unrolled(store=store))
    leaves = CASE.leaves()
    return meta(leaves, CASE.episode())[0], leaves


def grads(leaves):
    return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}


def wanted():
    loss, leaves = loss_with(None)
    loss.backward()
    return grads(leaves)


def test_files_are_there_until_the_backward_pass_is_over(tmp_path):
    loss, leaves = loss_with(mf.stores.disk(tmp_path))
    (own,) = tmp_path.iterdir()
    assert len(list(own.glob("*.safetensors"))) == STEPS - 1
    loss.backward()
    assert list(tmp_path.iterdir()) == []
    assert_close(grads(leaves), wanted(), 1e-12)


def test_files_go_with_the_graph(tmp_path):
    loss, _ = loss_with(mf.stores.disk(tmp_path))
    assert list(tmp_path.iterdir())
    del loss
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_bytes(b"mine too")
    first, one = loss_with(mf.stores.disk(tmp_path))
    # A second run while the first one waits for its backward pass.
    second, two = loss_with(mf.stores.disk(tmp_path))
    second.backward()
    first.backward()
    assert_close(grads(one), wanted(), 1e-12)
    assert_close(grads(two), wanted(), 1e-12)
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", "model.safetensors"}


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(mf.errors.DataError, match=r"store directory '.*file' is not writable"):
        loss_with(mf.stores.disk(tmp_path / "file"))


def test_a_directory_that_cannot_be_written():
    # Not by permission bits, which do not bind a superuser.
    with pytest.raises(mf.errors.DataError, match="is not writable"):
        loss_with(mf.stores.disk("/proc/metafocus"))


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind a superuser")
def test_a_directory_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(mf.errors.DataError, match="is not writable"):
            loss_with(mf.stores.disk(tmp_path))
    finally:
        tmp_path.chmod(0o700)


def test_a_state_that_vanishes_is_named(tmp_path):
    loss, leaves = loss_with(mf.stores.disk(tmp_path))
    (own,) = tmp_path.iterdir()
    for file in own.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(mf.errors.DataError, match="has lost a state"):
        loss.backward(retain_graph=True)
    assert list(tmp_path.iterdir()) == []
    # The graph is whole: the steps are taken again.
    loss.backward()
    assert_close(grads(leaves), wanted(), 1e-12)


def run(code: str, folder: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    head = (
        "import os, resource, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, loops, metafocus as mf\n"
        "from test_stores_disk import loss_with\n"
        f"store = mf.stores.disk({str(folder)!r})\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + code],
        capture_output=True,
        text=True,
        timeout=300,
        check=check,
    )


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    # A limit on the size of files is the full disk that needs no rights to make.
    code = (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: loss_with(store)\n"
        "except mf.errors.DataError as error: print(error)\n"
    )
    out = run(code, tmp_path).stdout
    assert "cannot hold another state" in out
    assert "mf.stores.schedule(slots, on=mf.stores.disk(directory))" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_is_killed_in_the_backward_pass(tmp_path):
    code = (
        "loss, _ = loss_with(store)\n"
        "from metafocus.estimators import reverse\n"
        "reverse.Reverse.step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "loss.backward()\n"
    )
    (tmp_path / "notes.txt").write_text("mine")
    assert run(code, tmp_path, check=False).returncode == -signal.SIGKILL
    left = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert len(left) == 1
    assert list(left[0].glob("*.safetensors"))
    loss, leaves = loss_with(mf.stores.disk(tmp_path))
    assert not left[0].exists()
    loss.backward()
    assert_close(grads(leaves), wanted(), 1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_process_that_ends_before_the_backward_pass(tmp_path):
    run("loss, _ = loss_with(store)\n", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_states_come_back_as_they_were(tmp_path):
    shelf = mf.stores.disk(tmp_path).place.open()
    x = torch.randn(2, 3, 4, 5)
    state = [
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(0, 3),
        x[0, 0, 0].expand(3, 5),
        torch.randn(3, dtype=torch.complex128),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.tensor(3),
        torch.tensor(True),
        torch.randn(4).bfloat16(),
        torch.empty(0, 2),
        x,
        x[0],
    ]
    shelf.put(1, state)
    for before, after in zip(state, shelf.get(1), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
        if 0 not in before.stride():
            assert before.stride() == after.stride()
    shelf.close()
    shelf.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_cannot_keep_is_named(tmp_path):
    shelf = mf.stores.disk(tmp_path).place.open()
    with pytest.raises(mf.errors.ProblemError, match=r"plain tensors.*torch.sparse_coo"):
        shelf.put(1, [torch.eye(2).to_sparse()])
    shelf.close()
