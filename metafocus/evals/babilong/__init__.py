"""BABILong qa1 to qa5: bAbI stories hidden in prose, a solver, prompts and training chats."""

from metafocus.evals.babilong.build import generate
from metafocus.evals.babilong.oracle import solve
from metafocus.evals.babilong.simulator import Story, tell
from metafocus.evals.babilong.worlds import TASKS, World

__all__ = ["TASKS", "Story", "World", "generate", "solve", "tell"]
