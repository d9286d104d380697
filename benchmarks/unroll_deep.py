"""W3: a long unroll, K = 50 with momentum, on a five-layer MLP with a batch of 512.

python benchmarks/unroll_deep.py --output benchmarks/results/unroll_deep.json
"""

from __future__ import annotations

import torch
from harness import main
from torch import nn

import metafocus as mf

STEPS, RATE, MOMENTUM = 50, 0.05, 0.9


def contenders(args):
    net = nn.Sequential(
        *[m for _ in range(4) for m in (nn.LazyLinear(256), nn.Tanh())], nn.LazyLinear(10)
    )
    x, y = torch.randn(512, 784), torch.randint(0, 10, (512,))
    net(x)
    start = {k: v.detach() for k, v in net.named_parameters()}

    def loss(fast, slow=None, data=None):
        logits = torch.func.functional_call(net, fast, (x,))
        return nn.functional.cross_entropy(logits, y)

    def by_hand():
        outer = [v.clone().requires_grad_() for v in start.values()]
        params, velocity = outer, [torch.zeros_like(v) for v in outer]
        for _ in range(STEPS):
            value = loss(dict(zip(start, params, strict=True)))
            grads = torch.autograd.grad(value, params, create_graph=True)
            velocity = [MOMENTUM * v + g for v, g in zip(velocity, grads, strict=True)]
            params = [p - RATE * v for p, v in zip(params, velocity, strict=True)]
        value = loss(dict(zip(start, params, strict=True)))
        return _flat(torch.autograd.grad(value, outer))

    def ours(estimator):
        problem = mf.Problem(loss, loss, init=lambda slow: slow)
        solver = mf.SGD(RATE, STEPS, momentum=MOMENTUM)
        gradient = mf.hypergrad(mf.bilevel(problem, solver=solver, estimator=estimator))
        return lambda: _flat(gradient(start, mf.Episode(None, None))[0].values())

    def with_higher():
        import higher

        with torch.no_grad():
            for p, v in zip(net.parameters(), start.values(), strict=True):
                p.copy_(v)
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (model, opt):
            for _ in range(STEPS):
                opt.step(nn.functional.cross_entropy(model(x), y))
            value = nn.functional.cross_entropy(model(x), y)
            return _flat(torch.autograd.grad(value, list(net.parameters())))

    return {
        "torch.autograd by hand": by_hand,
        "metafocus graph": ours(mf.Unrolled()),
        "metafocus recompute=True": ours(mf.Unrolled(recompute=True)),
        "metafocus recompute=7": ours(mf.Unrolled(recompute=7)),
        "metafocus recompute=12": ours(mf.Unrolled(recompute=12)),
        "higher": with_higher,
    }


def _flat(grads):
    return torch.cat([g.detach().reshape(-1) for g in grads])


if __name__ == "__main__":
    # float64 rounding through 50 steps.
    main(__file__, contenders, reference="torch.autograd by hand", tolerance=1e-12)
