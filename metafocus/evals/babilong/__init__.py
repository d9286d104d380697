"""BABILong qa1 to qa20: bAbI stories hidden in prose, a solver, prompts and training chats."""

from metafocus.evals.babilong.build import generate
from metafocus.evals.babilong.oracle import solve
from metafocus.evals.babilong.simulator import tell
from metafocus.evals.babilong.story import Story
from metafocus.evals.babilong.worlds import LEADERBOARD, TASKS, World

__all__ = ["LEADERBOARD", "TASKS", "Story", "World", "generate", "solve", "tell"]
