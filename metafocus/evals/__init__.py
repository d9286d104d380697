"""Long-context questions that are made by code, and their scorers."""

from metafocus.evals import babilong, helmet, nolima, ruler
from metafocus.evals.fit import largest
from metafocus.evals.intervals import wilson
from metafocus.evals.items import Item, token_windows, write_chats
from metafocus.evals.prose import Prose, builtin_prose, prose_from_file, words_of
from metafocus.evals.scorers import (
    babilong_official,
    lm_eval_substring,
    string_match_all,
    string_match_part,
)

__all__ = [
    "Item",
    "Prose",
    "babilong",
    "babilong_official",
    "builtin_prose",
    "helmet",
    "largest",
    "lm_eval_substring",
    "nolima",
    "prose_from_file",
    "ruler",
    "string_match_all",
    "string_match_part",
    "token_windows",
    "wilson",
    "words_of",
    "write_chats",
]
