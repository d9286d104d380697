"""Whether second order, checkpointing and span attention are exact for one model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from metafocus import attention
from metafocus import params as pt
from metafocus.adapters import LoRA, all_linear
from metafocus.doctor.environment import turns
from metafocus.doctor.findings import Finding
from metafocus.engine import bilevel, hypergrad
from metafocus.errors import PlacementError
from metafocus.estimators import FirstOrder, Unrolled
from metafocus.lm.hf.attention import attention_as
from metafocus.problem import trainable
from metafocus.recipes._focusft import PAPER_ADAPTER, focusft_problem
from metafocus.rng import kept
from metafocus.solvers import SGD
from metafocus.types import Episode, Estimator, Params

TOKENS = 96
"""More than "auto" leaves to the dense kernel."""
SOLVER = SGD(0.1, steps=2)
EXACT = 1e-3
"""Relative error up to which two float32 gradients of a whole model are equal. Their sums run in
another order, and second derivatives enlarge what that changes; a wrong one is off by per cents."""
DIFFERENCE = 2e-2
"""The same for a central difference, which has the rounding of two float32 losses in it."""
SHIFTS = (3e-2, 1e-2, 3e-3)
"""Shares of the loss by which a central difference moves it: the best of them counts."""


def examined(model: Any) -> list[Finding]:
    """Return what FocuSFT's hypergradient does with a model, measured on one short chat.

    The weights and the random state stay as they are.
    """
    tests = Exactness(model)
    named: dict[str, Callable[[], Finding]] = {
        "second order, rebuilt against the graph": tests.rebuilt,
        "second order against a central difference": tests.differences,
        "checkpointing, first order": lambda: tests.checkpointed(FirstOrder()),
        "checkpointing, second order": lambda: tests.checkpointed(Unrolled(recompute=True)),
        "attention over spans against the model's own": tests.over_spans,
    }
    found = [Finding("fast weights", f"{len(tests.start)} tensors of {tests.adapter}")]
    for name, test in named.items():
        try:
            found.append(test()._replace(name=name))
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            text = " ".join(str(error).split())
            found.append(Finding(name, f"fails: {type(error).__name__}: {text}"[:200], False))
    return found


class Exactness:
    """Hypergradients of one model on one short chat, with one start of the fast weights.

    Raises:
        PlacementError: for a model without linear modules.
    """

    def __init__(self, model: Any):
        self.model = model
        self.outer: Params = trainable(model)
        self.adapter: LoRA
        self.start: Params
        self.adapter, self.start = _start(model)
        device = next(model.parameters()).device
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.arange(TOKENS).mul(7919).remainder(vocabulary)[None]
        batch = {**turns(device, TOKENS), "input_ids": ids.to(device)}
        self.episode: Episode = Episode(batch, batch)
        self.exact: Params | None = None

    def rebuilt(self) -> Finding:
        """Compare the hypergradient that rebuilds its steps with that of the whole graph."""
        return _compared(self.gradient(Unrolled()), self._exact())

    def differences(self) -> Finding:
        """Compare the hypergradient along itself with central differences of the loss."""
        exact, meta = self._exact(), self._meta(FirstOrder())
        size = float(pt.norm(exact))
        value = self._loss(meta, self.outer)
        errors = []
        for share in SHIFTS:
            h = share * abs(value) / size
            outer = pt.detach(self.outer)
            up, down = (self._loss(meta, pt.add(outer, exact, s * h / size)) for s in (1, -1))
            errors.append(abs((up - down) / (2 * h * size) - 1))
        return Finding("", f"relative difference {min(errors):.1e}", min(errors) <= DIFFERENCE)

    def checkpointed(self, estimator: Estimator) -> Finding:
        """Compare a hypergradient with and without activation checkpointing."""
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            return Finding("", "the model has no checkpointing")
        plain = self.gradient(estimator)
        _checkpointing(self.model, "enable")
        try:
            return _compared(self.gradient(estimator), plain)
        finally:
            _checkpointing(self.model, "disable")

    def over_spans(self) -> Finding:
        """Compare the second order of attention over spans with that of the model's own."""
        exact = self._exact()
        attention.register()
        with attention_as(self.model.config.get_text_config(), "metafocus"):
            return _compared(self.gradient(Unrolled(recompute=True)), exact)

    def gradient(self, estimator: Estimator) -> Params:
        """Return the hypergradient, with the same dropout each time."""
        with self._ready(), torch.enable_grad():
            return hypergrad(self._meta(estimator))(pt.detach(self.outer), self.episode)[0]

    def _exact(self) -> Params:
        if self.exact is None:
            self.exact = self.gradient(Unrolled(recompute=True))
        return self.exact

    def _loss(self, meta: Any, outer: Params) -> float:
        with self._ready(), torch.no_grad():
            return float(meta(outer, self.episode)[0])

    def _meta(self, estimator: Estimator) -> Any:
        problem = focusft_problem(self.model, adapter=self.adapter)
        problem = dataclasses.replace(problem, init=lambda slow, support: self.start)
        return bilevel(problem, solver=SOLVER, estimator=estimator)

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        # In training mode: in evaluation mode a model leaves checkpointing out.
        before = self.model.training
        with kept(pt.tensors(self.episode)):
            torch.manual_seed(0)
            self.model.train()
            try:
                yield
            finally:
                self.model.train(before)


def _start(model: Any) -> tuple[LoRA, Params]:
    for adapter in (PAPER_ADAPTER, LoRA(all_linear, rank=4)):
        try:
            return adapter, adapter.init(model, torch.Generator().manual_seed(0))
        except PlacementError as error:
            refused = error
    raise refused


def _checkpointing(model: Any, word: str) -> None:
    # The second name is that of transformers before 5.23, and is deprecated since.
    names = (f"activation_checkpointing_{word}", f"gradient_checkpointing_{word}")
    next(getattr(model, name) for name in names if hasattr(model, name))()


def _compared(found: Params, exact: Params) -> Finding:
    error = float(pt.norm(pt.sub(found, exact)) / pt.norm(exact))
    return Finding("", f"relative difference {error:.1e}", error <= EXACT)
