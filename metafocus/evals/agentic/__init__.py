"""Multiple-choice science with a Python tool: chats, a limited subprocess, unbiased pass@k."""

from metafocus.evals.agentic._science import science
from metafocus.evals.agentic.attempt import Attempt, play
from metafocus.evals.agentic.endpoints import Endpoint, HTTPEndpoint, LocalEndpoint
from metafocus.evals.agentic.pass_rates import PassRate, Trial, evaluate
from metafocus.evals.agentic.passk import pass_at_k
from metafocus.evals.agentic.questions import Choice, answer_letter, read_gpqa
from metafocus.evals.agentic.sandbox import Limits, Ran, Walls, run_python, walls

__all__ = [
    "Attempt",
    "Choice",
    "Endpoint",
    "HTTPEndpoint",
    "Limits",
    "LocalEndpoint",
    "PassRate",
    "Ran",
    "Trial",
    "Walls",
    "answer_letter",
    "evaluate",
    "pass_at_k",
    "play",
    "read_gpqa",
    "run_python",
    "science",
    "walls",
]
