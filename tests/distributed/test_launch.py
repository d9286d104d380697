"""The launch lines of docs/distributed.md, on two processes of this machine."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import QUIET, SHORT, SMALL, chat, report, write

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
ONE_NODE = re.findall(r"^(?:torchrun|accelerate launch) .*focusft\.yaml.*$", PAGE.read_text(), re.M)
ACCELERATE = f"{sys.executable} -m accelerate.commands.accelerate_cli"

pytestmark = pytest.mark.slow


def line(first: str) -> str:
    """The command of the page that begins so, with its continuation lines."""
    (found,) = re.findall(rf"^{re.escape(first)}(?:.*\\\n)*.*$", PAGE.read_text(), re.M)
    return found.replace("\\\n", " ")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def settings(tmp_path: Path, output: Path, **changes) -> str:
    """A file of settings in the place of the page's one."""
    data = tmp_path / "chats.jsonl"
    if not data.exists():
        write(data, *map(chat, range(40)))
    every = {**SMALL, **QUIET, **SHORT, "train_file": data, "output_dir": output, **changes}
    path = tmp_path / f"{output.name}.yaml"
    path.write_text(
        yaml.safe_dump({k: str(v) if isinstance(v, Path) else v for k, v in every.items()})
    )
    return str(path)


def adapted(text: str, config: str, processes: int) -> list[str]:
    """Words of a line, for some processes on each node, this Python and a small run."""
    text = re.sub(r"examples/configs/\S+\.yaml|run\.yaml", config, text)
    text = re.sub(r"--(nproc-per-node=|num_processes )8", rf"--\g<1>{processes}", text)
    # accelerate counts GPUs and would start one process without any, unless it is told.
    text = re.sub(r"^accelerate launch", f"{ACCELERATE} launch --multi_gpu", text)
    return shlex.split(re.sub(r"^torchrun", f"{sys.executable} -m torch.distributed.run", text))


def environment(**more: str) -> dict[str, str]:
    places = [str(PAGE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places), **more}


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in report(folder)["history"]]


def agrees(folder: Path, tmp_path: Path) -> None:
    """Two processes train as one that takes the batches of both."""
    config = settings(tmp_path, tmp_path / "alone", gradient_accumulation_steps=2)
    command = [sys.executable, "-m", "metafocus", "train", config]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # float32: sums in another order.
    assert losses(folder) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


@pytest.mark.parametrize("text", ONE_NODE)
def test_one_node(tmp_path, text):
    config = settings(tmp_path, tmp_path / "node", ddp_backend="gloo")
    command = adapted(text, config, processes=2)
    there = environment(MASTER_PORT=str(free_port()))
    done = subprocess.run(command, env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    agrees(tmp_path / "node", tmp_path)


def test_two_nodes(tmp_path):
    """Two agents of torchrun that meet at a port, as on two machines."""
    text = line("torchrun --nnodes=2").replace("node0:29500", f"127.0.0.1:{free_port()}")
    config = settings(tmp_path, tmp_path / "nodes", ddp_backend="gloo")
    # Both agents are on this machine, whose name need not lead to it.
    text = text.replace("--nnodes=2", "--nnodes=2 --local-addr=127.0.0.1")
    command = adapted(text, config, processes=1)
    nodes = [
        subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for node in nodes:
        _, told = node.communicate(timeout=600)
        assert node.returncode == 0, told
    agrees(tmp_path / "nodes", tmp_path)


def test_slurm_through_submitit(tmp_path, monkeypatch):
    """The command of the page by submitit's local executor; Slurm's two facts are made up."""
    submitit = pytest.importorskip("submitit")
    text = "".join(re.findall(r'^    "(.*)"$', PAGE.read_text().split("launch = (")[1], re.M)[:3])
    text = text.replace(":29500", f":{free_port()}").replace("node=8", "node=2")
    config = settings(tmp_path, tmp_path / "job", ddp_backend="gloo")
    launch = text.replace("run.yaml", config).replace(
        "torchrun", f"{sys.executable} -m torch.distributed.run --local-addr=127.0.0.1", 1
    )
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && echo 127.0.0.1\n')
    (bin_ / "scontrol").chmod(0o755)
    path = f"{bin_}{os.pathsep}{os.environ['PATH']}"
    for name, value in environment(PATH=path, SLURM_NNODES="1", SLURM_NODELIST="here").items():
        monkeypatch.setenv(name, value)
    executor = submitit.LocalExecutor(folder=tmp_path / "slurm")
    executor.update_parameters(timeout_min=10)
    executor.submit(submitit.helpers.CommandFunction(["bash", "-c", launch])).result()
    agrees(tmp_path / "job", tmp_path)
