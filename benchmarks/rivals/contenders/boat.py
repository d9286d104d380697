"""BOAT: operations named in a configuration, losses named by strings, `higher` underneath."""

from __future__ import annotations

import tempfile
from pathlib import Path

import boat_torch
import torch

from benchmarks.rivals.common import Contenders, loaded, take_grads
from benchmarks.rivals.workloads import w1 as W1
from benchmarks.rivals.workloads import w2 as W2
from benchmarks.rivals.workloads import w3 as W3
from benchmarks.rivals.workloads import w4 as W4

PACKAGE = "boat"
LABEL = "BOAT NGD+IAD"
HERE = "benchmarks.rivals.contenders.boat"


def lower(feed, upper_model, model, params=None):
    return feed["loss"](model(feed["x"], params=params) if params else model(feed["x"]), feed["y"])


def upper(feed, upper_model, model, params=None):
    return lower(feed, upper_model, model, params) * feed["weight"]


def problem(net, feeds, loss, steps, rate, momentum=0.0, first_order=False):
    """Return the meta-gradient over all tasks by one iteration of its core."""
    folder = tempfile.mkdtemp(prefix="boat")
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": ["IAD", "FOA"] if first_order else ["IAD"],
        "lower_iters": steps,
        "accumulate_grad": True,
        "return_grad": True,
        "copy_last_param": False,
        "device": "cpu",
        "loss_log_path": str(Path(folder) / "loss.json"),
        "lower_level_model": net,
        "upper_level_model": net,
        "lower_level_var": list(net.parameters()),
        "upper_level_var": list(net.parameters()),
        "lower_level_opt": optimizer,
        "upper_level_opt": torch.optim.SGD(net.parameters(), lr=rate),
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
        "RGT": {"truncate_iter": 0},
    }
    losses = {
        "lower_level_loss": {"function": f"{HERE}.lower", "params": {}},
        "upper_level_loss": {"function": f"{HERE}.upper", "params": {}},
    }
    core = boat_torch.Problem(config, losses)
    core.build_ll_solver()
    core.build_ul_solver()

    def run():
        core.run_iter(*feeds, current_iter=0)
        # Its logs keep every iteration.
        core._log_results.clear()
        core.loss_history.clear()
        return take_grads(net.parameters())

    return run


def feeds(support, query, loss):
    weight = 1 / len(support[0])
    return tuple(
        [{"x": x, "y": y, "loss": loss, "weight": weight} for x, y in zip(*batch, strict=True)]
        for batch in (support, query)
    )


def maml(data, case, workload) -> Contenders:
    net = loaded(workload.network(), data["params"])
    batches = feeds(data["support"], data["query"], workload.loss)
    first_order = case["order"] == 1
    arguments = net, batches, workload.loss, case["steps"], workload.RATE
    return {LABEL: problem(*arguments, first_order=first_order)}


def w1(data, case):
    return maml(data, case, W1)


def w2(data, case):
    return maml(data, case, W2)


def w3(data, case):
    net = loaded(W3.network(case), data["params"])
    batch = data["x"][None], data["y"][None]
    batches = feeds(batch, batch, W3.loss)
    return {LABEL: problem(net, batches, W3.loss, case["steps"], W3.RATE, W3.MOMENTUM)}


class Weights(torch.nn.Module):
    """One tensor as a module."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(value.clone())

    def forward(self):
        return self.value


def ridge(feed, upper_model, model, params=None):
    w = model(params=params) if params else model()
    return W4.inner(w, upper_model(), feed["x"], feed["y"])


def validation(feed, upper_model, model, params=None):
    w = model(params=params) if params else model()
    return W4.outer(w, feed["x"], feed["y"])


def w4(data, case):
    lower, upper = Weights(data["w"]), Weights(data["log_l2"])
    folder = tempfile.mkdtemp(prefix="boat")
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": ["CG"],
        "lower_iters": 1,
        "accumulate_grad": False,
        "return_grad": True,
        "copy_last_param": False,
        "device": "cpu",
        "loss_log_path": str(Path(folder) / "loss.json"),
        "lower_level_model": lower,
        "upper_level_model": upper,
        "lower_level_var": list(lower.parameters()),
        "upper_level_var": list(upper.parameters()),
        # Its CG is of the map of a step with this rate; from the minimum the step leads nowhere.
        "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=1.0),
        "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=1.0),
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
        "RGT": {"truncate_iter": 0},
        "CG": {"tolerance": 0.0, "k": case["products"]},
    }
    losses = {
        "lower_level_loss": {"function": f"{HERE}.ridge", "params": {}},
        "upper_level_loss": {"function": f"{HERE}.validation", "params": {}},
    }
    core = boat_torch.Problem(config, losses)
    core.build_ll_solver()
    core.build_ul_solver()
    batches = [dict(zip("xy", data[k], strict=True)) for k in ("train", "test")]

    def run():
        core.run_iter(*batches, current_iter=0)
        core._log_results.clear()
        core.loss_history.clear()
        return take_grads(upper.parameters())

    return {"BOAT NGD+CG": run}
