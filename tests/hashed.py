"""Objects at the top of a module, whose hashes two processes compare."""

from __future__ import annotations

import collections
import enum
import functools
import pathlib
import random
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import metafocus as mf
from metafocus.digests import digest

WORDS = {"north", "south", "east", "west"}


class Way(enum.Enum):
    UP = 1
    DOWN = 2


class Pair(NamedTuple):
    a: int
    b: int = 2


@dataclass(frozen=True)
class Loss:
    scale: float

    def __call__(self, fast, slow, data):
        return self.scale * ((fast["w"] - data) ** 2).sum()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.ones(2), persistent=False)
        self.act = torch.tanh

    def forward(self, x):
        return self.act(self.layer(x - self.mean))


class Plain:
    def __init__(self):
        self.words = {"a", "b", "c"}

    @functools.cached_property
    def many(self):
        return 3


def net():
    torch.manual_seed(0)
    return Net()


def reads(word):
    return word in {"north", "south", "east"} and word in WORDS


@functools.cache
def kept(x):
    return x + 1


def odd(n):
    return n != 0 and even(n - 1)


def even(n):
    return n == 0 or odd(n - 1)


def values():
    solver = mf.SGD(0.1, steps=2, clip=mf.clip_global(1.0))
    loss = Loss(2.0)
    return {
        "function": reads,
        "cached": kept,
        "recursive": odd,
        "closure": (lambda k: lambda x: x + k)(WORDS),
        "partial": functools.partial(reads, word="north"),
        "dataclass": loss,
        "meta": mf.bilevel(mf.Problem(loss, loss), solver=solver, estimator=mf.Unrolled()),
        "module": net(),
        "plain": Plain(),
        "enum": Way.UP,
        "tuple": Pair(1),
        "numpy": np.arange(6.0).reshape(2, 3).T,
        "counter": collections.Counter("abca"),
        "path": pathlib.Path("a/b"),
        "random": random.Random(0),
        "generator": torch.Generator().manual_seed(0),
        "class": Net,
        "conjugate": torch.complex(torch.ones(2), torch.ones(2)).conj(),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import hashed

    for name, value in hashed.values().items():
        print(name, digest(value))
