"""The literature in a few lines each."""

from metafocus.recipes import fewshot as fewshot
from metafocus.recipes import hpo as hpo
from metafocus.recipes.focusft import focusft as focusft
from metafocus.recipes.focusft import focusft_problem as focusft_problem
from metafocus.recipes.test_time import export as export
from metafocus.recipes.test_time import qttt as qttt
from metafocus.recipes.test_time import ttt_e2e as ttt_e2e
