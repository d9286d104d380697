"""The work of a comparison: one contender in one setting under one seed, as plain numbers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metafocus import params as pt
from metafocus.checks import function
from metafocus.comparison.agreement import agreement, distance
from metafocus.comparison.axes import Setting
from metafocus.comparison.contenders import (
    Gradient,
    of_estimator,
    of_other,
    seeded_again,
)
from metafocus.comparison.differences import DIFFERENCES, Exact
from metafocus.comparison.inner_curve import inner_curve
from metafocus.comparison.observe import Report, drawn, drawn_exact, examine, peak, timed
from metafocus.comparison.reference import exact
from metafocus.digests import digest
from metafocus.episodes import as_episode
from metafocus.errors import NotStationaryWarning, ProblemError, RebuiltWarning
from metafocus.files import read_tensors, write_tensors
from metafocus.problem import Problem, constants
from metafocus.rng import kept
from metafocus.types import Episode, Params

ANOTHER = 1_000_003
"""A seed that no comparison counts up to."""
KEPT = 10**6
"""References of up to so many entries are kept in files: central differences take long."""
_OF = "outer."


@dataclass(frozen=True)
class Job:
    """What is measured at once: a setting, one of its contenders, and a seed."""

    setting: Setting
    name: str
    seed: int


@dataclass(frozen=True)
class Work:
    """Everything that jobs share; calling it with a cell of a sweep runs the job of this cell.

    Attributes:
        problem: the bilevel problem.
        outer: the outer parameters, or a function of the seed.
        episode: the data, or a function of the seed.
        estimators: as they were given, before any axis changed one.
        others: contenders that are no estimators.
        reference: what is exact.
        title: its name.
        repeats: how often each is timed.
        fresh_process: where memory is measured.
        folder: where references are kept; None: nowhere.
        shared: the hash of problem, data and reference; hashing a model takes seconds.
        jobs: by the name of their content.
        last: the reference that was used last, and what it belongs to.
    """

    problem: Problem
    outer: Any
    episode: Any
    estimators: Mapping[str, Any]
    others: Mapping[str, Any]
    reference: Any
    title: str
    repeats: int
    fresh_process: bool
    folder: Path | None = None
    shared: str = ""
    jobs: Mapping[str, Job] = field(default_factory=dict)
    last: dict[Any, Exact] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": {}}

    def __call__(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        """Run the job that a cell names."""
        return self.run([self.jobs[cell["content"]]])[0]

    def point(self, job: Job) -> tuple[Params, Episode]:
        """Return the outer parameters and the episode of a job, several tasks stacked."""
        outer, episode = (
            at_seed(name, value, job.seed)
            for name, value in (("outer", self.outer), ("episode", self.episode))
        )
        episode = as_episode(episode)
        if job.setting.tasks is not None:
            episode = _tasks(episode, job.setting.tasks, job.seed)
        return constants(outer), episode

    def cell(self, job: Job) -> dict[str, Any]:
        """Return the cell of a job: a description, and the hash of all that it depends on."""
        part = self._part(job)
        setting = (job.setting.solver, job.setting.tasks, job.seed)
        content = digest(self.shared, part, *setting, self.repeats, self.fresh_process)
        words = {"contender": _words(part), "solver": _words(job.setting.solver)}
        return {**words, "tasks": job.setting.tasks, "seed": job.seed, "content": content}

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Measure jobs of one setting and one seed; their timed runs take turns."""
        outer, episode = self.point(jobs[0])
        found, gradients = [], []
        with warnings.catch_warnings(), kept(pt.tensors((outer, episode))):
            # The verdict reports this.
            warnings.simplefilter("ignore", NotStationaryWarning)
            # Each comparison builds its meta losses.
            warnings.simplefilter("ignore", RebuiltWarning)
            truth = self._truth(jobs[0], outer, episode)
            for job in jobs:
                gradient = self._gradient(job, job.seed)
                record = self._measured(job, gradient, outer, episode, truth.grads)
                found.append(record | {"reference_error": truth.error})
                gradients.append(gradient)
            for _ in range(self.repeats):
                for record, gradient in zip(found, gradients, strict=True):
                    if record["error"] is not None:
                        run = lambda gradient=gradient: gradient(outer, episode)  # noqa: E731
                        record["seconds"].append(timed(run))
        return found

    def _measured(
        self, job: Job, gradient: Gradient, outer: Params, episode: Episode, truth: Params
    ) -> dict[str, Any]:
        draw = drawn(gradient, outer, episode, job.seed)
        near = None if draw is None else agreement(draw, truth)
        del draw
        found: dict[str, Any] = {
            "error": near and near.error,
            "cosine": near and near.cosine,
            "norm_ratio": near and near.norm_ratio,
            "sketch": near and near.sketch,
            "seconds": [],
        }
        if job.seed == 0:
            # Once for each setting: they hardly change from seed to seed.
            one = episode if job.setting.tasks is None else _first(episode)
            solver, estimators = job.setting.solver, job.setting.estimators
            report = Report()
            if job.name in estimators:
                part = estimators[job.name]
                report = examine(self.problem, outer, one, solver, part)
            found |= dataclasses.asdict(report)
            bytes_ = peak(gradient, outer, episode, self.fresh_process) if near else None
            curve = inner_curve(self.problem, outer, one.support, solver)
            found |= {"peak": bytes_, "inner_losses": curve}
            if near and self.varies(job):
                found["noise"] = self._noise(job, outer, episode, truth)
        return found

    def varies(self, job: Job) -> bool:
        """Return whether each seed has a hypergradient of its own, so that draws are no repeats."""
        return callable(self.outer) or callable(self.episode) or job.setting.tasks is not None

    def _noise(self, job: Job, outer: Params, episode: Episode, truth: Params) -> float | None:
        """Return the standard deviation of two draws at one point, relative to the reference."""
        one, two = (drawn(self._gradient(job, seed), outer, episode, seed) for seed in (0, ANOTHER))
        return None if one is None or two is None else distance(one, two, truth) / 2**0.5

    def _part(self, job: Job) -> Any:
        estimators = job.setting.estimators
        return estimators[job.name] if job.name in estimators else self.others[job.name]

    def hashed(self) -> Work:
        """Return the same work with the hash of what all jobs share."""
        named = self.reference
        if isinstance(named, str) and named != DIFFERENCES:
            named = self.estimators.get(named, self.others.get(named))
        shared = digest(self.problem, self.outer, self.episode, named)
        return dataclasses.replace(self, shared=shared)

    def _gradient(self, job: Job, seed: int) -> Gradient:
        part, solver = self._part(job), job.setting.solver
        tasks = job.setting.tasks is not None
        if job.name in job.setting.estimators:
            return of_estimator(self.problem, solver, seeded_again(part, seed), tasks)
        return of_other(job.name, part, solver, tasks, seed)

    def _truth(self, job: Job, outer: Params, episode: Episode) -> Exact:
        key = (id(job.setting), job.seed)
        if key not in self.last:
            # One at a time: each may be as large as the model.
            self.last.clear()
            self.last[key] = self._kept(job, outer, episode)
        return self.last[key]

    def _kept(self, job: Job, outer: Params, episode: Episode) -> Exact:
        small = sum(v.numel() for v in outer.values()) <= KEPT
        path = None
        if self.folder is not None and small and not isinstance(self.reference, dict):
            name = digest(self.shared, job.setting.solver, job.setting.tasks, job.seed)
            path = self.folder / "references" / f"{name}.safetensors"
            if path.exists():
                return _read(path, outer)
        gradient = exact(
            self.reference,
            self.problem,
            job.setting.solver,
            (self.estimators, self.others),
            job.setting.tasks is not None,
            job.seed,
        )
        found = drawn_exact(gradient, outer, episode, job.seed)
        if found is None:
            at = "".join(f" at {k} = {v}" for k, v in job.setting.labels.items())
            raise ProblemError(
                f"the reference hypergradient ({self.title}) is not finite{at}, seed {job.seed}."
            )
        if path is not None:
            _write(path, found)
        return found


def _write(path: Path, found: Exact) -> None:
    tensors = {f"{_OF}{k}": v.contiguous() for k, v in found.grads.items()}
    if found.error is not None:
        tensors["error"] = torch.tensor(found.error, dtype=torch.float64)
    write_tensors(path, tensors)


def _read(path: Path, outer: Params) -> Exact:
    tensors = read_tensors(path)
    error = tensors.pop("error", None)
    grads = {k: tensors[f"{_OF}{k}"].to(v.device) for k, v in outer.items()}
    return Exact(grads, None if error is None else float(error))


def at_seed(name: str, value: Any, seed: int) -> Any:
    """Return what a function of the seed gives, or the value itself.

    Raises:
        ProblemError: for a module in place of its parameters, or a function of other arguments.
    """
    if isinstance(value, nn.Module):
        raise ProblemError(f"{name} must hold tensors, got a module: mf.trainable(module).")
    if not callable(value):
        return value
    function(name, value, "of the seed, such as lambda seed: ..., or what it returns", 1)
    return value(seed)


def _tasks(episodes: Episode, count: int, seed: int) -> Episode:
    """Return some of the stacked tasks, drawn with the seed."""
    tensors, rebuild = pt.partition(episodes)
    total = min((x.shape[0] for x in tensors if x.ndim), default=0)
    if count > total:
        raise ProblemError(
            f"over: {count} tasks, and the episode holds {total}. Stack more of them with "
            "mf.stack_episodes, or give a function of the seed that draws them."
        )
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return rebuild([x[chosen.to(x.device)] for x in tensors])


def _first(episodes: Episode) -> Episode:
    tensors, rebuild = pt.partition(episodes)
    return rebuild([x[0] for x in tensors])


def _words(part: Any) -> str:
    return str(getattr(part, "__name__", None) or part)[:200]
