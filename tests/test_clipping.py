"""Clipping and steps by kernels for many tensors equal those tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import metafocus as mf
from metafocus import params as pt

CLIPS = [mf.clip_per_tensor(1.0), mf.clip_global(1.0)]
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Tagged(Tensor):
    """A sub-class without any behaviour of its own."""


def both(clip, grads):
    """What a clip makes of constants, and of tensors that are differentiated."""
    moving = {k: v.clone().requires_grad_() for k, v in grads.items()}
    return clip(grads), {k: v.detach() for k, v in clip(moving).items()}


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 300.0, 3e4], ids=str)
def test_norms_beyond_half_precision(clip, dtype, size):
    """300 squared is no number of float16, nor is the norm of 4,000 entries of 30,000."""
    grads = {"a": torch.full((4000,), size, dtype=dtype), "b": torch.zeros(0, dtype=dtype)}
    for found in both(clip, grads):
        assert found["a"].dtype == dtype and found["b"].shape == (0,)
        # Each entry is rounded to its type; the norm is a sum of 4,000 terms, in float32 or wider.
        limit = 1 + torch.finfo(dtype).eps + 4000 * torch.finfo(torch.float32).eps
        assert 1 / limit < found["a"].double().norm() < limit
    mapped = torch.func.vmap(clip)({k: torch.stack([v, v]) for k, v in grads.items()})
    assert mapped["a"].dtype == dtype
    torch.testing.assert_close(mapped["a"][1], found["a"])


MIXED = {
    "a": torch.full((3,), 30.0, dtype=torch.float16),
    "b": torch.tensor([3.0, 4.0], dtype=torch.float64),
    "empty": torch.zeros(0, 2),
    "scalar": torch.tensor(-7.0),
    "zero": torch.zeros(2),
}


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
def test_leaves_of_several_types_keep_them(clip):
    fast, slow = both(clip, MIXED)
    for k, v in MIXED.items():
        assert fast[k].dtype == slow[k].dtype == v.dtype and fast[k].shape == v.shape
        torch.testing.assert_close(fast[k], slow[k])
    norms = [v.double().norm() for v in fast.values()]
    # The rounding of float16 is 1e-3.
    if clip == CLIPS[0]:
        assert max(norms) <= 1.001 and norms[1] == pytest.approx(1.0)
    else:
        assert torch.stack(norms).norm() == pytest.approx(1.0, rel=1e-3)
    assert clip({}) == {}


def test_sparse_gradients_are_clipped_and_taken():
    with torch.sparse.check_sparse_tensor_invariants():
        sparse = torch.sparse_coo_tensor([[0, 2]], torch.tensor([3.0, 4.0]), (4,))
    for clip in CLIPS:
        clipped = clip({"w": sparse})["w"].to_dense()
        torch.testing.assert_close(clipped, torch.tensor([0.6, 0, 0.8, 0]))
    solver = mf.SGD(0.5, 1)
    moved, _ = solver.update({"w": torch.ones(4)}, {"w": sparse}, {}, 0, {})
    assert moved["w"].tolist() == [-0.5, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_of_odd_leaves_equal_those_of_single_ones(momentum):
    solver = mf.SGD(0.1, 2, momentum=momentum)
    grads = {k: v + 1 for k, v in MIXED.items()}
    state, each = solver.init(MIXED), {}
    params = MIXED
    for step in range(2):
        params, state = solver.update(params, grads, state, step, {})
    for k, v in MIXED.items():
        alone, own = {k: v}, solver.init({k: v})
        for step in range(2):
            alone, own = solver.update(alone, {k: grads[k]}, own, step, {})
        each |= alone
    for k, v in MIXED.items():
        assert params[k].dtype == v.dtype
        assert torch.equal(params[k], each[k])


def test_sub_classes_and_moving_tensors_go_one_by_one():
    plain = torch.ones(2)
    assert pt.constant({"a": plain, "b": plain})
    for odd in (plain.as_subclass(Tagged), plain.clone().requires_grad_()):
        assert not pt.constant({"a": plain, "b": odd})
    assert not pt.constant({})
    tagged = {"a": plain.as_subclass(Tagged)}
    assert type(CLIPS[0](tagged)["a"]) is Tagged
    assert type(mf.SGD(0.1, 1).update(tagged, tagged, {}, 0, {})[0]["a"]) is Tagged
