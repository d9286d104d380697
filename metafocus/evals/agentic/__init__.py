"""Multiple-choice science with a Python tool: chats, a limited subprocess, unbiased pass@k."""

from metafocus.evals.agentic._science import science
from metafocus.evals.agentic.attempt import Attempt, play
from metafocus.evals.agentic.endpoints import Endpoint, LocalEndpoint, TooLong
from metafocus.evals.agentic.http_endpoint import HTTPEndpoint
from metafocus.evals.agentic.isolation import Walls, walls
from metafocus.evals.agentic.letters import answer_letter
from metafocus.evals.agentic.pass_rates import PassRate, Trial, evaluate
from metafocus.evals.agentic.passk import pass_at_k
from metafocus.evals.agentic.questions import Choice, read_gpqa, read_longbench
from metafocus.evals.agentic.sandbox import Limits, Ran, check_walls, run_python

__all__ = [
    "Attempt",
    "Choice",
    "Endpoint",
    "HTTPEndpoint",
    "Limits",
    "LocalEndpoint",
    "PassRate",
    "Ran",
    "TooLong",
    "Trial",
    "Walls",
    "answer_letter",
    "check_walls",
    "evaluate",
    "pass_at_k",
    "play",
    "read_gpqa",
    "read_longbench",
    "run_python",
    "science",
    "walls",
]
