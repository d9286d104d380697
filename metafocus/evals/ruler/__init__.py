"""RULER: needles, variable tracking, word counts and questions, at any length."""

from metafocus.evals.ruler.build import NEW_TOKENS, TASKS, generate
from metafocus.evals.ruler.niah import NIAH, Niah
from metafocus.evals.ruler.qa import Question, read_questions

__all__ = ["NEW_TOKENS", "NIAH", "TASKS", "Niah", "Question", "generate", "read_questions"]
