"""`metafocus doctor`: what it measures, and that it notices what is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from commands import run
from models import build

import metafocus as mf
from metafocus.doctor import examined, kernels, precision, versions
from metafocus.doctor.rounding import _judged

CPU = torch.device("cpu")


def test_versions(monkeypatch):
    """PyPI's wheel of torch 2.14.1+cu130 has the metadata of 2.14.1."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    found = dict((name, value) for name, value, _ in versions("1.2.3"))
    assert found["metafocus"] == "1.2.3"
    assert found["torch"] == "2.14.1+cu130"
    assert found["numpy"][0].isdigit()


def test_the_kernels_are_those_that_serve():
    found = {name: value for name, value, _ in kernels(CPU)}
    assert set(found) == {
        f"{mask}, {dtype}"
        for mask in ("causal", "context-bidirectional")
        for dtype in ("float32", "bfloat16")
    }
    # torch's fused attention on a CPU, once for each turn at most.
    assert all(value.startswith(("flash, ", "tiled, since ")) for value in found.values())


def test_precision_of_this_machine():
    found = precision(CPU)
    assert all(finding.good for finding in found), found
    assert len(found) == 12


def test_an_imprecise_operator_is_noticed():
    """float32 by way of bfloat16 is off by thousands of roundings."""

    def narrow(x):
        wide = x.dtype == torch.float64
        return F.softmax(x if wide else x.bfloat16(), -1).to(x.dtype)

    assert not _judged("softmax", narrow, (16, 64), torch.float32, CPU).good
    assert _judged("softmax", lambda x: x.softmax(-1), (16, 64), torch.float32, CPU).good


@pytest.fixture(scope="module")
def model():
    return build(dtype=torch.float32, layers=2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_model_is_exact_and_stays_as_it_is(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    state, kind = torch.get_rng_state(), model.config._attn_implementation
    found = examined(model)
    assert [finding.good for finding in found] == [None, *[True] * 5], found
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and model.config._attn_implementation == kind
    assert not model.is_gradient_checkpointing
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Lost(torch.autograd.Function):
    """The identity, whose second derivative is half lost."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.detach()


def test_a_kernel_without_a_second_derivative_is_noticed(monkeypatch):
    broken = build(dtype=torch.float32, layers=2)
    norm = broken.model.norm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: Lost.apply(forward(x)))
    found = {finding.name: finding for finding in examined(broken)}
    assert not found["second order, rebuilt against the graph"].good
    assert "ProblemError" in found["second order, rebuilt against the graph"].value


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_command_prints_one_page(model, tmp_path):
    from metafocus.data import train_tokenizer

    model.save_pretrained(tmp_path)
    train_tokenizer(["Say hello."], vocab_size=300).save_pretrained(tmp_path)
    ran = run("doctor", "--model_name_or_path", tmp_path)
    assert ran.code == 0, ran.out + ran.err
    lines = ran.out.splitlines()
    assert len(lines) < 60
    assert mf.__version__ in lines[1]
    assert sum(line.rstrip().endswith("yes") for line in lines) == 17
    assert "NO" not in ran.out.split()


def test_a_device_that_is_not_there():
    ran = run("doctor", "--device", "no-such-device")
    assert ran.code == 2
    assert "--device 'no-such-device' cannot be used" in ran.err
