"""Cross-entropy written out: the value, both derivatives and the errors are torch's."""

import pytest
import torch
import torch.nn.functional as F

from metafocus.autodiff.safe_operators import cross_entropy

F64 = torch.float64
CASES = {
    "vector": (torch.linspace(-1, 2, 5, dtype=F64), torch.tensor(3)),
    "matrix": (torch.randn(6, 5, dtype=F64), torch.tensor([0, 4, 2, 2, 1, 3])),
    "image": (torch.randn(2, 5, 3, dtype=F64), torch.tensor([[0, 4, 2], [2, 1, 3]])),
    "uint8": (torch.randn(2, 5, dtype=F64), torch.tensor([1, 4], dtype=torch.uint8)),
    "large": (1e6 * torch.randn(6, 5, dtype=F64), torch.tensor([0, 4, 2, 2, 1, 3])),
    "never": (torch.tensor([[0.0, -torch.inf, 1.0]], dtype=F64), torch.tensor([2])),
    "none": (torch.randn(0, 5, dtype=F64), torch.zeros(0, dtype=torch.int64)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, ignored, reduction):
    logits, target = CASES[case]

    def run(loss):
        x = logits.clone().requires_grad_()
        value = loss(x, target, ignore_index=ignored, reduction=reduction)
        weights = torch.linspace(1, 2, value.numel(), dtype=F64).reshape(value.shape)
        (first,) = torch.autograd.grad((value * weights).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * torch.cos(logits)).nansum(), x)
        return value, first, second

    for got, want in zip(run(cross_entropy), run(F.cross_entropy), strict=True):
        # The mean over nothing is NaN for both. 1e6 is rounded to 1e-10.
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-9, equal_nan=True)


def test_left_to_torch():
    x, soft = torch.randn(4, 3), torch.rand(4, 3)
    target = torch.tensor([0, 2, 1, 1])
    weight = torch.tensor([1.0, 2.0, 0.5])
    for loss in (
        lambda f: f(x, soft),
        lambda f: f(x, target, weight),
        lambda f: f(x, target, label_smoothing=0.1),
    ):
        torch.testing.assert_close(loss(cross_entropy), loss(F.cross_entropy), rtol=0, atol=0)
    # gather would take the first three of four rows.
    with pytest.raises(ValueError, match="batch_size"):
        cross_entropy(x, target[:3])
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(x, target, reduction="max")
    for bad in (-1, 3):
        with pytest.raises((RuntimeError, IndexError), match=r"out of bounds"):
            cross_entropy(x, torch.tensor([0, bad, 1, 1]))


@pytest.mark.parametrize("outer", [torch.func.grad, torch.func.jacfwd], ids=["grad", "jacfwd"])
def test_transforms(outer):
    x = torch.randn(3, 4, 5, dtype=F64)
    target = torch.tensor([[0, 4, 2, 2], [1, 3, 0, 0], [2, 2, 2, 4]])

    def second(loss):
        def slope(x, y):
            return (torch.func.grad(loss)(x, y) * torch.sin(x)).sum()

        return torch.func.vmap(outer(slope))(x, target)

    torch.testing.assert_close(
        second(cross_entropy), second(F.cross_entropy), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    x, target = torch.randn(8, 5).to(dtype), torch.arange(8) % 5
    # One more rounding of the mean.
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        cross_entropy(x, target), F.cross_entropy(x, target), rtol=rtol, atol=0
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(x, target).dtype == F.cross_entropy(x, target).dtype


def test_the_double_backward_has_no_detour():
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    target = torch.tensor([0, 2, 1, 1])
    (grad,) = torch.autograd.grad(cross_entropy(x, target), x, create_graph=True)
    names, pending = set(), [grad.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in names:
            names.add(node)
            pending += [parent for parent, _ in node.next_functions]
    assert not any("NllLoss" in node.name() for node in names)
