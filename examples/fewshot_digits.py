"""Few-shot learning on scikit-learn's digits: tell digits apart that training has never shown.

A task consists of five pictures of each of three digits. The start is learned on the digits 0 to 5
and tested on 6 to 9. MAML adapts all weights, ANIL (arXiv 1909.09157) only the last layer.
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn import Linear, ReLU, Sequential

import metafocus as mf
from metafocus.recipes import fewshot

WAY, SHOTS, QUERIES = 3, 5, 10
DIGITS = load_digits()
net = Sequential(Linear(64, 128), ReLU(), Linear(128, 64), ReLU(), Linear(64, WAY))


def logits(params, x):
    return torch.func.functional_call(net, params, (x,))


def loss(params, data):
    return torch.nn.functional.cross_entropy(logits(params, data[0]), data[1])


def draw(digits, tasks):
    """Return tasks from these digits, stacked on axis 0, as `mf.over_tasks` takes them."""
    images, support, query = torch.tensor(DIGITS.data / 16).float(), [], []
    pools = [images[torch.tensor(DIGITS.target == digit)] for digit in digits]
    for _ in range(tasks):
        chosen = [pools[i] for i in torch.randperm(len(pools))[:WAY]]
        mixed = [pool[torch.randperm(len(pool))] for pool in chosen]
        support.append(torch.cat([pool[:SHOTS] for pool in mixed]))
        query.append(torch.cat([pool[SHOTS : SHOTS + QUERIES] for pool in mixed]))
    labels = torch.arange(WAY).expand(tasks, WAY)
    pairs = ((support, SHOTS), (query, QUERIES))
    return mf.Episode(*((torch.stack(x), labels.repeat_interleave(n, 1)) for x, n in pairs))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/fewshot_digits"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    net.apply(lambda layer: layer.reset_parameters() if isinstance(layer, Linear) else None)
    random = {k: v.detach().clone() for k, v in net.named_parameters()}
    problems = {"MAML": fewshot.maml(loss), "ANIL": fewshot.anil(loss, ("4.weight", "4.bias"))}
    solver, unseen, accuracy = mf.SGD(0.1, steps=5), draw(range(6, 10), 200), {}
    for name, problem in problems.items():
        meta = mf.over_tasks(mf.bilevel(problem, solver=solver, estimator=mf.Unrolled()))

        @torch.no_grad()
        def test(params, meta=meta):
            fast = meta(params, unseen)[1].params
            guess = torch.func.vmap(lambda f, x: logits(params | f, x))(fast, unseen.query[0])
            return (guess.argmax(-1) == unseen.query[1]).float().mean().item()

        params = {k: v.clone().requires_grad_() for k, v in random.items()}
        optimizer = torch.optim.Adam(params.values(), 1e-3)
        for _ in range(200 if args.quick else 2000):
            optimizer.zero_grad()
            meta(params, draw(range(6), 16))[0].backward()
            optimizer.step()
        accuracy[name] = {"random start": test(random), "learned start": test(params)}
        shown = ", ".join(f"{value:.3f} from a {key}" for key, value in accuracy[name].items())
        print(f"{name}: accuracy on digits never trained {shown}; chance {1 / WAY:.3f}")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n")
    return accuracy


if __name__ == "__main__":
    main()
