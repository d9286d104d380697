"""Hashes of content: what changes a result changes them, and nothing else does."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import hashed
import pytest
import torch
from comparing import PROBLEM
from torch import nn

import metafocus as mf
from metafocus import digests
from metafocus.digests import digest


def scaled(factor):
    return lambda x: factor * x


def test_content():
    assert digest(scaled(2.0)) == digest(scaled(2.0)) != digest(scaled(3.0))
    assert digest(mf.CG(5)) != digest(mf.CG(6))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(torch.zeros(3)) != digest(torch.zeros(3, 1)) != digest(torch.zeros(3).double())
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    meta = [mf.bilevel(PROBLEM, solver=mf.SGD(r, 2), estimator=mf.Unrolled()) for r in (0.1, 0.2)]
    assert digest(meta[0]) != digest(meta[1])
    one, two = (nn.Linear(2, 2) for _ in range(2))
    assert digest(one) == digest(one) != digest(two)
    assert digest(one.weight) != digest(one.weight.requires_grad_(False))


def test_equal_parts_need_not_be_one_object():
    x = torch.ones(2)
    assert digest([x, x]) == digest([x, x.clone()])
    f, g = scaled(1.0), scaled(2.0)
    assert digest([f, g, f]) != digest([f, g, g])


def run(process_seed):
    environment = {**os.environ, "PYTHONHASHSEED": str(process_seed)}
    here = Path(__file__).parent
    command = [sys.executable, here / "hashed.py"]
    path = os.pathsep.join([str(here.parent), environment.get("PYTHONPATH", "")])
    environment["PYTHONPATH"] = path
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.slow
def test_every_process_finds_the_same():
    """Sets come in another order in each: also those inside of constants of the code."""
    here = {name: digest(value) for name, value in hashed.values().items()}
    first, second = run(1), run(2)
    assert first == second == here
    assert len(set(here.values())) == len(here)


def test_using_an_object_does_not_change_it():
    values = hashed.values()
    before = {name: digest(value) for name, value in values.items()}
    assert values["plain"].many == 3 and hashed.kept(1) == 2
    values["module"](torch.ones(2))
    mf.hypergrad(values["meta"])({"w": torch.zeros(2)}, mf.Episode(torch.ones(2), torch.ones(2)))
    assert {name: digest(value) for name, value in values.items()} == before


# --- code ------------------------------------------------------------------------------------

BASE = """
import math
import {helper} as helper
from {helper} import shift
RATE = 0.1
TABLE = {{"a": [1, 2]}}
NETS = [object]

def inside(x):
    return RATE * x

def read(x):
    return [inside(y) for y in [x, TABLE["a"][0]]]

def far(x):
    return helper.deep.shift(x) + shift(x)

class Base:
    def scale(self, x):
        return 2 * x

class Loss(Base):
    power = 2

    def __call__(self, x):
        return self.scale(x) ** self.power
"""
HELPER = """
deep = __import__(__name__)
OFFSET = 1

def shift(x):
    return x + OFFSET
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Modules of a user, written and imported under new names, as after a restart of Python."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = iter(range(100))

    def write(change=("", ""), change_helper=("", "")):
        folder = tmp_path / f"version{next(count)}"
        folder.mkdir()
        (folder / "user_helper.py").write_text(HELPER.replace(*change_helper))
        (folder / "user_code.py").write_text(BASE.format(helper="user_helper").replace(*change))
        monkeypatch.syspath_prepend(str(folder))
        for name in ("user_code", "user_helper"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("user_code")

    yield write
    for name in ("user_code", "user_helper"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        (lambda m: m.read, ("RATE * x", "RATE + x")),
        (lambda m: m.read, ("RATE = 0.1", "RATE = 0.2")),
        (lambda m: m.read, ('"a": [1, 2]', '"a": [1, 3]')),
        (lambda m: m.Loss(), ("2 * x", "3 * x")),
        (lambda m: m.Loss(), ("self.scale(x) **", "self.scale(x) *")),
        (lambda m: m.Loss(), ("power = 2", "power = 3")),
        (lambda m: m.Loss, ("power = 2", "power = 3")),
        (lambda m: m.Loss().scale, ("2 * x", "3 * x")),
        (lambda m: functools.partial(m.inside, 3), ("RATE * x", "RATE + x")),
        (lambda m: functools.cache(m.inside), ("RATE * x", "RATE + x")),
    ],
)
def test_code_that_changes(written, what, change):
    before, again, after = (digest(what(written(c))) for c in (("", ""), ("", ""), change))
    assert before == again != after


@pytest.mark.parametrize("change", [("x + OFFSET", "x - OFFSET"), ("OFFSET = 1", "OFFSET = 2")])
def test_code_of_another_file_that_changes(written, change):
    before, after = digest(written().far), digest(written(change_helper=change).far)
    assert before != after
    # What is not read does not matter.
    assert digest(written().read) == digest(written(change_helper=change).read)


def test_what_a_function_does_not_read_does_not_matter(written):
    before, after = (digest(written(c).inside) for c in (("", ""), ('"a": [1, 2]', '"a": [3]')))
    assert before == after


def test_a_global_that_hides_what_it_holds_is_named(written):
    module = written(("NETS = [object]", "import threading\nRATE = threading.Lock()"))
    with pytest.raises(mf.errors.ProblemError, match="inside reads 'RATE': lock cannot be hashed"):
        digest(module.read)
    lock = threading.Lock()
    with pytest.raises(mf.errors.ProblemError, match="lock cannot be hashed"):
        digest(lambda: lock)
    with pytest.raises(mf.errors.ProblemError, match="generator cannot be hashed"):
        digest(x for x in "a")


# --- modules and versions --------------------------------------------------------------------


def test_modules():
    before = digest(hashed.net())
    assert digest(hashed.net()) == before
    changes = {
        "a buffer that is not saved": lambda net: net.mean.add_(1),
        "a function that it holds": lambda net: setattr(net, "act", torch.sigmoid),
        "its mode": lambda net: net.eval(),
        "a hook": lambda net: net.layer.register_forward_hook(lambda m, args, out: 2 * out),
        "an attribute of a layer": lambda net: setattr(net.layer, "scale", 2.0),
        "a lock in a layer of a library": lambda net: setattr(net.layer, "lock", threading.Lock()),
        "a lock of its own": lambda net: setattr(net, "lock", threading.Lock()),
    }
    for what, change in changes.items():
        net = hashed.net()
        change(net)
        if what == "a lock of its own":
            with pytest.raises(mf.errors.ProblemError, match="lock cannot be hashed"):
                digest(net)
        else:
            assert (digest(net) == before) == ("library" in what), what


def test_tied_weights():
    tied, equal = (nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))
    tied[1].weight = tied[0].weight
    equal.load_state_dict(tied.state_dict())
    assert digest(tied) != digest(equal)


def test_binding_fast_weights_leaves_no_trace():
    """Slots are hooks of this package: they stay, and do nothing while they are empty."""
    net = hashed.net()
    before = digest(net)
    adapter = mf.LoRA(mf.matching("layer"), rank=1)
    with adapter.bind(net, adapter.init(net, torch.Generator().manual_seed(0))):
        net(torch.ones(2))
    assert digest(net) == before


def test_versions(monkeypatch):
    before = digest(1)
    with monkeypatch.context() as changed:
        changed.setattr(torch, "__version__", "9.9")
        assert digest(1) != before
    with monkeypatch.context() as changed:
        changed.setattr(digests, "_own_code", lambda: "another release")
        assert digest(1) != before
    assert digest(1) == before
    torch.set_default_dtype(torch.float64)
    try:
        assert digest(1) != before
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiled_functions_count_by_their_code():
    def double(x):
        return 2 * x

    one, two = (torch.compile(f, backend="eager") for f in (double, lambda x: 3 * x))
    before = digest(one)
    assert before != digest(two)
    one(torch.ones(2))
    assert digest(one) == before
