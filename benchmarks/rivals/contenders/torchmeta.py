"""torchmeta: modules that take their parameters. Only these and the update rule are loaded."""

from __future__ import annotations

from torch import nn

from benchmarks.rivals.common import Contenders, bare_package, loaded, take_grads
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2

bare_package("torchmeta")
bare_package("torchmeta.utils")

from torchmeta import modules  # noqa: E402
from torchmeta.utils.gradient_based import gradient_update_parameters  # noqa: E402

PACKAGE = "torchmeta"
NOT = {"w3": "its update rule is a plain gradient step, without momentum"}


def rewritten(net: nn.Sequential) -> nn.Module:
    """Return the network in its layers: what a user has to write."""
    layers = []
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer = modules.MetaLinear(layer.in_features, layer.out_features)
        elif isinstance(layer, nn.Conv2d):
            layer = modules.MetaConv2d(layer.in_channels, layer.out_channels, 3, padding=1)
        elif isinstance(layer, nn.BatchNorm2d):
            layer = modules.MetaBatchNorm2d(layer.num_features, track_running_stats=False)
        layers.append(layer)
    return modules.MetaSequential(*layers)


def maml(data, case, workload) -> Contenders:
    net = loaded(rewritten(workload.network()), data["params"])
    (sx, sy), (qx, qy) = data["support"], data["query"]

    def run():
        for i in range(len(sx)):
            params = None
            for _ in range(case["steps"]):
                params = gradient_update_parameters(
                    net,
                    workload.loss(net(sx[i], params=params), sy[i]),
                    params=params,
                    step_size=workload.RATE,
                    first_order=case["order"] == 1,
                )
            (workload.loss(net(qx[i], params=params), qy[i]) / len(sx)).backward()
        return take_grads(net.parameters())

    return {"torchmeta": run}


def w1(data, case):
    return maml(data, case, W1)


def w2(data, case):
    return maml(data, case, W2)
