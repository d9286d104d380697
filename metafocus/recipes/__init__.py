"""The literature in a few lines each."""

from metafocus.recipes.focusft import focusft as focusft
from metafocus.recipes.focusft import focusft_problem as focusft_problem
