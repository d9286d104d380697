"""What a user gets: quiet, small at import, whole as a wheel, the same bytes at every build."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from commands import chat, training, write

import metafocus as mf

ROOT = Path(__file__).parent.parent
LEAST = (3, 10)
HEAVY = ["transformers", "peft", "accelerate", "safetensors", "matplotlib", "pandas", "sklearn"]
BUDGET = 180
"""Modules beyond those of `import torch`; with a margin of one half for what torch's parts do."""


def python(*words: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# --- import ------------------------------------------------------------------------------------


def test_importing_warns_of_nothing():
    # torch's own import is not ours to judge.
    code = "import torch, warnings; warnings.simplefilter('error'); import metafocus"
    assert python("-c", code) == ""


def test_help_warns_of_nothing():
    code = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "from metafocus.__main__ import main\n"
        "for words in ([], ['compare'], ['train'], ['profile'], ['eval']):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as left: assert left.code == 0"
    )
    assert python("-c", code).count("usage: metafocus") == 5


def test_importing_stays_within_its_budget():
    """Counted in modules: seconds depend on who else uses the machine."""
    code = (
        "import json, sys, torch; before = set(sys.modules); import metafocus;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    added = json.loads(python("-c", code))
    names = {name.partition(".")[0] for name in added}
    assert not names & set(HEAVY)
    own = [name for name in added if name.startswith("metafocus")]
    assert len(added) - len(own) <= BUDGET, sorted(set(added) - set(own))


# --- the source --------------------------------------------------------------------------------

SOURCES = sorted((ROOT / "metafocus").rglob("*.py"))


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("unrolled", "mf.Unrolled"),
        ("focusft", "mf.recipes.focusft"),
        ("MAML", "mf.recipes.fewshot.maml"),
        ("evolution", "mf.algorithms.Evolution"),
    ],
)
def test_a_name_that_is_elsewhere(name, right):
    with pytest.raises(AttributeError, match=f"no attribute '{name}': write {right}$"):
        getattr(mf, name)


def test_the_oldest_python_can_read_every_file():
    for path in SOURCES:
        ast.parse(path.read_text(), filename=str(path), feature_version=LEAST)


# --- wheel and sdist ---------------------------------------------------------------------------


def build(kind: str, place: Path) -> Path:
    """Build with the very back end that pyproject.toml names, without a network."""
    pytest.importorskip("hatchling")
    place.mkdir()
    code = f"from hatchling.build import build_{kind}; print(build_{kind}({str(place)!r}))"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    name = python("-c", code, cwd=ROOT, env=environment).strip().splitlines()[-1]
    return place / name


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_two_builds_are_equal(tmp_path, kind):
    first, second = build(kind, tmp_path / "a"), build(kind, tmp_path / "b")
    assert first.name == second.name
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (first, second)]
    assert digests[0] == digests[1]


def test_what_the_wheel_holds(tmp_path):
    with zipfile.ZipFile(build("wheel", tmp_path / "a")) as wheel:
        names = wheel.namelist()
        (meta,) = (name for name in names if name.endswith("METADATA"))
        metadata = wheel.read(meta).decode()
    assert "metafocus/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"metafocus", "metafocus_claims.py", meta.partition("/")[0]}
    sources = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert sources <= set(names)
    assert not [name for name in names if "test" in Path(name).parts or "__pycache__" in name]
    assert re.search(r"^Requires-Python: >=3\.10$", metadata, re.MULTILINE)
    assert "file:" not in metadata and "/opt/" not in metadata


def test_what_the_sdist_holds(tmp_path):
    with tarfile.open(build("sdist", tmp_path / "a")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "metafocus/py.typed"} <= names
    assert not [name for name in names if ".venv" in name or "__pycache__" in name]


# --- full disks --------------------------------------------------------------------------------


def test_a_disk_that_is_full(tmp_path, limit=100_000):
    """A limit on the size of files stands for it: one line, and no report of a whole checkpoint."""
    chats = write(tmp_path / "chats.jsonl", *map(chat, range(4)))
    words = training(chats, tmp_path / "run", max_steps=1)
    command = [sys.executable, "-m", "metafocus", *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("metafocus: error: ") and "could not be written to" in last
    assert "File too large" in last and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metafocus.json").exists()
