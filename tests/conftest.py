"""What every test gets: one thread, one seed, and float64 where a module asks for it."""

from __future__ import annotations

import warnings

import pytest
import torch

from metafocus.preflight import rebuilt

torch.set_num_threads(1)

with warnings.catch_warnings():
    # torch registers the decompositions of its first jvp with a deprecated call of its own.
    # It is a DeprecationWarning, from torch 2.14 on a FutureWarning.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    torch.func.jvp(torch.sin, (torch.ones(()),), (torch.ones(()),))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _may_rebuild(monkeypatch):
    """Many tests evaluate each meta loss once; those of the warning set the limit back."""
    monkeypatch.setattr(rebuilt, "LIMIT", None)


@pytest.fixture
def float64():
    """Make float64 the default dtype of one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
