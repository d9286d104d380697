"""Data attribution on digits: metafocus beside bergson, dattri and kronfluence, one protocol.

600 examples, an MLP 64-32-10 in float32, 150 minibatch steps of momentum SGD, 20 queries. The score
is the linear datamodeling score over 60 runs without 5 % of the examples. Each contender runs in a
process of its own, on one thread, once before it is timed (not bergson, which takes minutes and
keeps its states on a disk). `metafocus_*` and `bergson_magic` train
inside their time; the others are given the trained network.

    python benchmarks/attribution.py --peers DIR --output benchmarks/results/attribution.json

where `pip install --target DIR --no-deps` has put bergson, dattri, kronfluence and their imports:
einconv opt-einsum simple-parsing docstring-parser jaxtyping wadler-lindig natsort petname ml_dtypes
torchopt optree graphviz. What cannot be imported is reported.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import metafocus as mf
from metafocus.comparison.memory import peak_bytes

N, QUERIES, STEPS, BATCH, LR, MOMENTUM, DECAY = 600, 20, 150, 60, 0.03, 0.9, 1e-3


def data():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]


X, Y = data()
TRAIN, QUERY = (X[:N], Y[:N]), (X[N : N + QUERIES], Y[N : N + QUERIES])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def stream() -> mf.Batches:
    rows = [{"x": a, "y": b} for a, b in zip(*TRAIN, strict=True)]
    generator = torch.Generator().manual_seed(0)
    return mf.Batches.from_dataset(rows, batch_size=BATCH, steps=STEPS, generator=generator)


def run(store=None):
    net = network()

    def losses(params, batch):
        logits = torch.func.functional_call(net, params, (batch["x"],))
        return F.cross_entropy(logits, batch["y"], reduction="none")

    return mf.recipes.attribution(
        losses,
        lambda: {k: v.detach() for k, v in net.named_parameters()},
        stream(),
        {"x": QUERY[0], "y": QUERY[1]},
        solver=mf.SGD(LR, STEPS, momentum=MOMENTUM, weight_decay=DECAY),
        estimator=None if store is None else mf.Unrolled(store=store),
    )


def trained() -> nn.Module:
    """The trained network, for those who look at the end of the run only."""
    net = network()
    found = torch.load(Path(tempfile.gettempdir()) / "attribution_trained.pt")
    net.load_state_dict(found)
    return net


# --- contenders: each returns scores [queries, rows], lower means helped ----------------------


def metafocus_all_states():
    return run().scores


def metafocus_schedule_12():
    return run(mf.stores.schedule(12)).scores


def metafocus_influence():
    net = trained()

    def losses(params, batch):
        logits = torch.func.functional_call(net, params, (batch[0],))
        return F.cross_entropy(logits, batch[1], reduction="none")

    params = {k: v.detach() for k, v in net.named_parameters()}
    return mf.recipes.influence(losses, params, TRAIN, QUERY, damping=1.1e-2)


def bergson_magic():
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer
    from torchopt.pytree import tree_iter

    batches = stream()

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, input_ids, labels, example_weight):
            return (
                example_weight
                * F.cross_entropy(self.net(input_ids), labels[:, 0], reduction="none")
            ).mean()

    class Stream:
        def __init__(self):
            self.weights, self.device = nn.Parameter(torch.ones(N)), torch.device("cpu")

        requires_grad = property(lambda self: True, lambda self, value: None)

        def __len__(self):
            return STEPS

        def __getitem__(self, i):
            if not 0 <= i < STEPS:
                raise IndexError
            batch = batches.at(i)
            # Its denominator counts labels after the first column.
            labels = batch["y"][:, None].expand(-1, 2)
            weight = self.weights[batch["index"]]
            return {"input_ids": batch["x"], "labels": labels, "example_weight": weight}

        def __reversed__(self):
            return (self[i] for i in reversed(range(STEPS)))

    optimizer = torchopt.sgd(LR, momentum=MOMENTUM, weight_decay=DECAY, moment_requires_grad=True)
    scores = []
    for q in range(QUERIES):
        with tempfile.TemporaryDirectory() as folder:
            model, data = Weighted(), Stream()
            trainer, state = Trainer.initialize(model, optimizer)
            state = trainer.train(state, data, save_dir=folder, save_mode="all")
            state.detach_().requires_grad = True
            with state.activate(model) as params:
                loss = F.cross_entropy(model.net(QUERY[0][q : q + 1]), QUERY[1][q : q + 1])
                grads = torch.autograd.grad(loss, list(params.values()))
            opt = [
                torch.zeros_like(t)
                for t in tree_iter(state.opt_state)
                if isinstance(t, torch.Tensor) and t.is_floating_point()
            ]
            back = BackwardState(dict(zip(params, grads, strict=True)), opt, torch.zeros(N))
            back = trainer.backward(folder, data, back, state.detach_(), save_mode="all")
            scores.append(back.weight_grads.detach())
    return torch.stack(scores)


def dattri_influence():
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    net = trained()

    def loss(params, batch):
        logits = torch.func.functional_call(net, params, (batch[0],))
        return F.cross_entropy(logits, batch[1].long())

    task = AttributionTask(loss, net, net.state_dict())
    attributor = IFAttributorCG(task, device="cpu", max_iter=100, regularization=1.1e-2)
    train = DataLoader(TensorDataset(*TRAIN), batch_size=N)
    attributor.cache(train)
    with torch.no_grad():
        found = attributor.attribute(train, DataLoader(TensorDataset(*QUERY), batch_size=QUERIES))
    return -found.T


def kronfluence_ekfac():
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Digits(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch[0])
            labels = batch[1]
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    model = prepare_model(trained(), Digits())
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "digits", model, Digits(), cpu=True, output_dir=folder, disable_tqdm=True
        )
        analyzer.fit_all_factors(
            "ekfac",
            TensorDataset(*TRAIN),
            per_device_batch_size=N,
            factor_args=FactorArguments(strategy="ekfac"),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            TensorDataset(*QUERY),
            TensorDataset(*TRAIN),
            per_device_query_batch_size=QUERIES,
            per_device_train_batch_size=N,
            score_args=ScoreArguments(damping_factor=1.1e-2),
        )
        return -analyzer.load_pairwise_scores("scores")["all_modules"]


CONTENDERS = {
    f.__name__: f
    for f in (
        metafocus_all_states,
        metafocus_schedule_12,
        metafocus_influence,
        bergson_magic,
        dattri_influence,
        kronfluence_ekfac,
    )
}


def lines(name: str) -> int:
    """Lines that a user writes: without blank ones; for metafocus with those of `run`."""
    parts = [CONTENDERS[name]]
    parts += [run, stream] if name in ("metafocus_all_states", "metafocus_schedule_12") else []
    parts += [stream] if name == "bergson_magic" else []
    text = "\n".join(inspect.getsource(part) for part in parts)
    return sum(1 for line in text.splitlines() if line.strip() and not line.strip().startswith("#"))


def one(name: str, path: str) -> None:
    slow = name == "bergson_magic"
    if not slow:
        CONTENDERS[name]()  # imports and caches
    start = time.process_time()
    scores = CONTENDERS[name]()
    seconds = time.process_time() - start
    # Tensors only: at this size the memory of the process is that of its imports. Not of states
    # on a disk.
    peak = None if slow else peak_bytes(CONTENDERS[name])[1] / 2**20
    torch.save({"scores": scores.float(), "seconds": seconds, "peak_mb": peak}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="directory with the other packages")
    parser.add_argument("--output", default="attribution.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peers:
        # Behind everything else: only what is not installed comes from there.
        sys.path.append(args.peers)
    if args.one:
        one(*args.one)
        return
    reference = run()
    torch.save(reference.params, Path(tempfile.gettempdir()) / "attribution_trained.pt")
    rows = []
    for name in CONTENDERS:
        path = Path(tempfile.gettempdir()) / f"attribution_{name}.pt"
        path.unlink(missing_ok=True)
        words = [sys.executable, __file__, "--one", name, str(path)]
        done = subprocess.run(
            words + (["--peers", args.peers] if args.peers else []),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not path.exists():
            error = (done.stderr.strip().splitlines() or ["?"])[-1]
            rows.append({"name": name, "error": error})
            print(name, "failed:", error, flush=True)
            continue
        found = torch.load(path)
        score = mf.recipes.linear_datamodeling_score(
            found["scores"], reference.retrained, generator=torch.Generator().manual_seed(1)
        )
        row = {
            "name": name,
            "lds": round(score.mean, 3),
            "smallest": round(score.each.min().item(), 3),
            "cpu_seconds": round(found["seconds"], 2),
            "peak_mb": found["peak_mb"] and round(found["peak_mb"], 1),
            "lines": lines(name),
        }
        rows.append(row)
        print(row, flush=True)
    Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
